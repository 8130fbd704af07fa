# Copyright © 2026 MLX Contributors

"""A message as mlx_lm.server hands it to the chat template, whatever a row has."""

import json
from collections.abc import Mapping
from typing import Any

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
ROLES |= {"human": "user"} | dict.fromkeys(("observation", "function"), "tool")
_ASSISTANTS = ("gpt", "chatgpt", "bard", "bing", "model", "bot", "ai", "function_call")
ROLES |= dict.fromkeys(_ASSISTANTS, "assistant")


# An answer is what the assistant writes.
_OTHERS = ("user", "system", "developer", "tool")


_LARGEST = 1e30
# Of a row: tokenizing takes some 150 bytes for each, and models read fewer at a time.
MOST_CHARACTERS = 2_000_000


class RowFault(ValueError):
    """A row that can't be used."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        # It is printed, whatever letters a row brings along.
        self.detail = "".join(
            letter if letter.isprintable() else ascii(letter)[1:-1]
            for letter in " ".join(detail.split())[:120]
        )


def is_number(value: Any) -> bool:
    """Whether a value is a number that float32 holds."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    # False for NaN as well.
    return is_real and abs(value) <= _LARGEST


def check_text(value: Any, name: str) -> str:
    """Return a text as it is, if it is one that a tokenizer takes."""
    if value is None:
        raise RowFault("value is None", name)
    if isinstance(value, float) and value != value:
        raise RowFault("value is NaN", name)
    if not isinstance(value, str):
        raise RowFault("wrong type", f"{name} is {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as e:
            raise RowFault("invalid Unicode", name) from e
    return value


def is_answer(message: dict[str, Any]) -> bool:
    """Whether the assistant wrote a message."""
    return message["role"] not in _OTHERS


def clean_message(message: Any, name: str) -> dict[str, Any]:
    """Check a message: text as its content, arguments as objects, known roles."""
    if not isinstance(message, Mapping):
        raise RowFault("wrong type", f"a message of {name} is not an object")
    message = without_nulls(message)
    if "role" not in message and "from" in message:
        role = ROLES.get(str(message["from"]).strip().lower())
        if role is None:
            raise RowFault("unknown role", f"{message['from']} in {name}")
        return {"role": role, "content": check_text(message.get("value"), name)}
    role = check_text(message.get("role"), f"the role of a message of {name}")
    # The template has a say in others.
    message["role"] = ROLES.get(role.strip().lower(), role)
    content = message.get("content")
    if isinstance(content, list):
        content = _join(content, name)
    if message.get("tool_calls"):
        message["tool_calls"] = _parse_arguments(message["tool_calls"], name)
        content = content or ""
    message["content"] = check_text(content, f"the content of a message of {name}")
    return message


def without_nulls(value: Any) -> Any:
    """Drop the fields of objects that are null: an Arrow table gives all of them to
    every object."""
    if isinstance(value, Mapping):
        fields = value.items()
        return {
            k: v if type(v) is str else without_nulls(v)
            for k, v in fields
            if v is not None
        }
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _join(parts: list, name: str) -> str:
    for part in parts:
        part = part if isinstance(part, Mapping) else {"type": part}
        kind = part.get("type", "text")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowFault("content is not text", f"a part of {name} is {kind!r}")
    return "".join(part["text"] for part in parts)


def _parse_arguments(calls: Any, name: str) -> Any:
    """Make objects of arguments that are JSON text, as OpenAI has them."""
    if not isinstance(calls, list):
        raise RowFault("wrong type", f"tool_calls of {name} is no list")
    try:
        return [_parse_call(call) for call in calls]
    except (ValueError, RecursionError) as e:
        raise RowFault("tool arguments are not JSON", f"{name}: {e}") from e


def _parse_call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _parse_call(call["function"])}
    arguments = call.get("arguments")
    if not arguments or not isinstance(arguments, str):
        return call
    return {**call, "arguments": json.loads(arguments)}
