# Copyright © 2026 MLX Contributors

"""Files that are written completely or not at all, and where caches live."""

import os
import sys
from collections.abc import Callable
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
