# Copyright © 2026 MLX Contributors

"""Where the turns of others begin and end in an answer of several."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from os.path import commonprefix

from .content import RowFault, is_answer
from .render import BORDERS, ONE_TURN, UNCLEAR

# No template changes or looks into it.
_TURN = "90417263558"


def _borders(call: Callable, prompt: list, answer: list, whole: str) -> list[int]:
    found: list[int] = []
    others: list[list[str]] = []
    full = call(prompt + answer)
    for i, (turn, following) in enumerate(pairwise(answer), 1):
        if is_answer(turn) != is_answer(following):
            found.append(_border(call, prompt, answer, i, full))
            others.append([])
        if not is_answer(following):
            others[-1].append(following["content"].strip())
    for first, end, texts in zip(found[::2], found[1::2], others[::2]):
        inside = full[first:end]
        is_clear = all(text in inside or text not in full for text in texts)
        if not (inside and is_clear and whole.endswith(full[first:])):
            raise RowFault(UNCLEAR, ONE_TURN)
    return [len(whole) - len(full) + at for at in found]


def _border(call: Callable, prompt: list, answer: list, size: int, full: str) -> int:
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
    raise RowFault(UNCLEAR, ONE_TURN)


BORDERS.append(_borders)
