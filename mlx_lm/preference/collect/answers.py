# Copyright © 2026 MLX Contributors

"""Answers that a model gave to prompts: ``answers.jsonl``, a line for each prompt."""

import gc
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..digest import digest
from ..errors import InputError
from ..files import json_text, open_plain, read_plain, writing

ANSWERS = "answers.jsonl"
STOP, LENGTH = "stop", "length"
Messages = list[dict[str, Any]]
# A line's name: the round and the prompt's id, as labels have it.
Key = tuple[int, str]


@dataclass(frozen=True)
class Response:
    """One answer: its text, all tokens with the one that ended it, and why it ended."""

    text: str
    tokens: list[int]
    finish: str
    # Summed over the tokens at temperature 1, in nats.
    logps: float

    @property
    def finished(self) -> bool:
        """Whether the model ended it, not the limit of tokens."""
        return self.finish == STOP


@dataclass(frozen=True)
class Answers:
    """A line of the file: a prompt and its responses, of which no two are equal."""

    id: str
    prompt: str | Messages
    responses: list[Response]
    round: int = 0
    # The other columns of the prompt's row, for judges.
    row: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    seed: int = 0
    # How many were sampled, equal ones too.
    sampled: int = 0

    @property
    def key(self) -> Key:
        """What labels refer to."""
        return self.round, self.id

    @property
    def mark(self) -> str:
        """Tells these responses from others to the same prompt."""
        return digest([one.text for one in self.responses], size=4)


def prompt_id(prompt: str | Messages) -> str:
    """A prompt's name where its row has none."""
    return digest(prompt, size=8)


def append_answers(folder: str | Path, answers: Answers) -> None:
    """Add a line, which is on the disk afterwards."""
    append_line(Path(folder) / ANSWERS, asdict(answers))


def append_line(path: str | Path, row: Mapping[str, Any]) -> None:
    """Add a line of JSON, without what is None, behind the last whole line."""
    text = json_text({k: v for k, v in row.items() if v is not None}) + "\n"
    with writing(path):
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        with open(open_plain(path, flags), "r+b") as file:
            _cut_torn(file)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def _cut_torn(file):
    """Drop what a killed process, or a full disk, left of a line."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
    start = file.seek(0)
    for line in file:
        if line.endswith(b"\n"):
            start += len(line)
            continue
        # An editor may leave out the last end of a line.
        try:
            json.loads(line)
        except ValueError:
            file.truncate(start)
        else:
            file.write(b"\n")


def read_answers(folder: str | Path, round: int | None = None) -> list[Answers]:
    """The answers in a folder, of all rounds or of one, in the order of the file."""
    path = Path(folder) / ANSWERS
    if not path.exists():
        raise InputError(
            f"{folder} has no {ANSWERS}: generate answers first, with --prompts."
        )
    with _uncollected():
        found = [_answers(line, f"{path}:{i}") for i, line in read_records(path)]
    found = [one for one in found if round is None or one.round == round]
    keys: set[Key] = set()
    for one in found:
        if one.key in keys:
            raise InputError(
                f"{path} has prompt {one.id!r} of round {one.round} twice: remove one "
                "of its lines."
            )
        keys.add(one.key)
    return found


def answers_so_far(folder: str | Path, round: int | None = None) -> list[Answers]:
    """The answers in a folder that may have none yet."""
    return read_answers(folder, round) if (Path(folder) / ANSWERS).exists() else []


@contextmanager
def _uncollected() -> Iterator[None]:
    """Look for no cycles among new objects, of which lines make many and no cycle."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_records(path: str | Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Yield each line's number and object; an end that was cut is left out."""
    try:
        lines = read_plain(path).split(b"\n")
    except OSError as e:
        raise InputError(f"Can't read {path}: {e.strerror or e}.") from e
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as e:
            # What has no end yet is being written, or its writer was killed.
            if number == len(lines):
                return
            raise InputError(
                f"{path}:{number} is damaged ({e}): remove the line, or copy the file "
                "again."
            ) from e
        if not isinstance(found, dict):
            raise InputError(f"{path}:{number} is no JSON object: remove the line.")
        yield number, found


# What a line's fields hold.
_KINDS = {"id": str, "round": int, "row": dict, "sampling": dict, "model": str}
_KINDS |= {"seed": int, "sampled": int}
_RESPONSE_KINDS: dict[str, Any] = {"text": str, "tokens": list, "finish": str}
_RESPONSE_KINDS |= {"logps": (int, float)}


def _is_prompt(prompt):
    return isinstance(prompt, str) or (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(x, dict) and isinstance(x.get("role"), str) for x in prompt)
    )


def _answers(line: Mapping[str, Any], place: str) -> Answers:
    try:
        responses = [Response(**one) for one in line["responses"]]
        found = Answers(**{**line, "responses": responses})
        for name, kind in _KINDS.items():
            if not isinstance(getattr(found, name), kind):
                raise TypeError(f"{name} has the wrong type")
        for one in responses:
            for name, one_kind in _RESPONSE_KINDS.items():
                if not isinstance(getattr(one, name), one_kind):
                    raise TypeError(f"{name} of a response has the wrong type")
            if not {*map(type, one.tokens)} <= {int}:
                raise TypeError("tokens of a response must be whole numbers")
        if not _is_prompt(found.prompt):
            raise TypeError("the prompt is neither a text nor messages")
    except (KeyError, TypeError) as e:
        raise InputError(f"{place} is no line of answers: {e}.") from e
    return found
