# Copyright © 2026 MLX Contributors

"""Texts and chat messages as preference rows hold them, checked and cleaned."""

import re
from collections.abc import Mapping
from typing import Any

from .content import ROLES, RowFault, check_text, clean_message

Messages = list[dict[str, Any]]
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


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
    return [clean_message(message, name) for message in value]


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
    return not answer[-1]["content"].strip() and not answer[-1].get("tool_calls")


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
        role, content = ROLES[speaker.lower()], content.strip()
        if messages and messages[-1]["role"] == role:
            content = f"{messages.pop()['content']}\n\n{content}".strip()
        messages.append({"role": role, "content": content})
    return messages
