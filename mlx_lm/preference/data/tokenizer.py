# Copyright © 2026 MLX Contributors

"""Token ids of preference pairs: special tokens, chat templates, prompt length."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from os.path import commonprefix
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...tokenizer_utils import TokenizerWrapper
from ..errors import InputError
from .content import RowFault
from .pairs import PreferenceRow
from .render import ChatRenderer
from .special import SpecialTokens, is_marked, split_marked

# Templates may write so many tokens of spaces behind an answer's end.
_BEHIND_END = 4
OTHER_TOKENS = (
    "[WARNING] the token ids of an answer are not this tokenizer's for its text, which "
    "is read instead"
)


@dataclass
class TokenPair:
    """One pair as the model sees it, not yet cut."""

    # Tokens of an answer that are another's turn are there as their complement: the
    # model reads them, and nobody scores them.

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    dropped: list[int]
    shape: str
    format: str
    # Whether the template writes the prompt otherwise once an answer follows, and a
    # special token in the row's own texts.
    rewritten: bool = False
    special: str = ""
    # Whether the template writes no end behind an answer.
    endless: bool = False


class PairTokenizer:
    """Tokenize preference pairs with a transformers or an mlx-lm tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        escape_special_tokens: bool = False,
        template_date: str | None = None,
    ):
        is_wrapper = isinstance(tokenizer, TokenizerWrapper)
        self.tokenizer = tokenizer
        self._raw = tokenizer._tokenizer if is_wrapper else tokenizer
        base, kind = PreTrainedTokenizerBase, type(self._raw)
        self._own_encode = kind.encode is not base.encode
        fast = PreTrainedTokenizerFast
        plain = getattr(kind, "_encode_plus", None) is fast._encode_plus
        plain = plain and kind.__call__ is base.__call__ and not self._own_encode
        self._backend: Any = self._raw.backend_tokenizer if plain else None
        if plain:
            # Clears the truncation and padding that the file may have set.
            self._raw([""], add_special_tokens=False)
        self._borders: dict[str, bool] = {}
        self._renderer = ChatRenderer(tokenizer, template_date)
        self.has_chat_template = self._renderer.available
        #: The date that the template writes, if it writes one.
        self.template_date = self._renderer.date
        self._special = SpecialTokens(tokenizer, self._raw)
        self._end_ids = set(map(self._raw.convert_tokens_to_ids, self._special.ends))
        self.escapes = escape_special_tokens
        if escape_special_tokens:
            self._check_escapes()

    def prompt_ids(self, prompt: Any, variables: dict[str, Any]) -> list[int]:
        """The ids of a prompt alone, as those of a pair begin."""
        if isinstance(prompt, str):
            return self._encode_texts([[prompt]])[0][0]
        (part,), _ = self._renderer(prompt, [], variables)
        return part if isinstance(part, list) else self._encode_chats([[part]])[0][0]

    def _check_escapes(self) -> None:
        for token in self._special.tokens:
            is_token = self._raw.convert_tokens_to_ids(token) in self._piece(
                token, True
            )
            if is_token or self._renderer.makes_ids:
                raise InputError(
                    "escape_special_tokens does not work with this tokenizer, which "
                    f"has no way to write {token!r} as text. Leave it out."
                )

    def __call__(self, rows: list[PreferenceRow]) -> list[TokenPair | RowFault]:
        """Tokenize some rows."""
        results: list[Any] = [None] * len(rows)
        texts: dict[int, list[str]] = {}
        chats: dict[int, list[str]] = {}
        found: dict[int, Any] = {}
        notes: dict[int, dict[str, Any]] = {}
        given: dict[int, list[tuple[Any, list[int] | None]]] = {}
        for i, row in enumerate(rows):
            is_text = isinstance(row.prompt, str)
            given[i] = self._given(row)
            answers = [x for x, ids in given[i] if ids is None]
            read = self._texts if is_text else self._chats
            try:
                parts, notes[i] = read(row, answers)
            except RowFault as fault:
                results[i] = fault
                continue
            waiting: dict = texts if is_text else chats
            (found if isinstance(parts[0], list) else waiting)[i] = parts
        ids = self._encode_texts([*texts.values()])
        ids += self._encode_chats([*chats.values()])
        found |= zip([*texts, *chats], ids, strict=True)
        for i, encoded in found.items():
            encoded = _mark_other_turns(encoded, notes[i].pop("borders", ()))
            if i not in texts:
                notes[i]["endless"] = not all(map(self._ends, encoded[1:]))
            encoded = _with_given(encoded, given[i])
            results[i] = _make_pair(rows[i], *encoded, **notes[i])
        return results

    def _ends(self, ids: list[int]) -> bool:
        """Whether an answer ends in a token that ends generation, but for spaces."""
        return not self._end_ids.isdisjoint(ids[-_BEHIND_END:])

    def _given(self, row: PreferenceRow) -> list[tuple[Any, list[int] | None]]:
        """Each answer, with its token ids if the row has them and they are its text."""
        sides = [(row.chosen, row.chosen_tokens), (row.rejected, row.rejected_tokens)]
        found = [(x, ids if ids and self._says(ids, x) else None) for x, ids in sides]
        if row.row and any(ids and not y for (_, ids), (_, y) in zip(sides, found)):
            row.row.remarks.append(OTHER_TOKENS)
        return found if row.rejected is not None else found[:1]

    def _says(self, ids: list[int], answer: Any) -> bool:
        if not isinstance(answer, str):
            if len(answer) > 1:
                return False
            answer = answer[0]["content"]
        try:
            text = self._raw.decode(ids[:-1] if ids[-1] in self._end_ids else ids)
        except (LookupError, ValueError, OverflowError):
            # Of a larger vocabulary: not every tokenizer passes them over.
            return False
        # Decoders differ in spaces, and in what is left of a cut character.
        same, other = ("".join(x.replace("\ufffd", "").split()) for x in (text, answer))
        return same == other

    def _texts(
        self, row: PreferenceRow, answers: list[str]
    ) -> tuple[list[str], dict[str, Any]]:
        """The prompt and the prompt with each answer, and what is to be said of them."""
        texts = [row.prompt, *answers]
        prompt, *answers = self._special.mark(texts) if self.escapes else texts
        ends, eos = self._special.ends, self.tokenizer.eos_token or ""
        whole = [
            prompt + (text if text.rstrip().endswith(ends) else text + eos)
            for text in answers
        ]
        special = "" if self.escapes else self._special.first(texts)
        return [prompt, *whole], {"special": special}

    def _chats(
        self, row: PreferenceRow, answers: list[list]
    ) -> tuple[list, dict[str, Any]]:
        """The same, rendered, or as ids where the tokenizer has its own renderer."""
        texts = [row.prompt, row.template_kwargs, *answers]
        if self.escapes:
            texts, special = self._special.mark(texts), ""
        else:
            special = self._special.first(texts)
        prompt, variables, *answers = texts
        ended = [self._without_end(x) for x in answers] if special else answers
        parts, rewritten = self._renderer(prompt, ended, variables)
        if ended != answers:
            ends = self._special.ends
            if all(isinstance(x, str) and x.rstrip().endswith(ends) for x in parts[1:]):
                special = self._special.first([prompt, variables, ended])
            else:
                ended = answers
                parts, rewritten = self._renderer(prompt, answers, variables)
        notes = {"rewritten": rewritten, "special": special}
        return self._with_borders(parts, prompt, ended, variables, notes)

    def _with_borders(
        self, parts: list, prompt: list, answers: list, variables: dict, notes: dict
    ) -> tuple[list, dict[str, Any]]:
        """Add the texts that end where other turns within the answers begin and end."""
        found = [
            self._renderer.borders(prompt, answer, variables, whole)
            for answer, whole in zip(answers, parts[1:])
        ]
        if any(found):
            notes["borders"] = [len(borders) for borders in found]
            starts = zip(parts[1:], found)
            parts = parts + [whole[:at] for whole, ends in starts for at in ends]
        return parts, notes

    def _without_end(self, answer: list) -> list:
        """An answer without the token that its template writes after it."""
        text = answer[-1]["content"].rstrip()
        for end in self._special.ends:
            if text.endswith(end):
                return [*answer[:-1], {**answer[-1], "content": text[: -len(end)]}]
        return answer

    def _encode_texts(self, rows: list[list[str]]) -> list[list[list[int]]]:
        texts = [text for row in rows for text in row]
        bos = self.tokenizer.bos_token
        begun = [bool(bos) and text.startswith(bos) for text in texts]
        # As mlx_lm.generate: no second BOS.
        ids = {
            is_begun: iter(
                self._encode([x for x, b in zip(texts, begun) if b == is_begun], add)
            )
            for is_begun, add in ((True, False), (False, True))
        }
        found = iter([next(ids[is_begun]) for is_begun in begun])
        return [[next(found) for _ in row] for row in rows]

    def _encode_chats(self, rows: list[list[str]]) -> list[list[list[int]]]:
        """The start that a row's texts share is encoded once, up to a border."""
        known = self._find_borders(rows[0][0]) if rows and self._backend else []
        # What reads like a border may be escaped.
        cuts = [0 if is_marked(row[0]) else _find_cut(row, known) for row in rows]
        texts = []
        for row, cut in zip(rows, cuts):
            texts += [row[0][:cut], *(text[cut:] for text in row)]
        ids = iter(self._encode(texts, False))
        results = []
        for row in rows:
            start = next(ids)
            found = [start + next(ids) for _ in row]
            for i, text in enumerate(row):
                # Tokens may merge across the border, which generation never sees.
                if found[i][: len(found[0])] != found[0]:
                    found[i] = found[0] + self._after(text[len(row[0]) :])
            results.append(found)
        return results

    def _after(self, text: str) -> list[int]:
        """The ids of a text that follows another one."""
        ids: list[int] = []
        for i, piece in enumerate(split_marked(text)):
            ids += self._piece(piece, as_text=i % 2 == 1) if piece else []
        return ids

    def _piece(self, text: str, as_text: bool) -> list[int]:
        # Some tokenizers put a space before a text; an anchor keeps it away, if it is
        # in no token with what follows.
        for anchor in ("\n", "a", ":"):
            start = self._encode_one(anchor, as_text)
            ids = self._encode_one(anchor + text, as_text)
            if ids[: len(start)] == start:
                return ids[len(start) :]
        return self._encode_one(text, as_text)

    def _find_borders(self, text: str) -> list[str]:
        """The tokens in a text that always part it."""
        added = self._backend.get_added_tokens_decoder().values()
        if any(token.single_word for token in added) or self._raw.split_special_tokens:
            return []
        found = [token for token in added if token.content in text]
        for token in found:
            if token.content not in self._borders:
                self._borders[token.content] = not (
                    token.normalized
                    or token.lstrip
                    or any(_overlaps(other.content, token.content) for other in added)
                )
        return [token.content for token in found if self._borders[token.content]]

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if self.escapes and any(map(is_marked, texts)):
            return [self._encode_marked(text, add_special_tokens) for text in texts]
        kwargs = {"add_special_tokens": add_special_tokens}
        if self._own_encode or not texts:
            return [self._raw.encode(text, **kwargs) for text in texts]
        if self._backend is None:
            kwargs |= {"return_attention_mask": False, "verbose": False}
            return self._raw(texts, **kwargs)["input_ids"]
        # Unlike a call of the tokenizer, this computes no offsets.
        return [e.ids for e in self._backend.encode_batch_fast(texts, **kwargs)]

    def _encode_marked(self, text: str, add_special_tokens: bool) -> list[int]:
        """Encode a text whose marked pieces are no tokens."""
        first = split_marked(text)[0]
        return self._encode([first], add_special_tokens)[0] + self._after(
            text[len(first) :]
        )

    def _encode_one(self, text: str, as_text: bool) -> list[int]:
        if not as_text:
            return self._encode([text], False)[0]
        if self._backend is None:
            tokens = self._raw.tokenize(text, split_special_tokens=True)
            return self._raw.convert_tokens_to_ids(tokens)
        self._backend.encode_special_tokens = True
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        finally:
            self._backend.encode_special_tokens = self._raw.split_special_tokens


