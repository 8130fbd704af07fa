# Copyright © 2026 MLX Contributors

"""Which turns of a row are its prompt, and which its answers."""

from typing import Any

from .content import RowFault, is_answer
from .messages import Messages

OTHER_PROMPT = "answer to another prompt"
HELD_ANSWER = "the prompt ended with an answer, which is left out there"


def same_turn(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two messages say the same, whatever else they hold."""
    calls = a.get("tool_calls") or None, b.get("tool_calls") or None
    texts = a["content"].strip(), b["content"].strip()
    return a["role"] == b["role"] and texts[0] == texts[1] and calls[0] == calls[1]


def _same(some: Messages, others: Messages) -> bool:
    return len(some) == len(others) and all(map(same_turn, some, others))


def shared_turns(chosen: Messages, rejected: Messages) -> int:
    """How many turns both answers begin with, each going on with one of its own."""
    size = min(len(chosen), len(rejected)) - 1
    count = 0
    while count < size and same_turn(chosen[count], rejected[count]):
        count += 1
    shared = count
    while count and not (is_answer(chosen[count]) and is_answer(rejected[count])):
        count -= 1
    # Where nobody answers, the row has another fault.
    return count or shared


def _overlap(prompt: Messages, answer: Messages) -> tuple[Messages, Messages]:
    """The prompt with what the answer knows of earlier turns, and the answer alone."""
    if is_answer(answer[0]) and not _same(prompt, answer[: len(prompt)]):
        return prompt, answer
    # The whole prompt, perhaps after turns that it lacks.
    for end in range(len(prompt), len(answer) + 1):
        if _same(prompt, answer[end - len(prompt) : end]):
            return answer[: end - len(prompt)] + prompt, answer[end:]
    for size in range(min(len(prompt), len(answer)), 0, -1):
        if _same(prompt[-size:], answer[:size]):
            return prompt, answer[size:]
    return prompt, answer


def split_turns(
    prompt: Messages, chosen: Messages, rejected: Messages
) -> tuple[Messages, Messages, Messages]:
    """Take what both answers repeat or share as the prompt, and leave the answers."""
    found = []
    answers = []
    for answer in (chosen, rejected):
        whole, rest = _overlap(prompt, answer)
        found.append(whole)
        answers.append(rest)
    longest = max(found, key=len)
    for whole in found:
        if len(whole) > len(prompt) and not _same(whole, longest):
            raise RowFault("chosen and rejected have other prompts")
    chosen, rejected = answers
    if longest and not is_answer(longest[-1]):
        for answer in answers:
            if answer and is_answer(answer[-1]) and not is_answer(answer[0]):
                role = answer[0]["role"]
                raise RowFault(OTHER_PROMPT, f"an answer begins with a {role} turn")
    if chosen and rejected:
        count = shared_turns(chosen, rejected)
        longest = longest + chosen[:count]
        chosen, rejected = chosen[count:], rejected[count:]
    return longest, chosen, rejected


def without_answer(
    prompt: Messages, chosen: Messages, rejected: Messages, must: bool
) -> Messages:
    """Leave the answer out that some conversations hold besides."""
    last = prompt[-1]
    if not is_answer(last):
        return prompt
    if same_turn(last, chosen[-1]) or same_turn(last, rejected[-1]):
        return prompt[:-1]
    if must:
        raise RowFault("the prompt ends with an answer, neither chosen nor rejected")
    return prompt


def are_conversations(prompt: str, shared: Messages) -> bool:
    """Whether turns that both answers share hold a prompt that is a text."""
    text = " ".join(prompt.split())
    turns = [" ".join(message["content"].split()) for message in shared]
    return text in turns or all(turn in text for turn in turns)
