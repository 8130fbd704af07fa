# Copyright © 2026 MLX Contributors

"""Files that are written completely or not at all, and where caches live."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def replace_file(path: str | Path, write: Callable[[str], Any]) -> None:
    """
    Write a file so that a reader, or a crash, meets the old or the new one.

    Written beside it, synced to the disk and renamed.

    Args:
        path (str or Path): The file to make or to replace.
        write (Callable): Writes the content to the path that it is given, which
            has the same suffix.

    Raises:
        OSError: If the disk is full or the folder can't be written; the old file
            stays.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "note.txt"
        ...     replace_file(path, lambda name: Path(name).write_text("hello"))
        ...     path.read_text(), len(list(Path(folder).iterdir()))
        ('hello', 1)
    """
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
    """
    Say in one line what could not be written, and what to do.

    Args:
        path (str or Path): The file of a run that is written meanwhile.

    Raises:
        OSError: Instead of MLX's errors, which name no file, and the system's.

    Example:
        >>> with writing("adapters/metrics.jsonl"):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        ...
        OSError: Can't write adapters/metrics.jsonl: No space left on device. If the \
disk is full, make room; a run goes on with --resume.
    """
    try:
        yield
    except (OSError, RuntimeError) as e:
        reason = getattr(e, "strerror", None) or str(e).rstrip(".")
        raise OSError(
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
    """
    Check that a folder can be made and written, without making it.

    Args:
        folder (str or Path): The folder; it may be missing, and its parents too.
        name (str): The setting that names it, for the message.

    Raises:
        ValueError: If it is a file, below one, or without permission.

    Example:
        >>> check_writable(__file__, "adapter_path")
        Traceback (most recent call last):
        ...
        ValueError: adapter_path ...atomic_files.py can't be written: ... is no \
folder. Choose another folder.
    """
    whole = Path(folder).absolute()
    there = next(p for p in (whole, *whole.parents) if os.path.lexists(p))
    reason = "is no folder" if not there.is_dir() else "is read-only or not yours"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{name} {folder} can't be written: {there} {reason}. Choose another "
            "folder."
        )


def user_cache_folder(name: str) -> Path:
    """
    The folder for what can be computed again, as the system's custom has it.

    Args:
        name (str): What is kept there, for example ``"references"``.

    Returns:
        Path: ``$XDG_CACHE_HOME/mlx_lm/NAME`` if that is set, else below
        ``~/Library/Caches`` on macOS and ``~/.cache`` elsewhere.

    Example:
        >>> user_cache_folder("references").name
        'references'
    """
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "mlx_lm" / name
    caches = "Library/Caches" if sys.platform == "darwin" else ".cache"
    return Path.home() / caches / "mlx_lm" / name


def remove_leftovers(folder: str | Path) -> None:
    """
    Delete the temporary files of processes that were killed while they wrote.

    Args:
        folder (str or Path): Where ``replace_file`` wrote; it may be missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     left = Path(folder) / ".state.4194999.tmp.safetensors"
        ...     left.write_text("half")
        ...     remove_leftovers(folder)
        ...     left.exists()
        4
        False
    """
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