def _with_given(parts: list[list[int]], given: list[tuple]) -> list[list[int]]:
    """The prompt, and behind it each answer's ids, which were given or made of text."""
    prompt, *made = parts
    rest = iter(made)
    return [prompt, *(next(rest) if ids is None else prompt + ids for _, ids in given)]


def _overlaps(other: str, token: str) -> bool:
    """Whether another token may begin before this one and reach into it."""
    ends = (other[i:] for i in range(1, len(other)))
    return any(end.startswith(token) or token.startswith(end) for end in ends)


def _find_cut(texts: list[str], borders: list[str]) -> int:
    """Where the last border begins in the common start of some texts, or 0."""
    shared = texts[0]
    if not all(text.startswith(shared) for text in texts):
        shared = commonprefix(texts)
    return max([0, *map(shared.rfind, borders)])


def _make_pair(
    row: PreferenceRow, prompt: list[int], *answers: list[int], **notes: Any
) -> TokenPair | RowFault:
    # Tokens of raw text may merge across the border: answers start where ids part.
    size = len(prompt)
    if any(answer[:size] != prompt for answer in answers):
        size = len(commonprefix([prompt, *answers]))
    if any(len(answer) == size for answer in answers):
        return RowFault("empty answer", "it has no tokens")
    if len(answers) > 1 and answers[0] == answers[1]:
        return RowFault("equal answers", _why_equal(row))
    chosen, rejected = [*(answer[size:] for answer in answers), []][:2]
    dropped = prompt[size:]
    return TokenPair(
        prompt[:size], chosen, rejected, dropped, row.shape, row.format, **notes
    )


