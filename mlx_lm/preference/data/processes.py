# Copyright © 2026 MLX Contributors

"""The rows of a large set, tokenized by several processes beside this one."""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import islice
from queue import SimpleQueue
from typing import Any

from .tokenize import HELPERS

# Each of them takes some 250 MB.
MOST_PROCESSES = 4
PART = 5_000
# One takes as long to start as it needs for some ten thousand rows.
MANY_ROWS = 50_000


def work_together(
    work: Callable[[list], Any], rows: Iterable[Any], number: int
) -> list | None:
    """The results of parts of so many rows, if there are many, and if it can be done."""
    if number < MANY_ROWS or (count := process_count()) < 2:
        return None
    try:
        return list(in_processes(work, rows, count))
    except Exception:
        # Without them the cause shows, if it was not theirs.
        return None


def process_count() -> int:
    """As many as there are processors for, up to a few."""
    # A container or a scheduler may leave a process fewer than the machine has.
    own = getattr(os, "sched_getaffinity", None)
    count = len(own(0)) if own else os.cpu_count() or 1
    return min(count, MOST_PROCESSES)


def in_processes(
    work: Callable[[list], Any], items: Iterable[Any], count: int
) -> Iterator[Any]:
    """The results of parts of some items, in their order."""
    text = pickle.dumps(work)
    rest = iter(items)
    waiting: deque[Future] = deque()
    # Processes that wait for a part, and what each is told before its first.
    idle: SimpleQueue = SimpleQueue()

    def ask(part):
        process, before = idle.get()
        try:
            process.stdin.write(before)
            pickle.dump(part, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        finally:
            idle.put((process, b""))

    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(count))
        # They end before the threads that wait for them.
        for _ in range(count):
            process = _start()
            stack.callback(_end, process)
            idle.put((process, text))
        for part in iter(lambda: list(islice(rest, PART)), []):
            waiting.append(threads.submit(ask, part))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _start() -> subprocess.Popen:
    # Not by multiprocessing, which runs the script of whoever calls again.
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        # Nothing from the working folder, unless this process takes it from there.
        [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        # Ctrl-C is for the first one.
        start_new_session=True,
    )


def _end(process: subprocess.Popen) -> None:
    process.kill()
    for pipe in filter(None, (process.stdin, process.stdout)):
        # What it was not told yet can't be told any more.
        with suppress(OSError):
            pipe.close()
    process.wait()


def serve() -> None:
    """Answer part by part, until nobody asks any more."""
    # Whatever prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    work = pickle.load(sys.stdin.buffer)
    while True:
        try:
            part = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(work(part), answers)
        answers.flush()


HELPERS.append(work_together)
