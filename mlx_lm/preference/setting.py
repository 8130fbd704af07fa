# Copyright © 2026 MLX Contributors

"""What a setting is. Each is declared once, by the room that owns it."""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from operator import ge, gt, le, lt
from typing import Any

from .errors import InputError

KINDS: dict[type | None, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (Integral,)),
    float: ("a number", (Real,)),
    str: ("text", (str,)),
    dict: ("a mapping", (dict,)),
}
LARGEST = 10**15
# What Python makes of bytes that it can't read.
_NO_TEXT = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"[-+]?[\d.]+([eE][-+]?\d+)?")


def check_type(name: str, value: Any, kind: type | None) -> None:
    """Refuse a value of another kind, which a YAML file may hold."""
    what, types = KINDS.get(kind, ("", (object,)))
    if isinstance(value, bool) and kind in (int, float) or not isinstance(value, types):
        quoted = isinstance(value, str) and _NUMBER.fullmatch(value.strip())
        hint = ": in YAML without quotes" if quoted else ""
        raise InputError(f"{name} must be {what}, got {value!r}{hint}.")


def check_usable(name: str, value: Any) -> None:
    """Refuse numbers that stand for none or are larger than anything counted, and
    texts that are none, which the system or MLX would refuse late as a path."""
    if isinstance(value, dict):
        for key, child in value.items():
            check_usable(f"{name}.{key}", child)
    for child in value if isinstance(value, list) else ():
        check_usable(name, child)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, got {value!r}.")
    if isinstance(value, str) and ("\0" in value or _NO_TEXT.search(value)):
        raise InputError(
            f"{name} is no text in this locale, got {value!r}: rename it, or set "
            "PYTHONUTF8=1."
        )
    if isinstance(value, int) and abs(value) > LARGEST:
        raise InputError(f"{name} must be at most {LARGEST:,}, got {value!r}.")


@dataclass(frozen=True)
class Setting:
    """A setting of the command: what a user may write, and who looks at it."""

    name: str
    default: Any
    help: str
    kind: type | None = None  # its type, where the default does not tell
    choices: Sequence[Any] = ()
    several: bool = False  # YAML may hold a list of them
    off: bool = False  # false switches it off
    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None
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
    # Each rank may have its own: a place on its disk, or what the first alone does.
    per_rank: bool = False
    # There only with a feature, a loss or a shape of rows that reads it.
    brought: bool = False
    outside: bool = False  # reads, writes or sends outside of the adapter folder

    @property
    def type(self) -> type | None:
        """The type of its values, None where its own checks look at them."""
        return type(self.default) if self.default is not None else self.kind

    @property
    def range(self) -> str:
        """What a number must be, empty if it may be any."""
        found = [f"{k} {x:,}" for k, x, _ in self._bounds() if x is not None]
        return "-1 (all) or " * self.all + " and ".join(found)

    def _bounds(self):
        yield "above", self.above, gt
        yield "at least", self.least, ge
        yield "below", self.below, lt
        yield "at most", self.most, le

    def check_type(self, value: Any) -> None:
        """Refuse a value of another type; None is no value."""
        if value is None or self.several and isinstance(value, list):
            return
        if not self.off:
            check_type(self.name, value, self.type)
        elif value is not False and not isinstance(value, str):
            raise InputError(f"{self.name} must be a folder or false, got {value!r}.")

    def check(self, value: Any) -> None:
        """Refuse a value of another type, out of range, or not among the choices."""
        self.check_type(value)
        check_usable(self.name, value)
        if value is None or isinstance(value, list):
            return
        if self.choices and value not in self.choices:
            known = ", ".join(map(str, self.choices))
            raise InputError(f"Unknown {self.name} {value!r}, choose from {known}.")
        if self.range and not self._holds(value):
            raise InputError(f"{self.name} must be {self.range}, got {value!r}.")

    def _holds(self, value):
        if self.all and value == -1:
            return True
        fits = (x is None or holds(value, x) for _, x, holds in self._bounds())
        return all(fits)


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


def add_flag(parser: Any, one: Setting) -> None:
    """Add what the command line has of a setting to a parser, or a group of one."""
    flag, help = one.name.replace("_", "-"), one.help.replace("%", "%%")
    if isinstance(one.default, bool):
        action, prefix = "store_true", ""
        if one.default:
            action, prefix, help = "store_false", "no-", f"Don't: {help}"
        parser.add_argument(
            f"--{prefix}{flag}", dest=one.name, action=action, default=None, help=help
        )
        return
    if one.kind is bool:
        switch = argparse.BooleanOptionalAction
        parser.add_argument(f"--{flag}", action=switch, default=None, help=help)
        return
    if one.default not in (None, "") and "Default:" not in help:
        help += f" Default: {one.default}."
    options: dict[str, Any] = {"type": one.read or one.type or str, "help": help}
    options |= {k: v for k in ("metavar", "nargs") if (v := getattr(one, k))}
    if one.choices:
        options["choices"] = [*one.choices]
    parser.add_argument(*filter(None, [one.short]), f"--{flag}", **options)
    if one.off:
        parser.add_argument(
            f"--no-{flag}",
            dest=one.name,
            action="store_false",
            default=None,
            help=f"No {one.name.replace('_', ' ')} on disk.",
        )
