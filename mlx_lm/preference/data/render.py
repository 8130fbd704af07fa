# Copyright © 2026 MLX Contributors

"""Conversations as mlx_lm.generate and mlx_lm.server render them, and answers after.

A prompt is what generation renders. What the template writes for an answer follows it;
but some templates write a prompt otherwise once an answer follows (a system text in the
last user turn, thoughts of earlier turns, an opened thought). Then the answer is found
behind the last turn of the prompt, or the row is refused.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import cached_property, lru_cache, partial
from itertools import chain, pairwise
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...tokenizer_utils import TokenizerWrapper
from .bounded import TooSlow, bounded
from .content import MOST_CHARACTERS, ROLES, RowFault, check_text, is_answer

# Seconds of processor time for one row, and rows that may take so long.
LONGEST, MOST_SLOW = 10.0, 3
TOO_SLOW = "chat template runs too long"
# Bytes that it may take for one row.
MOST_MEMORY = 10**9
NO_THOUGHT = "the answer closes no thought"
UNCLEAR = "the chat template hides where the answer begins"
_ONE_TURN = "let each answer be one turn"
_WAY_OUT = "give rendered text as prompt, chosen and rejected"
# No template changes or looks into these.
_TURN, _ANSWER = "90417263558", "81736254409"
# Arguments of the call, where a row may set variables of the template.
_CALL = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
_OWN = {*_CALL, "messages", "strftime_now"} - {"self", "documents", "kwargs"}
_EQUAL = re.compile(r"""[!=]=\s*(['"])(.*?)\1|(['"])([^'"]*)\3\s*[!=]=""")
_AMONG = re.compile(r"\bin\s*[\[(]([^\])]*)[\])]")
_QUOTED = re.compile(r"""(['"])(.*?)\1""")
_FORMAT = re.compile("%[-_^#0]?[a-zA-Z]")
_DATE = "strftime_now"


class ChatRenderer:
    """The template calls of one tokenizer, at one date."""

    def __init__(self, tokenizer: Any, day: str | None = None):
        is_wrapper = isinstance(tokenizer, TokenizerWrapper)
        # The wrapper's call sets enable_thinking, as generation does.
        self._apply = tokenizer.apply_chat_template
        self._raw = tokenizer._tokenizer if is_wrapper else tokenizer
        kind, base = type(self._raw), PreTrainedTokenizerBase
        #: Whether the tokenizer has a renderer of its own, which makes ids.
        self.makes_ids = kind.apply_chat_template is not base.apply_chat_template
        is_plain = not self.makes_ids and not (is_wrapper and tokenizer._chat_template)
        found = self._raw.chat_template if is_plain else None
        found = found.values() if isinstance(found, dict) else [found]
        self._templates = [text for text in found if isinstance(text, str)]
        if is_wrapper:
            self.available = tokenizer.has_chat_template
        else:
            self.available = self.makes_ids or bool(self._templates)
        self._thought = "<think>", "</think>"
        if is_wrapper and tokenizer.has_thinking:
            self._thought = tokenizer.think_start, tokenizer.think_end
        is_dated = any(_DATE in text for text in self._templates)
        self.date = (day or date.today().isoformat()) if is_dated else None
        self._slow = 0

    def __call__(
        self, prompt: list, answers: list[list], variables: dict
    ) -> tuple[list, bool]:
        """The prompt and the prompt with each answer, and whether the template would
        write the prompt otherwise then. Text, or ids of a renderer that makes them."""
        self._check([prompt, *answers], variables)
        call = partial(self._call, variables)
        with self.guarded():
            parts = [call(prompt, add_generation_prompt=True)]
            parts += [call(prompt + answer) for answer in answers]
            size = len(parts[0])
            if all(whole[:size] == parts[0] for whole in parts):
                return parts, False
            if self.makes_ids:
                call = partial(call, tokenize=False)
                parts = self._as_text(call, prompt, answers, parts[0])
            return self._mend(call, prompt, answers, parts), True

    def borders(
        self, prompt: list, answer: list, variables: dict, whole: Any
    ) -> list[int]:
        """Where turns that are not the assistant's begin and end in a rendered answer."""
        if all(is_answer(message) for message in answer):
            return []
        if not isinstance(whole, str):
            raise RowFault(UNCLEAR, _ONE_TURN)
        call, found = partial(self._call, variables), []
        others: list[list[str]] = []
        with self.guarded():
            full = call(prompt + answer)
            for i, (turn, following) in enumerate(pairwise(answer), 1):
                if is_answer(turn) != is_answer(following):
                    found.append(self._border(call, prompt, answer, i, full))
                    others.append([])
                if not is_answer(following):
                    others[-1].append(following["content"].strip())
        for first, end, texts in zip(found[::2], found[1::2], others[::2]):
            inside = full[first:end]
            is_clear = all(text in inside or text not in full for text in texts)
            if not (inside and is_clear and whole.endswith(full[first:])):
                raise RowFault(UNCLEAR, _ONE_TURN)
        return [len(whole) - len(full) + at for at in found]

    def _border(
        self, call: Callable, prompt: list, answer: list, size: int, full: str
    ) -> int:
        """Where the first turns of an answer end, with what generation is given."""
        start, (*before, last), rest = prompt, answer[:size], answer[size:]
        is_others = not is_answer(last)
        alone = partial(call, add_generation_prompt=is_others)
        if full.startswith(text := alone(start + answer[:size])):
            return len(text)
        # Some templates write a turn otherwise once another follows: then what comes
        # behind it is found. Calls stand behind a content, which they would move.
        said = last["content"]
        marked = [
            {**last, "content": said + _TURN},
            {**last, "content": said.rstrip() + _TURN},
        ]
        if not is_others:
            marked += [{"role": last["role"], "content": _TURN}]
        for turn in marked:
            own = alone([*start, *before, turn]).rpartition(_TURN)[2]
            found, tail = call([*start, *before, turn, *rest]).partition(_TURN)[1:]
            shared = commonprefix([own, tail])
            is_end = shared.strip() if is_others else shared.strip() == own.strip()
            behind = tail[len(shared) :]
            if found and is_end and full.endswith(behind):
                return len(full) - len(behind)
        raise RowFault(UNCLEAR, _ONE_TURN)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn what a template may raise into faults."""
        if self._slow >= MOST_SLOW:
            raise RowFault(TOO_SLOW)
        try:
            with bounded(LONGEST, MOST_MEMORY):
                yield
        except RowFault:
            raise
        except MemoryError as e:
            what = f"more than {MOST_MEMORY / 1e9:g} GB for one row"
            raise RowFault("chat template takes too much memory", what) from e
        except TooSlow as e:
            self._slow += 1
            raise RowFault(TOO_SLOW, f"stopped after {LONGEST:g} s") from e
        except Exception as e:
            # A template is a program: it may raise anything.
            raise RowFault("chat template failed", str(e)) from e

    def _check(self, conversations: list[list], variables: dict) -> None:
        if not self.available:
            raise RowFault("messages need a chat template, the tokenizer has none")
        for name in variables:
            if name in _OWN and name != "tools":
                where = f"chat_template_kwargs has {name}: leave it out"
                raise RowFault("not a variable of the template", where)
        for message in chain(*conversations) if self._templates else ():
            if (role := message["role"]) not in ROLES and role not in self._roles:
                raise RowFault("unknown role", f"{role}, which the template lacks")

    @cached_property
    def _roles(self) -> set[str]:
        """What the templates compare anything with, roles among it."""
        equal = {b or d for x in self._templates for _, b, _, d in _EQUAL.findall(x)}
        among = [found for x in self._templates for found in _AMONG.findall(x)]
        return equal | {text for x in among for _, text in _QUOTED.findall(x)}

    def _call(self, variables: dict, messages: list, **options: Any) -> Any:
        options = {"tokenize": self.makes_ids, **variables, **options}
        if self.date:
            template = self._raw.get_chat_template(None, variables.get("tools"))
            options["chat_template"] = _at(date.fromisoformat(self.date), template)
        if options["tokenize"] and self._apply == self._raw.apply_chat_template:
            options["return_dict"] = False
        result = self._apply(messages, **options)
        if len(result) > 2 * MOST_CHARACTERS:
            what = f"more than {2 * MOST_CHARACTERS:,} characters for one row"
            raise RowFault("chat template writes too much", what)
        if options["tokenize"]:
            return list(result)
        return check_text(result, "the rendered chat")

    def _as_text(
        self, call: Callable, prompt: list, answers: list, ids: list[int]
    ) -> list[str]:
        """A prompt, and the prompt with each answer, of a renderer that makes ids."""
        start = call(prompt, add_generation_prompt=True)
        if self._raw.encode(start, add_special_tokens=False) != ids:
            raise RowFault(UNCLEAR, _WAY_OUT)
        return [start, *(call(prompt + answer) for answer in answers)]

    def _mend(self, call: Callable, prompt: list, answers: list, parts: list) -> list:
        """Put the prompt of generation before what is written for each answer."""
        start, *wholes = parts
        return [start] + [
            (
                whole
                if whole.startswith(start)
                else start + self._find(call, prompt, answer, start, whole)
            )
            for answer, whole in zip(answers, wholes)
        ]

    def _find(
        self, call: Callable, prompt: list, answer: list, start: str, whole: str
    ) -> str:
        """What the template writes for an answer, found behind the last turn."""
        text = prompt[-1]["content"] + _TURN
        marked = [*prompt[:-1], {**prompt[-1], "content": text}]
        ends = call(marked, add_generation_prompt=True), call(marked + answer)
        given, written = (end.rpartition(_TURN)[2] for end in ends)
        is_clear = all(_TURN in end for end in ends) and _TURN not in whole
        if not (is_clear and start.endswith(given) and whole.endswith(written)):
            raise RowFault(UNCLEAR, _WAY_OUT)
        if written.startswith(given):
            return written[len(given) :]
        probe = call([*marked, {"role": "assistant", "content": _ANSWER}])
        head, found, tail = probe.rpartition(_TURN)[2].partition(_ANSWER)
        if found and given.rfind(self._thought[0]) > given.rfind(self._thought[1]):
            return self._after_thought(given, written, tail, answer)
        if not found or not written.startswith(head):
            raise RowFault(UNCLEAR, _WAY_OUT)
        written = written[len(head) :]
        if given.startswith(head):
            # Generation is given more, such as an empty thought.
            return written
        # Or the prompt has more between its last turn and the answer.
        for size in range(len(head.rstrip()) or len(head), len(head) + 1)[::-1]:
            if given.endswith(head[:size]) and head.strip():
                return head[size:] + written
        raise RowFault(UNCLEAR, _WAY_OUT)

    def _after_thought(self, given: str, written: str, tail: str, answer: list) -> str:
        """What follows a thought that the prompt has opened."""
        opens, closes = self._thought
        before, _, space = given.rpartition(opens)
        if not written.startswith(before):
            raise RowFault(UNCLEAR, _WAY_OUT)
        written = written[len(before) :]
        if closes in written:
            return written.removeprefix(opens).removeprefix(space)
        # Many templates leave thoughts out of what was said.
        content = answer[-1]["content"].lstrip()
        said = content.rpartition(closes)[2]
        if len(answer) > 1 or closes not in content:
            raise RowFault(NO_THOUGHT, f"begin it with {opens} and {closes}")
        if written.removesuffix(tail).strip() != said.strip():
            raise RowFault(UNCLEAR, _WAY_OUT)
        return content.removeprefix(opens).removeprefix(space) + tail


def fix_date(tokenizer: Any, day: str | None) -> str | None:
    """Have the chat template write one day, today if none is given, and tell which."""
    found = ChatRenderer(tokenizer, day).date
    if not found:
        return day
    given, at = tokenizer.chat_template, partial(_at, date.fromisoformat(found))
    many = isinstance(given, dict)
    tokenizer.chat_template = (
        {name: at(text) for name, text in given.items()} if many else at(given)
    )
    return found


@lru_cache
def _at(day: date, template: str) -> str:
    """A template with the date of a day, whenever it is rendered."""
    if template.startswith(f"{{% macro {_DATE}("):
        # It has one, perhaps of another day.
        template = template.partition("{{ '' }}")[2]
    text = "format"
    for code in sorted(set(_FORMAT.findall(template)), key=len, reverse=True):
        text += f".replace({code!r}, {day.strftime(code)!r})"
    # An empty expression: behind a block the template's first newline would be lost.
    macro = f"{{% macro {_DATE}(format) %}}{{{{ {text} }}}}{{% endmacro %}}"
    return f"{macro}{{{{ '' }}}}{template}"
