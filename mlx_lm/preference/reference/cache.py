# Copyright © 2026 MLX Contributors

"""The reference's log-probs of every pair, remembered in memory and on disk."""

import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..digest import bytes_digest, digest
from ..files import drop_oldest
from ..terminal import rprint

# Changes when keys or files are made in another way.
FORMAT = "mlx_lm.reference_log_probs.2"
MAX_FOLDER_BYTES = 2**30
LOCK_SECONDS = 10
TABLE = "saved (rows BLOB, checksum TEXT)"
KEY_BYTES = 16
# A pair's key, and the log-probs of its chosen and rejected answer.
ROW = struct.Struct("<16sff")
Entries = dict[bytes, tuple[float, float]]


def pair_key(
    prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]
) -> bytes:
    """Name a pair by its token ids."""
    parts = (np.asarray(ids, "<i4").tobytes() for ids in (prompt, chosen, rejected))
    return bytes_digest(*parts, size=KEY_BYTES)


def pair_keys(dataset: Any) -> list[bytes]:
    """Name all pairs of a data set."""
    if hasattr(dataset, "id_bytes"):
        return [bytes_digest(*parts, size=KEY_BYTES) for parts in dataset.id_bytes()]
    return [pair_key(*dataset[i][:3]) for i in range(len(dataset or []))]


def _pack(entries: Entries) -> bytes:
    return b"".join([ROW.pack(key, *logps) for key, logps in entries.items()])


def _unpack(rows: bytes) -> Entries:
    return {key: (chosen, rejected) for key, chosen, rejected in ROW.iter_unpack(rows)}


@contextmanager
def _transaction(path: Path, start: str, wait: float) -> Iterator[Any]:
    """Open a database: ValueError if it is damaged, OSError if it can't be used."""
    # Links would lead elsewhere, and opening a FIFO waits for a writer.
    for suffix in ("", "-journal", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(f"{path}{suffix}").st_mode):
                raise OSError(f"{path.name}{suffix} is no regular file")
    try:
        import sqlite3
    except ImportError as e:
        # Python can be built without it.
        raise OSError(str(e)) from e
    try:
        # SQLite needs POSIX locks from the file system, and fails where there are
        # none; a page lost where they do not work does not pass for a number. Its
        # journal is the default one: a write-ahead log needs shared memory.
        options: Any = {"timeout": wait, "isolation_level": None}
        with closing(sqlite3.connect(path, **options)) as database, database:
            database.execute(start)
            yield database
    except sqlite3.Error as e:
        code = getattr(e, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        # What is neither locked nor full nor closed to us is damaged.
        is_known = code != sqlite3.SQLITE_ERROR
        is_outside = is_known and isinstance(e, sqlite3.OperationalError)
        raise (OSError if is_outside else ValueError)(str(e)) from e


def _allow_as_usual(path):
    # In a shared folder, others save here too, if the user's umask lets them.
    mask = os.umask(0o077)
    os.umask(mask)
    with suppress(OSError):
        os.chmod(path, 0o666 & ~mask)


class ReferenceCache:
    """What a reference model says of every pair: computed once, found by later runs."""

    def __init__(self, folder: Path | None, fingerprint: str):
        self.fingerprint = fingerprint
        self.path = None if folder is None else Path(folder) / f"{fingerprint}.sqlite"
        self._warned = False
        self._entries: Entries = self._read()
        self._unsaved = False
        # Also what was read: another host may not see the folder.
        self._unshared: Entries = dict(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def _wait(self):
        """Seconds to wait for another run's lock: once, not at every checkpoint."""
        return 0 if self._warned else LOCK_SECONDS

    def _warn(self, text):
        if not self._warned:
            rprint(f"[WARNING] {text}")
        self._warned = True

    def _read(self):
        """What the file holds; nothing if it is damaged or not there."""
        if self.path is None or not os.path.lexists(self.path):
            return {}
        again = "the reference's log-probs are computed again."
        try:
            with _transaction(self.path, "BEGIN", self._wait) as database:
                entries = self._entries_of(database)
        except ValueError:
            self._warn(f"{self.path} is damaged: {again}")
            return {}
        except OSError as e:
            self._warn(f"Can't read {self.path} ({e}): {again}")
            return {}
        # Its time says when it was last of use.
        with suppress(OSError):
            os.utime(self.path)
        return entries

    def _entries_of(self, database):
        entries: Entries = {}
        # Where two runs saved a pair, the first number stays.
        query = "SELECT rows, checksum FROM saved ORDER BY rowid DESC"
        for rows, checksum in database.execute(query):
            if self._checksum(rows) != checksum:
                raise ValueError("damaged")
            entries |= _unpack(rows)
        return entries

    def _checksum(self, rows):
        return digest(FORMAT, self.fingerprint, rows)

    def discard(self) -> None:
        """Forget all numbers, on the disk too: they are not the model's."""
        self._entries, self._unshared, self._unsaved = {}, {}, False
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def unknown(self, keys: Sequence[bytes]) -> int:
        """Count the pairs that the reference has yet to see."""
        return sum(key not in self._entries for key in keys)

    def lookup(self, keys: Sequence[bytes]) -> np.ndarray:
        """Get the log-probs of pairs."""
        missing = (np.nan, np.nan)
        rows = [self._entries.get(key, missing) for key in keys]
        return np.array(rows, dtype=np.float32).reshape(-1, 2)

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
        ours = {k: v for k, v in self._entries.items() if k not in theirs}
        self._entries = theirs | ours
        self._unshared |= theirs
        self._unsaved = self._unsaved or bool(theirs)

    def save(self) -> None:
        """Write what is new to the disk, beside what other runs wrote meanwhile."""
        if self.path is None or not self._unsaved:
            return
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._write()
            except ValueError:
                # A damaged file was reported when it was opened.
                self.path.unlink(missing_ok=True)
                self._write()
            # The folder may hold files of somebody else.
            files = folder.glob(f"{'[0-9a-f]' * 64}.sqlite")
            drop_oldest(files, self.path, MAX_FOLDER_BYTES)
            self._unsaved = False
        except (OSError, ValueError) as e:
            self._warn(
                f"Can't save the reference's log-probs in {folder} ({e}): later runs "
                "compute them again."
            )

    def _write(self):
        is_new = not self.path.exists()
        with _transaction(self.path, "BEGIN IMMEDIATE", self._wait) as database:
            database.execute(f"CREATE TABLE IF NOT EXISTS {TABLE}")
            known = self._entries_of(database)
            rows = _pack({k: v for k, v in self._entries.items() if k not in known})
            new = (rows, self._checksum(rows))
            database.execute("INSERT INTO saved VALUES (?, ?)", new)
        if is_new:
            _allow_as_usual(self.path)

    def exchange(self, group: mx.distributed.Group) -> None:
        """Give every process the numbers that the others read or stored."""
        ours, self._unshared = self._unshared, {}
        if group.size() == 1:
            return
        counts = mx.distributed.all_gather(mx.array([len(ours)]), group=group).tolist()
        if not (most := max(counts)):
            return
        size = most * ROW.size
        words = np.frombuffer(_pack(ours).ljust(size, b"\0"), np.uint32)
        gathered = mx.distributed.all_gather(mx.array(words), group=group)
        rows = np.array(gathered).tobytes()
        news: Entries = {}
        # The lowest rank comes last.
        for rank, count in reversed(list(enumerate(counts))):
            start = rank * size
            news |= _unpack(rows[start : start + count * ROW.size])
        self._unsaved |= not news.keys() <= self._entries.keys()
        self._entries |= news
