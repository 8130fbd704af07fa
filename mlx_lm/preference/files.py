# Copyright © 2026 MLX Contributors

"""Files that are written completely or not at all, and where caches live."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError


def replace_file(path: str | Path, write: Callable[[str], Any]) -> None:
    """Write a file so that a reader, or a crash, meets the old or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(str(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Say in one line what could not be written, and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        reason = getattr(e, "strerror", None) or str(e).rstrip(".")
        raise InputError(
            f"Can't write {path}: {reason}. If the disk is full, make room; a run goes "
            "on with --resume."
        ) from e


def _sync_folder(folder):
    # Not every file system lets a folder be opened.
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def check_writable(folder: str | Path, name: str) -> None:
    """Check that a folder can be made and written, without making it."""
    whole = Path(folder).absolute()
    there = next(p for p in (whole, *whole.parents) if os.path.lexists(p))
    reason = "is no folder" if not there.is_dir() else "is read-only or not yours"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"{name} {folder} can't be written: {there} {reason}. Choose another "
            "folder."
        )


def user_cache_folder(name: str) -> Path:
    """The folder for what can be computed again, as the system's custom has it."""
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "mlx_lm" / name
    caches = "Library/Caches" if sys.platform == "darwin" else ".cache"
    return Path.home() / caches / "mlx_lm" / name


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files of processes that were killed while they wrote."""
    for path in Path(folder).glob(".*.tmp*"):
        parts = path.name.split(".")
        owner = parts[parts.index("tmp") - 1] if "tmp" in parts else ""
        if owner.isdigit() and not _is_alive(int(owner)):
            path.unlink(missing_ok=True)


def _is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    # A number that was given again can't be told apart: its file stays.
    return process != os.getpid()
