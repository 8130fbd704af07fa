# Copyright © 2026 MLX Contributors

"""The command line and the YAML file."""

import argparse
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError
from ..files import read_plain
from ..setting import add_flag
from .table import SETTINGS

# A file of settings has a hundred lines; what it refers to twice counts twice.
MOST_BYTES = 10**6
MOST_NODES = 10**5


def build_parser() -> argparse.ArgumentParser:
    """The command line; all values default to None, so that YAML can set each."""
    # --resume-adapter-file must not answer to a shorter name.
    parser = argparse.ArgumentParser(
        description="Preference fine-tuning with DPO, for LoRA, DoRA or full.",
        allow_abbrev=False,
    )
    parser.error = _refuse_flags  # type: ignore[method-assign]
    for one in SETTINGS.values():
        if one.flag:
            add_flag(parser, one)
    return parser


def _refuse_flags(message):
    # In one line, where argparse prints all flags.
    raise InputError(f"{message}. See mlx_lm.dpo --help.")


def _advice(error):
    if "twice" in str(error):
        return "Leave one of them out."
    return "Text with special characters needs quotes."


def _load_once(text, loader):
    """Load YAML in which no key stands twice, and which does not grow without end."""
    waiting, count = [yaml.compose(text, loader)], 0
    while waiting:
        node, count = waiting.pop(), count + 1
        if count > MOST_NODES:
            raise ValueError(
                f"it has more than {MOST_NODES:,} values, repeated ones too"
            )
        if isinstance(node, yaml.MappingNode):
            seen: set = set()
            for key, value in node.value:
                waiting.append(value)
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        what = f"{key.value!r} is there twice"
                        raise yaml.MarkedYAMLError(
                            problem=what, problem_mark=key.start_mark
                        )
                    seen.add(key.value)
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    return yaml.load(text, loader)


def read_config(path: str | Path, loader: Any) -> dict[str, Any]:
    """Read a YAML file of settings."""
    try:
        config = _load_once(read_plain(path, MOST_BYTES).decode("utf-8"), loader) or {}
    except OSError as e:
        raise InputError(f"Can't read the configuration {path}: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: invalid UTF-8. Save it as UTF-8.") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        raise InputError(
            f"{place}: {getattr(e, 'problem', None) or e}. {_advice(e)}"
        ) from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"Can't read the configuration {path}: {e}.") from e
    if not isinstance(config, dict):
        raise InputError(f"{path} must hold keys and values.")
    # YAML has dates of its own.
    return {k: v.isoformat() if isinstance(v, date) else v for k, v in config.items()}
