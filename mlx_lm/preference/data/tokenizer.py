# Copyright © 2026 MLX Contributors

"""Token ids of preference pairs: special tokens, chat templates, prompt length."""

from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...tokenizer_utils import TokenizerWrapper
from .messages import RowFault, check_text
from .pairs import PreferenceRow


@dataclass
class TokenPair:
    """One pair as the model sees it, not yet cut."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    dropped: list[int]
    shape: str
    format: str


class PairTokenizer:
    """Tokenize preference pairs with a transformers or an mlx-lm tokenizer."""

    def __init__(self, tokenizer: Any):
        is_wrapper = isinstance(tokenizer, TokenizerWrapper)
        self.tokenizer = tokenizer
        # The wrapper's template call is the one of mlx_lm.generate and
        # mlx_lm.server: it sets enable_thinking, so training sees what they see.
        self._render = tokenizer.apply_chat_template
        self._raw = tokenizer._tokenizer if is_wrapper else tokenizer
        self._eos = tokenizer.eos_token or ""
        base = PreTrainedTokenizerBase
        kind = type(self._raw)
        self._own_encode = kind.encode is not base.encode
        fast = PreTrainedTokenizerFast
        plain = getattr(kind, "_encode_plus", None) is fast._encode_plus
        plain = plain and kind.__call__ is base.__call__ and not self._own_encode
        self._backend: Any = self._raw.backend_tokenizer if plain else None
        if plain:
            # Clears the truncation and padding that the file may have set.
            self._raw([""], add_special_tokens=False)
        self._borders: dict[str, bool] = {}
        self._own_render = kind.apply_chat_template is not base.apply_chat_template
        if is_wrapper:
            self.has_chat_template = tokenizer.has_chat_template
        else:
            self.has_chat_template = bool(tokenizer.chat_template) or self._own_render

    def __call__(self, rows: list[PreferenceRow]) -> list[TokenPair | RowFault]:
        """Tokenize some rows."""
        results: list[Any] = [None] * len(rows)
        texts: dict[int, list[str]] = {}
        chats: dict[int, list[str]] = {}
        for i, row in enumerate(rows):
            is_text = isinstance(row.prompt, str)
            try:
                parts = self._texts(row) if is_text else self._chats(row)
            except RowFault as fault:
                results[i] = fault
                continue
            if isinstance(parts[0], list):
                results[i] = _make_pair(row, *parts)
            else:
                (texts if is_text else chats)[i] = parts
        ids = self._encode_texts([*texts.values()])
        ids += self._encode_chats([*chats.values()])
        for i, parts in zip([*texts, *chats], ids, strict=True):
            results[i] = _make_pair(rows[i], *parts)
        return results

    def _texts(self, row: PreferenceRow) -> list[str]:
        answers = [
            text if text.endswith(self._eos) else text + self._eos
            for text in _answers(row)
        ]
        return [row.prompt, *(row.prompt + answer for answer in answers)]

    def _chats(self, row: PreferenceRow) -> list:
        """The two or three conversations, rendered, or as ids where the tokenizer
        has a renderer of its own."""
        if not self.has_chat_template:
            raise RowFault("messages need a chat template, the tokenizer has none")
        kwargs = {**row.template_kwargs, "tokenize": self._own_render}
        if self._own_render and self._render is self._raw.apply_chat_template:
            kwargs["return_dict"] = False
        try:
            parts = [
                self._render(row.prompt, add_generation_prompt=True, **kwargs),
                *(self._render(row.prompt + a, **kwargs) for a in _answers(row)),
            ]
        except Exception as e:
            # A template is a program: it may raise anything.
            raise RowFault("chat template failed", str(e)) from e
        if self._own_render:
            return [list(ids) for ids in parts]
        return [check_text(text, "the rendered chat") for text in parts]

    def _encode_texts(self, rows: list[list[str]]) -> list[list[list[int]]]:
        ids = iter(self._encode([text for row in rows for text in row], True))
        return [[next(ids) for _ in row] for row in rows]

    def _encode_chats(self, rows: list[list[str]]) -> list[list[list[int]]]:
        """The start that a row's texts share is encoded once, up to a border."""
        known = self._find_borders(rows[0][0]) if rows and self._backend else []
        cuts = [_find_cut(row, known) for row in rows]
        texts = []
        for row, cut in zip(rows, cuts):
            texts += [row[0][:cut], *(text[cut:] for text in row)]
        ids = iter(self._encode(texts, False))
        results = []
        for row in rows:
            start = next(ids)
            results.append([start + next(ids) for _ in row])
        return results

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
        kwargs = {"add_special_tokens": add_special_tokens}
        if self._own_encode or not texts:
            return [self._raw.encode(text, **kwargs) for text in texts]
        if self._backend is None:
            kwargs |= {"return_attention_mask": False, "verbose": False}
            return self._raw(texts, **kwargs)["input_ids"]
        # Unlike a call of the tokenizer, this computes no offsets.
        return [e.ids for e in self._backend.encode_batch_fast(texts, **kwargs)]


def _answers(row: PreferenceRow) -> list[Any]:
    return [row.chosen] if row.rejected is None else [row.chosen, row.rejected]


def _overlaps(other: str, token: str) -> bool:
    """Whether another token may begin before this one and reach into it."""
    ends = (other[i:] for i in range(1, len(other)))
    return any(end.startswith(token) or token.startswith(end) for end in ends)


def _find_cut(texts: list[str], borders: list[str]) -> int:
    """Where the last border begins in the common start of some texts, or 0."""
    shared = texts[0]
    if not all(text.startswith(shared) for text in texts):
        shared = commonprefix(texts)
    return max(0, *(shared.rfind(border) for border in borders), 0)


def _make_pair(
    row: PreferenceRow, prompt: list[int], *answers: list[int]
) -> TokenPair | RowFault:
    # Some templates render the prompt alone differently, and tokens may merge
    # across the border: the answers start where the ids part.
    size = len(prompt)
    if any(answer[:size] != prompt for answer in answers):
        size = len(commonprefix([prompt, *answers]))
    if any(len(answer) == size for answer in answers):
        return RowFault("empty answer", "it has no tokens")
    if len(answers) > 1 and answers[0] == answers[1]:
        return RowFault("equal answers", "they have the same tokens")
    chosen, rejected = [*(answer[size:] for answer in answers), []][:2]
    dropped = prompt[size:]
    return TokenPair(prompt[:size], chosen, rejected, dropped, row.shape, row.format)


def show_pair(
    tokenizer: Any, prompt: np.ndarray, answers: dict[str, np.ndarray]
) -> str:
    """Show the end of a prompt and both ends of its answers, as the model sees them."""
    decode = lambda ids: repr(tokenizer.decode(ids.tolist()))
    lines = [f"prompt   {decode(prompt[-24:])}"]
    for name, ids in answers.items():
        text = decode(ids)
        if len(ids) > 24:
            text = f"{decode(ids[:16])} … {decode(ids[-8:])}"
        lines.append(f"{name:<8} {text}")
    return "\n".join(lines)
