# Copyright © 2026 MLX Contributors

"""One raw row: the columns that hold something, and what each was read as."""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .content import RowFault

PROMPT, ANSWERS, PREFERENCE = "prompt", "answers", "preference"
SYSTEM, TOOLS, VALUES, TOKENS = "system", "tools", "values", "tokens"
# Of these a text may be the JSON of messages.
_MAY_BE_MESSAGES = (PROMPT, ANSWERS)
_KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
_LOOKS_LIKE_MESSAGES = re.compile(
    r"""\s*(\[\s*)?\{\s*(['"])(role|content|from|value|tool_calls)\2\s*:"""
)


# What names a row, or another one, says nothing.
_NAMES = re.compile(r"(.+_)?id", re.IGNORECASE)

# What rows are read as.
KINDS = ("pairs", "rankings", "labels")
RANKING_PAIRS = ("all", "neighbours", "best_and_worst")


@dataclass(frozen=True)
class Reading:
    """How rows are read; see ``RowOptions``."""

    kind: str = "pairs"
    prompt_feature: str = "prompt"
    chosen_feature: str = "chosen"
    rejected_feature: str = "rejected"
    weight_feature: str | None = None
    margin_feature: str | None = None
    criteria: Mapping[str, float] | None = None
    ranking_pairs: str = "all"
    turns: bool = True
    wrap_text: bool = False


class Row(dict):
    """A raw row without what is null, under the standard names of columns."""

    def __init__(self, raw: Mapping, reading: Reading | None = None):
        reading = reading or Reading()
        self.given = {
            PROMPT: reading.prompt_feature,
            "chosen": reading.chosen_feature,
            "rejected": reading.rejected_feature,
        }
        # A column that the user named is not read as another shape's.
        used = set(self.given.values())
        found = {k: v for k, v in raw.items() if k not in self.given and k not in used}
        for name, feature in self.given.items():
            if feature in raw:
                found[name] = raw[feature]
        # Tables have all columns in every row.
        super().__init__({k: v for k, v in found.items() if v is not None})
        self.nulls = found.keys() - self.keys()
        self.roles: dict[str, list[str]] = {}
        self.remarks: list[str] = []
        # How settings, or what stands for them, had it read.
        self.choices: list[str] = []

    def needs(self, name: str) -> RowFault:
        """The fault of a row that lacks a column."""
        reason = "value is None" if name in self.nulls else "missing column"
        return RowFault(reason, self.given.get(name, name))

    def take(self, name: str, role: str) -> Any:
        """Read a column that must be there."""
        if name not in self:
            raise self.needs(name)
        names = self.roles.setdefault(role, [])
        if (given := self.given.get(name, name)) not in names:
            names.append(given)
        return self.peek(name) if role in _MAY_BE_MESSAGES else self[name]

    def peek(self, name: str) -> Any:
        """What a column holds, messages where it is their JSON."""
        value = self[name]
        return messages_in(value, name) if isinstance(value, str) else value

    def may(self, name: str, role: str) -> Any:
        """Read a column if it holds something."""
        return self.take(name, role) if name in self else None

    def has(self, names: Iterable[str]) -> bool:
        """Whether all of these columns hold something."""
        return all(name in self for name in names)

    def unread(self) -> list[str]:
        """The columns with text or messages, not names, that were read as nothing."""
        read = {name for names in self.roles.values() for name in names}
        return [
            name
            for name, value in ((self.given.get(k, k), v) for k, v in self.items())
            if isinstance(name, str)
            and name not in read
            and not _NAMES.fullmatch(name)
            and _is_text(value)
        ]


def messages_in(text: str, name: str) -> Any:
    """The messages that a text holds as JSON, or as Python prints them; or the text."""
    if not _LOOKS_LIKE_MESSAGES.match(text):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if _are_messages(found) else text
    # Broken JSON may be what an answer is rejected for.
    if any(all(key in text for key in keys) for keys in _KEYS):
        raise RowFault("messages are no JSON", name)
    return text


def _are_messages(value: Any) -> bool:
    found = value if isinstance(value, list) else [value]
    return bool(found) and all(
        isinstance(m, Mapping) and any(keys <= m.keys() for keys in _KEYS)
        for m in found
    )


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, (list, Mapping)) and _are_messages(value)
