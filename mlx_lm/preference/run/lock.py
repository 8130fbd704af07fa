# Copyright © 2026 MLX Contributors

"""One run at a time in a folder."""

import errno
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import HOST, is_alive, open_plain, writing

NAME = ".lock"
_HELD_ELSEWHERE = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)
# Descriptors by the folders' real paths, None before a folder is there. The system
# drops a dead process's locks.
_held: dict[str, int | None] = {}
# The folders as they were named, the outermost first, and the settings that did.
_named: dict[str, tuple[str, str]] = {}


@contextmanager
def folder_kept(folder: str | Path, setting: str = "--adapter-path") -> Iterator[None]:
    """Keep a folder, or as soon as it is made, to what happens inside."""
    key = os.path.realpath(folder)
    if key in _held:
        yield
        return
    _held[key], _named[key] = None, (str(folder), setting)
    try:
        if os.path.isdir(folder):
            keep_folder(folder)
        yield
    finally:
        descriptor, _ = _held.pop(key), _named.pop(key)
        if descriptor is not None:
            (Path(key) / NAME).unlink(missing_ok=True)
            os.close(descriptor)


def resumed_folder(folder: str | Path) -> str:
    """What to resume for a run in a folder: rounds for one of theirs, which lies inside."""
    run = Path(os.path.realpath(folder))
    outer = (name for key, (name, _) in _named.items() if run.is_relative_to(key))
    return next(outer, str(folder))


def keep_folder(folder: str | Path) -> None:
    """Keep other runs out of a folder, inside of ``folder_kept``."""
    key = os.path.realpath(folder)
    while _held.get(key, 0) is None:
        descriptor = _open(Path(folder) / NAME)
        try:
            _lock(descriptor, folder)
            # The last owner deleted it meanwhile: then another one is there.
            if _is_there(descriptor, Path(folder) / NAME):
                _held[key] = os.dup(descriptor)
        finally:
            os.close(descriptor)


def _open(path):
    with writing(path):
        try:
            return open_plain(path, os.O_RDWR | os.O_CREAT)
        except PermissionError:
            # In a shared folder it may be somebody else's.
            return open_plain(path, os.O_RDONLY)


def _is_there(descriptor, path):
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def _lock(descriptor, folder):
    owner = _owner(descriptor)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, ImportError) as e:
        is_held = getattr(e, "errno", None) in _HELD_ELSEWHERE
        # Not every file system has locks: what is written there must do.
        is_here = owner.get("host") == HOST
        if is_held or owner and not (is_here and not is_alive(owner.get("process"))):
            who = ""
            if owner:
                who = f", process {owner.get('process')} on {owner.get('name')}"
            hint = "" if is_held or is_here else f" If it is dead, delete {NAME} there."
            _, setting = _named[os.path.realpath(folder)]
            raise InputError(
                f"{folder} is in use by another run{who}: wait until it ends, or give "
                f"this one a folder of its own with {setting}.{hint}"
            ) from e
    me = {"process": os.getpid(), "name": platform.node(), "host": HOST}
    # A disk that is full, or somebody else's file: the lock holds all the same.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)


def _owner(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        process, name = max(int(found["process"]), 1), str(found["name"])
        return {"process": process, "name": ascii(name)[1:-1], "host": found["host"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