def _why_equal(row: PreferenceRow) -> str:
    """What two answers differ in that the template does not write."""
    names: set = set()
    none: dict = {}
    if not isinstance(row.chosen, str):
        for one, other in zip_longest(row.chosen, row.rejected, fillvalue=none):
            names |= {k for k in one | other if one.get(k) != other.get(k)}
    if not names - {"content"}:
        return "they have the same tokens"
    return f"they differ in {', '.join(sorted(names))}, which the chat template drops"


def _mark_other_turns(parts: list[list[int]], counts: Sequence[int]) -> list:
    """Take the complement of tokens between borders, which are given as starts."""
    if not counts:
        return parts
    prompt, *answers = parts[: 1 + len(counts)]
    starts = iter(parts[1 + len(counts) :])
    for answer, count in zip(answers, counts):
        ends = [len(commonprefix([answer, next(starts)])) for _ in range(count)]
        for first, end in zip(ends[::2], ends[1::2]):
            answer[first:end] = [~token for token in answer[first:end]]
    return [prompt, *answers]


def plain_ids(ids: Any) -> np.ndarray:
    """The ids of all tokens, whoever wrote them."""
    ids = np.asarray(ids)
    return np.where(ids < 0, ~ids, ids)


def show_pair(
    tokenizer: Any, prompt: np.ndarray, answers: dict[str, np.ndarray]
) -> str:
    """Show the end of a prompt and both ends of its answers, as the model sees them."""
    decode = lambda ids: repr(tokenizer.decode(plain_ids(ids).tolist()))
    lines = [f"prompt   {decode(prompt[-24:])}"]
    for name, ids in answers.items():
        text = decode(ids)
        if len(ids) > 24:
            text = f"{decode(ids[:16])} … {decode(ids[-8:])}"
        lines.append(f"{name:<8} {text}")
    return "\n".join(lines)
