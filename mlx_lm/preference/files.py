# Copyright © 2026 MLX Contributors

"""Files that are written completely or not at all, and where caches live."""

import errno
import json
import math
import os
import platform
import re
import stat
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import InputError


# A home may be shared: a number of a process says nothing on another host.
def _host() -> str:
    """A name for what gives processes their numbers: a host, or a container in it."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return f"{zlib.crc32(' '.join(parts).encode()):08x}"


HOST = _host()
DAY = 24 * 3600


def replace_file(path: str | Path, write: Callable[[str], Any]) -> None:
    """Write a file so that a reader, or a crash, meets the old or the new one."""
    path = Path(path)
    # As root, even a device would be replaced.
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "It is no regular file")
    temporary = path.with_name(f".{path.stem}.{HOST}-{os.getpid()}.tmp{path.suffix}")
    try:
        # What lies there is not written to: a link may lead anywhere.
        temporary.unlink(missing_ok=True)
        os.close(open_plain(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        write(str(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def open_plain(path: str | Path, flags: int) -> int:
    """Open a file of a run: no link is followed, and no FIFO waited for."""
    guards = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | guards, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "It is no regular file")
    return descriptor


def check_plain(
    path: str | Path, is_kind: Callable[[int], bool] = stat.S_ISREG
) -> None:
    """Check that what a run adds to is its own file or folder, if it is there."""
    if os.path.lexists(path) and not is_kind(os.lstat(path).st_mode):
        what = "folder" if is_kind is stat.S_ISDIR else "file"
        raise InputError(
            f"{path} is no {what} of its own but leads elsewhere, where nothing is "
            "written: remove it, or choose another folder."
        )


def append_text(path: str | Path, text: str) -> None:
    """Add to a file, and wait until it is on the disk."""
    with writing(path), open(path, "a", encoding="utf-8", opener=open_plain) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def plain_size(path: str | Path) -> int:
    """The bytes of a file that ends: a FIFO or a device is none."""
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "It is no regular file")
    return found.st_size


def read_plain(path: str | Path, most: int | None = None) -> bytes:
    """Read a file that ends; a large one is refused."""
    size = plain_size(path)
    if most is not None and size > most:
        raise OSError(errno.EFBIG, f"It has more than {most / 1e6:,.0f} MB")
    return Path(path).read_bytes()


def write_text(path: str | Path, text: str) -> None:
    """Write a text, completely or not at all."""
    with writing(path):
        replace_file(path, lambda name: Path(name).write_text(text, "utf-8"))


def write_json(path: str | Path, content: Any, indent: int | None = None) -> None:
    """Write a JSON file, completely or not at all."""
    write_text(path, json_text(content, indent) + "\n")


def json_text(content: Any, indent: int | None = None) -> str:
    """JSON as its standard has it: null for a number that is not finite."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content):
    if isinstance(content, dict):
        return {k: _finite(x) for k, x in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(x) for x in content]
    bad = isinstance(content, float) and not math.isfinite(content)
    return None if bad else content


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Say in one line what could not be written, and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        reason = getattr(e, "strerror", None) or str(e).rstrip(".")
        raise InputError(
            f"Can't write {path}: {reason}. If the disk is full, make room; then the "
            "same command goes on, and a run with --resume."
        ) from e


def _sync_folder(folder):
    # Not every file system lets a folder be opened.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
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


def drop_oldest(files: Iterable[Path], keep: Path, limit: int) -> None:
    """Delete the files unused for longest until all are within a limit in bytes."""
    found = []
    for path in files:
        # Another run may delete it meanwhile.
        with suppress(OSError):
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total > limit and path != keep:
            path.unlink(missing_ok=True)
            total -= size


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files of processes that were killed while they wrote."""
    for path in Path(folder).glob(".*.tmp*"):
        # Those of older versions name no host.
        owner = re.search(r"\.(?:([0-9a-f]{8})-)?(\d+)\.tmp", path.name)
        if owner and (
            _is_old(path) or owner[1] == HOST and not is_alive(int(owner[2]))
        ):
            path.unlink(missing_ok=True)


def _is_old(path):
    # No file takes so long to write; its time may be another clock's.
    try:
        return time.time() - path.stat().st_mtime > DAY
    except OSError:
        return False


def is_alive(process: int) -> bool:
    """Tell whether another process of this host has a number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    # This process is writing nothing now: the file is of one that had its number.
    return process != os.getpid()
