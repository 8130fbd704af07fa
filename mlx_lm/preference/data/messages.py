# Copyright © 2026 MLX Contributors

"""Texts and chat messages as preference rows hold them, checked and cleaned."""

import re
from collections.abc import Mapping
from typing import Any

Messages = list[dict[str, Any]]
_ASSISTANTS = ("gpt", "chatgpt", "bard", "bing", "model", "assistant", "function_call")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "system": "system"}
_SHAREGPT_ROLES |= dict.fromkeys(_ASSISTANTS, "assistant")
_SHAREGPT_ROLES |= dict.fromkeys(("observation", "function", "tool"), "tool")
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


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


def as_messages(value: Any, name: str) -> Messages:
    """Make messages of a text (the assistant's), one message, or a list of them."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": check_text(value, name)}]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        check_text(value, name)
    if not value:
        raise RowFault("empty list of messages", name)
    return [_check_message(message, name) for message in value]


def _check_message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RowFault("wrong type", f"a message of {name} is not an object")
    if message.get("role") is None and "from" in message:
        role = _SHAREGPT_ROLES.get(str(message["from"]).lower())
        if role is None:
            raise RowFault("unknown role", str(message["from"]))
        return {"role": role, "content": check_text(message.get("value"), name)}
    check_text(message.get("role"), f"the role of a message of {name}")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise RowFault("content is not text", name)
            check_text(part["text"], name)
    elif content is not None or not message.get("tool_calls"):
        check_text(content, f"the content of a message of {name}")
    return dict(message)


def with_system(prompt: Messages, system: Any) -> Messages:
    """Put the text of a system column before messages that have no system turn."""
    if system is None or not check_text(system, "system").strip():
        return prompt
    if any(message["role"] == "system" for message in prompt):
        return prompt
    return [{"role": "system", "content": system}, *prompt]


def is_blank(answer: str | Messages) -> bool:
    """Tell whether an answer says nothing."""
    if isinstance(answer, str):
        return not answer.strip()
    if not answer:
        return True
    content = answer[-1].get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return not content.strip() and not answer[-1].get("tool_calls")


def split_shared_prefix(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Take the common start of two texts or two lists of messages as the prompt."""
    size = min(len(chosen), len(rejected))
    parting = next((i for i in range(size) if chosen[i] != rejected[i]), None)
    if parting is None:
        split = max(size - 1, 0)
    elif parting > 0 and chosen[parting - 1] == " ":
        split = parting - 1
    else:
        split = parting
    return chosen[:split], chosen[split:], rejected[split:]


def parse_transcript(text: str) -> Messages | None:
    """Make messages of a transcript with "Human:" and "Assistant:" turns."""
    head, *parts = _TURN.split(text.lstrip())
    if head or not parts or parts[0] != "Human":
        return None
    messages: Messages = []
    for speaker, content in zip(parts[::2], parts[1::2]):
        role, content = _SHAREGPT_ROLES[speaker.lower()], content.strip()
        if messages and messages[-1]["role"] == role:
            content = f"{messages.pop()['content']}\n\n{content}".strip()
        messages.append({"role": role, "content": content})
    return messages
