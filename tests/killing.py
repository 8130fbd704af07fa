# Copyright © 2026 MLX Contributors

"""Runs of the command that die at a chosen moment, as if somebody used kill -9.

Started as a program, it makes a process for every line that it reads: a JSON object
with the arguments of the command and the moment to die at.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

EVENTS = ("step", "batch", "half", "written", "renamed", "line", "cache", "unlink")
# Of runs that generate and label their own pairs.
ROUND_EVENTS = ("answer", "label", "phase")


class Moments:
    """Counts what happens in a run, and dies at the chosen moment."""

    def __init__(self, event, at):
        self.event, self.at = event, at
        self.counts = dict.fromkeys((*EVENTS, *ROUND_EVENTS), 0)

    def happens(self, event):
        """Count an event; tell whether it is the last one."""
        self.counts[event] += 1
        return (event, self.counts[event]) == (self.event, self.at)

    def around(self, owner, name, event, half=None, after=False):
        """Let a function die before, behind or in the middle of its call."""
        original = getattr(owner, name)

        def function(*args, **kwargs):
            last = self.happens(event)
            if last and not after:
                if half is not None:
                    half(original, *args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, function)


def cut_file(original, name, *args):
    original(name, *args)
    os.truncate(name, os.path.getsize(name) // 2)


def cut_line(original, self, info):
    self.path.open("a").write(json.dumps(info)[:40])


def cut_record(original, folder, record):
    name = "answers" if hasattr(record, "responses") else "labels"
    (Path(folder) / f"{name}.jsonl").open("a").write('{"id": "x", "round"')


def live(job):
    """The child process: the command, which may die on its way."""
    import mlx.core as mx

    from mlx_lm import dpo
    from mlx_lm.preference.collect import generate, judges, rounds
    from mlx_lm.preference.reference import cache as reference_cache
    from mlx_lm.preference.run.folder import MetricsFile
    from mlx_lm.preference.run.loop import PreferenceRun

    moments = Moments(job["event"], job["at"])
    moments.around(PreferenceRun, "_after_step", "step")
    moments.around(PreferenceRun, "_score_batch", "batch")
    moments.around(mx, "save_safetensors", "half", cut_file)
    moments.around(os, "replace", "written")
    moments.around(os, "replace", "renamed", after=True)
    moments.around(MetricsFile, "_append", "line", cut_line)
    # Inside a transaction, whose rows are never committed.
    moments.around(reference_cache, "_pack", "cache", after=True)
    moments.around(Path, "unlink", "unlink")
    for room in (generate, rounds):
        moments.around(room, "append_answers", "answer", cut_record)
    moments.around(judges, "append_label", "label", cut_record)
    moments.around(rounds, "write_json", "phase", after=True)
    sys.argv = ["mlx_lm.dpo", *job["argv"]]
    try:
        dpo.main()
        code = 0
    except SystemExit as e:
        code = e.code
    if job["counts"]:
        Path(job["counts"]).write_text(json.dumps(moments.counts))
    return code


def serve():
    """Read jobs; answer with the child's number, and on an empty line with its end."""
    # All that takes long, but nothing that starts a thread.
    import mlx_lm.dpo  # noqa: F401
    import mlx_lm.models.llama  # noqa: F401
    import mlx_lm.preference.collect.rounds  # noqa: F401

    while line := sys.stdin.readline():
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = live(job)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(child, flush=True)
        # Until then its number can't be another's.
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Killer:
    """Starts the command in processes of its own, and lets some of them die."""

    def __init__(self, folder):
        self.log, self.counts = Path(folder) / "log.txt", Path(folder) / "counts.json"
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "XDG_CACHE_HOME": str(folder), "COLUMNS": "200"},
        )

    def run(self, *argv, event=None, at=0, timer=None):
        """The exit code of mlx_lm.dpo, -9 if it was killed."""
        job = {
            "argv": [str(word) for word in argv],
            **{"event": event, "at": at},
            **{"log": str(self.log), "counts": str(self.counts)},
        }
        print(json.dumps(job), file=self.server.stdin, flush=True)
        child = int(self.server.stdout.readline())
        if timer is not None:
            timer(child)
        print(file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def close(self):
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()


if __name__ == "__main__":
    serve()
