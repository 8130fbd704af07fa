# Copyright © 2026 MLX Contributors

"""The reference's log-probs of every pair, remembered in memory and on disk."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx
import numpy as np

from ...cli_ui import rprint
from ..files import replace_file

# Changes when keys or files are made in another way.
FORMAT = "mlx_lm.reference_log_probs.1"
MAX_FOLDER_BYTES = 2**30
KEY_BYTES = 16
ROW_BYTES = KEY_BYTES + 8
Entries = dict[bytes, tuple[float, float]]


def pair_key(
    prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]
) -> bytes:
    """Name a pair by its token ids."""
    parts = [np.asarray(ids, dtype="<i4").tobytes() for ids in (prompt, chosen)]
    parts.append(np.asarray(rejected, dtype="<i4").tobytes())
    lengths = np.array([len(part) for part in parts], dtype="<i8").tobytes()
    return hashlib.blake2b(lengths + b"".join(parts), digest_size=KEY_BYTES).digest()


def _encode(fingerprint, entries):
    """The bytes of a safetensors file, which follow from its content alone."""
    keys = b"".join(entries)
    logps = np.array(list(entries.values()), dtype="<f4").tobytes()
    metadata = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "checksum": hashlib.blake2b(keys + logps, digest_size=32).hexdigest(),
    }
    n, middle, end = len(entries), len(keys), len(keys) + len(logps)
    header = {
        "__metadata__": metadata,
        "keys": {"dtype": "U8", "shape": [n, 16], "data_offsets": [0, middle]},
        "logps": {"dtype": "F32", "shape": [n, 2], "data_offsets": [middle, end]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + keys + logps


def _decode(fingerprint, raw):
    """Read the bytes of a file; ValueError if one of them is not as written."""
    start = 8 + int.from_bytes(raw[:8], "little")
    n = (len(raw) - start) // ROW_BYTES
    if n <= 0:
        raise ValueError("no entries")
    middle = start + KEY_BYTES * n
    keys = (raw[i : i + KEY_BYTES] for i in range(start, middle, KEY_BYTES))
    logps = np.frombuffer(raw, dtype="<f4", count=2 * n, offset=middle).reshape(n, 2)
    entries = dict(zip(keys, map(tuple, logps.tolist()), strict=True))
    if _encode(fingerprint, entries) != raw:
        raise ValueError("damaged")
    return entries


@contextmanager
def _locked(folder):
    """Let one process at a time merge its numbers into a file."""
    with open(folder / ".lock", "w") as file:
        # Without locks two savers may lose numbers, which are computed again.
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _drop_oldest(folder, keep, limit):
    """Delete the files unused for longest until the folder is within its limit."""
    files = []
    for path in folder.glob("*.safetensors"):
        # The folder may hold files of somebody else.
        if re.fullmatch("[0-9a-f]{64}", path.stem):
            with suppress(OSError):
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total > limit and path != keep:
            path.unlink(missing_ok=True)
            total -= size


class ReferenceCache:
    """What a reference model says of every pair: computed once, found by later runs."""

    def __init__(self, folder: Path | None, fingerprint: str):
        self.fingerprint = fingerprint
        self.path = None if folder is None else Path(folder) / self._file_name
        #: Answers of ``lookup`` that were numbers, and numbers that were stored.
        self.hits, self.computed = 0, 0
        self._warned = False
        self._entries: Entries = self._read(self._warn)
        self._unsaved = False
        # Also what was read: another host may not see the folder.
        self._unshared: Entries = dict(self._entries)

    @property
    def _file_name(self):
        return f"{self.fingerprint}.safetensors"

    def __len__(self) -> int:
        return len(self._entries)

    def _warn(self, text):
        if not self._warned:
            rprint(f"[WARNING] {text}")
        self._warned = True

    def _read(self, warn):
        """What the file holds; nothing if it is damaged or not there."""
        if self.path is None or not self.path.exists():
            return {}
        again = "the reference's log-probs are computed again."
        try:
            entries = _decode(self.fingerprint, self.path.read_bytes())
        except ValueError:
            warn(f"{self.path} is damaged: {again}")
            return {}
        except OSError as e:
            warn(f"Can't read {self.path} ({e}): {again}")
            return {}
        # Its time says when it was last of use.
        with suppress(OSError):
            os.utime(self.path)
        return entries

    def unknown(self, keys: Sequence[bytes]) -> int:
        """Count the pairs that the reference has yet to see."""
        return sum(key not in self._entries for key in keys)

    def lookup(self, keys: Sequence[bytes]) -> np.ndarray:
        """Get the log-probs of pairs."""
        missing = (np.nan, np.nan)
        rows = [self._entries.get(key, missing) for key in keys]
        logps = np.array(rows, dtype=np.float32).reshape(-1, 2)
        self.hits += int(np.isfinite(logps[:, 0]).sum())
        return logps

    def store(self, keys: Sequence[bytes], logps: np.ndarray | mx.array) -> None:
        """Remember the log-probs of pairs, unless they are known or not finite."""
        rows = np.array(logps, dtype=np.float32)
        if rows.shape != (len(keys), 2):
            raise ValueError(
                f"logps has shape {rows.shape}, expected ({len(keys)}, 2): chosen and "
                "rejected for each key."
            )
        finite = np.isfinite(rows).all(axis=1)
        for key, row, is_finite in zip(keys, rows.tolist(), finite, strict=True):
            if is_finite and key not in self._entries:
                self._entries[key] = self._unshared[key] = tuple(row)
                self._unsaved = True
                self.computed += 1

    def arrays(self) -> dict[str, mx.array]:
        """All numbers as arrays, for a checkpoint."""
        keys = np.frombuffer(b"".join(self._entries), dtype=np.uint8)
        logps = np.array(list(self._entries.values()), dtype=np.float32)
        return {
            "keys": mx.array(keys.reshape(-1, KEY_BYTES)),
            "logps": mx.array(logps.reshape(-1, 2)),
        }

    def absorb(self, keys: mx.array, logps: mx.array) -> None:
        """Take the numbers of a checkpoint, before those that are known otherwise."""
        names = [row.tobytes() for row in np.array(keys)]
        rows = map(tuple, np.array(logps).tolist())
        theirs: Entries = dict(zip(names, rows, strict=True))
        self._entries = theirs | {
            k: v for k, v in self._entries.items() if k not in theirs
        }
        self._unshared |= theirs
        self._unsaved = self._unsaved or bool(theirs)

    def save(self) -> None:
        """Write what is new to the disk, beside what other runs wrote meanwhile."""
        if self.path is None or not self._unsaved:
            return
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                # A damaged file was reported when it was opened.
                entries = self._entries | self._read(lambda text: None)
                raw = _encode(self.fingerprint, entries)
                replace_file(self.path, lambda name: Path(name).write_bytes(raw))
                _drop_oldest(folder, self.path, MAX_FOLDER_BYTES)
            self._unsaved = False
        except OSError as e:
            self._warn(
                f"Can't save the reference's log-probs in {folder} ({e}): later runs "
                "compute them again."
            )

    def exchange(self, group: mx.distributed.Group) -> None:
        """Give every process the numbers that the others read or stored."""
        ours, self._unshared = self._unshared, {}
        if group.size() == 1:
            return
        counts = mx.distributed.all_gather(mx.array([len(ours)]), group=group).tolist()
        if not (most := max(counts)):
            return
        rows = np.zeros((most, ROW_BYTES), dtype=np.uint8)
        if ours:
            keys = np.frombuffer(b"".join(ours), dtype=np.uint8)
            logps = np.array(list(ours.values()), dtype=np.float32).view(np.uint8)
            rows[: len(ours), :KEY_BYTES] = keys.reshape(-1, KEY_BYTES)
            rows[: len(ours), KEY_BYTES:] = logps
        words = mx.distributed.all_gather(mx.array(rows.view(np.uint32)), group=group)
        gathered = np.array(words).view(np.uint8).reshape(len(counts), most, ROW_BYTES)
        news: Entries = {}
        # The lowest rank comes last.
        for count, block in reversed(list(zip(counts, gathered, strict=True))):
            keys = [row.tobytes() for row in block[:count, :KEY_BYTES]]
            logps = np.ascontiguousarray(block[:count, KEY_BYTES:]).view(np.float32)
            news |= zip(keys, map(tuple, logps.tolist()), strict=True)
        self._unsaved |= not news.keys() <= self._entries.keys()
        self._entries |= news
