# Copyright © 2026 MLX Contributors

"""Folders of answers and the page's server, for its tests and by hand.

python tests/page_server.py FOLDER NAME PORT
"""

import contextlib
import io
import json
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from unittest import mock

import tiny  # noqa: F401, which keeps the user's own cache folder as it is

from mlx_lm.preference.collect.pairs import write_pairs
from mlx_lm.preference.collect.server import PageServer, label_by_hand
from mlx_lm.preference.collect.voting import Voting

COMMANDS = {"go_on": "mlx_lm.dpo_collect --label human", "train": "mlx_lm.dpo --train"}


def answers(id, *texts, prompt="Why?", round=0, **more):
    """A line of answers.jsonl."""
    responses = [
        {"text": text, "tokens": [i, 0], "finish": "stop", "logps": -1.0}
        for i, text in enumerate(texts)
    ]
    prompt = [{"role": "user", "content": prompt}]
    return {
        "id": id,
        "round": round,
        "prompt": prompt,
        "responses": responses,
        "sampling": {},
        "model": "",
        "seed": 0,
        **more,
    }


def write_answers(folder, rows):
    """Write a folder of answers."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (Path(folder) / "answers.jsonl").write_text(text)
    return Path(folder)


def labels(folder):
    """The lines of labels.jsonl."""
    path = Path(folder) / "labels.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def serving(folder, name="anna", **more):
    """Serve the page in a thread; yields the server and its address."""
    voting, make_pairs = Voting(folder, name, **more), partial(write_pairs, folder)
    with PageServer(voting, "127.0.0.1", 0, COMMANDS, make_pairs) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server, server.address()
        finally:
            server.shutdown()
            thread.join()


def stopped():
    """Have Ctrl-C end the page at once."""
    return mock.patch.object(PageServer, "serve_forever", side_effect=KeyboardInterrupt)


@contextlib.contextmanager
def process(folder, port=0, name="anna", cache=None):
    """Serve the page in a process of its own; yields it and the page's address."""
    command = [sys.executable, __file__, str(folder), name, str(port), cache or ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            running.stdout.readline()
            yield running, running.stdout.readline().strip()
        finally:
            running.kill()


def main():
    """Serve a folder until Ctrl-C."""
    import os

    # A shell's job in the background would hand down that Ctrl-C is not for it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, name, port, *cache = sys.argv[1:]
    if any(cache):
        os.environ["XDG_CACHE_HOME"] = cache[0]
    make_pairs = partial(write_pairs, folder)
    label_by_hand(folder, name, port=int(port), browse=False, make_pairs=make_pairs)


if __name__ == "__main__":
    sys.stdout = io.TextIOWrapper(sys.stdout.buffer, line_buffering=True)
    main()
