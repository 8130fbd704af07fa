# Copyright © 2026 MLX Contributors

"""What a setting is. Each is declared once, by the room that owns it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A setting of the command: what a user may write, and who looks at it."""

    name: str
    default: Any
    help: str
    kind: type | None = None  # its type, where the default does not tell
    choices: Sequence[str] = ()
    several: bool = False  # YAML may hold a list of them
    off: bool = False  # false switches it off
    least: float | None = None
    all: bool = False  # -1 stands for all of them
    flag: bool = True  # whether the command line has it, too
    short: str | None = None
    metavar: str | None = None
    nargs: str | None = None
    read: Callable[[str], Any] | None = None  # words of the command line to a value
    # What may change when a run goes on: "free", "same" unless it is asked for, or
    # "shape", which never can, since what was saved has it.
    resume: str = "same"
    tested: bool = False  # decides the numbers of a finished run's test
    compared: bool = False  # runs that are compared must agree in it
    per_dataset: bool = False  # may stand in an entry of hf_dataset

    @property
    def type(self) -> type | None:
        """The type of its values, None where its own checks look at them."""
        return type(self.default) if self.default is not None else self.kind


def setting(default: Any, help: str, **marks: Any) -> Any:
    """A field of a dataclass whose fields are settings."""
    return field(default=default, metadata={"help": help, **marks})


def declared(owner: type) -> list[Setting]:
    """The settings that a dataclass declares: its fields that have a help."""
    return [
        Setting(**{"name": f.name, "default": f.default, **f.metadata})
        for f in fields(owner)
        if "help" in f.metadata
    ]
