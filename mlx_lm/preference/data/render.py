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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import date
from functools import cached_property, lru_cache, partial
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...tokenizer_utils import TokenizerWrapper
from ..plug_ins import load
from .content import MOST_CHARACTERS, ROLES, RowFault, check_text, is_answer

UNCLEAR = "the chat template hides where the answer begins"
ONE_TURN = "let each answer be one turn"
WAY_OUT = "give rendered text as prompt, chosen and rejected"
# What holds while a template runs; what finds an answer of a template that writes the
# prompt otherwise before it; and where an answer's other turns begin and end.
BOUNDS: list[Callable[[], Callable[[], AbstractContextManager]]] = []
FOUND: list[Callable[..., list]] = []
BORDERS: list[Callable[..., list[int]]] = []
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
        self.raw = tokenizer._tokenizer if is_wrapper else tokenizer
        kind, base = type(self.raw), PreTrainedTokenizerBase
        #: Whether the tokenizer has a renderer of its own, which makes ids.
        self.makes_ids = kind.apply_chat_template is not base.apply_chat_template
        is_plain = not self.makes_ids and not (is_wrapper and tokenizer._chat_template)
        found = self.raw.chat_template if is_plain else None
        found = found.values() if isinstance(found, dict) else [found]
        self._templates = [text for text in found if isinstance(text, str)]
        if is_wrapper:
            self.available = tokenizer.has_chat_template
        else:
            self.available = self.makes_ids or bool(self._templates)
        #: What opens and closes a thought.
        self.thought = "<think>", "</think>"
        if is_wrapper and tokenizer.has_thinking:
            self.thought = tokenizer.think_start, tokenizer.think_end
        is_dated = any(_DATE in text for text in self._templates)
        self.date = (day or date.today().isoformat()) if is_dated else None
        self._bounds = [bound() for bound in BOUNDS]

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
            if not FOUND:
                raise RowFault(UNCLEAR, WAY_OUT)
            return FOUND[-1](self, call, prompt, answers, parts), True

    def borders(
        self, prompt: list, answer: list, variables: dict, whole: Any
    ) -> list[int]:
        """Where turns that are not the assistant's begin and end in a rendered answer."""
        if all(is_answer(message) for message in answer):
            return []
        if not (BORDERS and isinstance(whole, str)):
            raise RowFault(UNCLEAR, ONE_TURN)
        with self.guarded():
            return BORDERS[-1](partial(self._call, variables), prompt, answer, whole)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn what a template may raise into faults."""
        with ExitStack() as stack:
            for bound in self._bounds:
                stack.enter_context(bound())
            try:
                yield
            except (RowFault, MemoryError):
                raise
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
            template = self.raw.get_chat_template(None, variables.get("tools"))
            options["chat_template"] = _at(date.fromisoformat(self.date), template)
        if options["tokenize"] and self._apply == self.raw.apply_chat_template:
            options["return_dict"] = False
        result = self._apply(messages, **options)
        if len(result) > 2 * MOST_CHARACTERS:
            what = f"more than {2 * MOST_CHARACTERS:,} characters for one row"
            raise RowFault("chat template writes too much", what)
        if options["tokenize"]:
            return list(result)
        return check_text(result, "the rendered chat")


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


# Each adds to the lists.
PLUG_INS = "bounds", "rewritten", "borders"
load(__package__, PLUG_INS)
