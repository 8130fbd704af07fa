# Copyright © 2026 MLX Contributors

"""Secrets by which data is loaded: never written, and never shown."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_NAMES = re.compile(
    r"(^|_|-)(token|auth(orization)?|pass(word|wd|phrase)?|pwd|secret\w*|credentials?|cookies?|"
    r"(api|access|private|account|sas|session)?_?key(_id)?)($|_|-)",
    re.IGNORECASE,
)
# Whatever they hold is for somebody's account.
_WHOLE = ("storage_options", "download_config", "headers")
_URL = re.compile(r"(\w://)[^/@\s]+(@)|(\w://[^?\s]*\?)[^\s'\"]+()")


def without_secrets(value: Any, name: str = "") -> tuple[Any, dict[str, Any]]:
    """A copy of what names data without secrets, and these by their names."""
    found: dict[str, Any] = {}
    if isinstance(value, Mapping):
        kept = {}
        for key, child in value.items():
            is_secret = name and (key in _WHOLE or _NAMES.search(str(key)))
            if is_secret and child not in (None, True, False):
                found[str(key)] = child
                continue
            kept[key], more = without_secrets(child, str(key))
            found |= more
        return kept, found
    if isinstance(value, (list, tuple)):
        kept_items = []
        for child in value:
            item, more = without_secrets(child, name)
            kept_items.append(item)
            found |= more
        return kept_items, found
    if isinstance(value, str):
        shown = _URL.sub(r"\1\3***\2\4", value)
        return shown, {name: value} if shown != value else {}
    return value, {}


def hide_values(text: str, given: Any) -> str:
    """A text in which the secrets of what was given can't be read."""
    for secret in _texts([*without_secrets({"config": given})[1].values()]):
        text = text.replace(secret, "***") if len(secret) > 3 else text
    return _URL.sub(r"\1\3***\2\4", text)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, (list, tuple)):
        for child in value:
            yield from _texts(child)
    elif isinstance(value, str):
        yield value
