# Copyright © 2026 MLX Contributors

"""Answers of templates that write the prompt otherwise once an answer follows."""

from collections.abc import Callable
from functools import partial
from typing import Any

from .content import RowFault
from .render import FOUND, UNCLEAR, WAY_OUT, ChatRenderer

NO_THOUGHT = "the answer closes no thought"
# No template changes or looks into these.
_TURN, _ANSWER = "90417263558", "81736254409"


def _as_text(
    raw: Any, call: Callable, prompt: list, answers: list, ids: list[int]
) -> list[str]:
    """A prompt, and the prompt with each answer, of a renderer that makes ids."""
    start = call(prompt, add_generation_prompt=True)
    if raw.encode(start, add_special_tokens=False) != ids:
        raise RowFault(UNCLEAR, WAY_OUT)
    return [start, *(call(prompt + answer) for answer in answers)]


def _mended(
    renderer: ChatRenderer, call: Callable, prompt: list, answers: list, parts: list
) -> list:
    """Put the prompt of generation before what is written for each answer."""
    if renderer.makes_ids:
        call = partial(call, tokenize=False)
        parts = _as_text(renderer.raw, call, prompt, answers, parts[0])
    start, *wholes = parts
    return [start] + [
        (
            whole
            if whole.startswith(start)
            else start + _find(renderer.thought, call, prompt, answer, start, whole)
        )
        for answer, whole in zip(answers, wholes)
    ]


def _find(
    thought: tuple[str, str],
    call: Callable,
    prompt: list,
    answer: list,
    start: str,
    whole: str,
) -> str:
    """What the template writes for an answer, found behind the last turn."""
    text = prompt[-1]["content"] + _TURN
    marked = [*prompt[:-1], {**prompt[-1], "content": text}]
    ends = call(marked, add_generation_prompt=True), call(marked + answer)
    given, written = (end.rpartition(_TURN)[2] for end in ends)
    is_clear = all(_TURN in end for end in ends) and _TURN not in whole
    if not (is_clear and start.endswith(given) and whole.endswith(written)):
        raise RowFault(UNCLEAR, WAY_OUT)
    if written.startswith(given):
        return written[len(given) :]
    probe = call([*marked, {"role": "assistant", "content": _ANSWER}])
    head, found, tail = probe.rpartition(_TURN)[2].partition(_ANSWER)
    if found and given.rfind(thought[0]) > given.rfind(thought[1]):
        return _after_thought(thought, given, written, tail, answer)
    if not found or not written.startswith(head):
        raise RowFault(UNCLEAR, WAY_OUT)
    written = written[len(head) :]
    if given.startswith(head):
        # Generation is given more, such as an empty thought.
        return written
    # Or the prompt has more between its last turn and the answer.
    for size in range(len(head.rstrip()) or len(head), len(head) + 1)[::-1]:
        if given.endswith(head[:size]) and head.strip():
            return head[size:] + written
    raise RowFault(UNCLEAR, WAY_OUT)


def _after_thought(
    thought: tuple[str, str], given: str, written: str, tail: str, answer: list
) -> str:
    """What follows a thought that the prompt has opened."""
    opens, closes = thought
    before, _, space = given.rpartition(opens)
    if not written.startswith(before):
        raise RowFault(UNCLEAR, WAY_OUT)
    written = written[len(before) :]
    if closes in written:
        return written.removeprefix(opens).removeprefix(space)
    # Many templates leave thoughts out of what was said.
    content = answer[-1]["content"].lstrip()
    said = content.rpartition(closes)[2]
    if len(answer) > 1 or closes not in content:
        raise RowFault(NO_THOUGHT, f"begin it with {opens} and {closes}")
    if written.removesuffix(tail).strip() != said.strip():
        raise RowFault(UNCLEAR, WAY_OUT)
    return content.removeprefix(opens).removeprefix(space) + tail


FOUND.append(_mended)
