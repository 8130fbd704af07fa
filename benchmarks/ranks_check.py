# Copyright © 2026 MLX Contributors

"""What several ranks promise, tried over a backend on this machine.

    python benchmarks/ranks_check.py --backend nccl --ranks 2

Sums of four floats and more, a run whose losses and weights are those of one rank, a
rank that is killed, and a run that goes on with another number of ranks; on CUDA with
and without graphs. What does not end in time says where each rank stood.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from dpo_report import SHAPES
from ranks_benchmark import launcher
from shapes import random_rows, save_random_model

# Runs in every rank before anything else: its number, and where it hangs.
STARTS = """
import faulthandler, os
rank = os.environ.get("MLX_RANK")
if rank is not None:
    folder = os.environ["RANKS_CHECK"]
    with open(f"{folder}/{rank}.pid", "w") as file:
        file.write(str(os.getpid()))
    stack = open(f"{folder}/{rank}.stack", "w")
    faulthandler.dump_traceback_later(float(os.environ["RANKS_WAIT"]), file=stack)
"""
SUMS = """
import statistics, time
import mlx.core as mx
world = mx.distributed.init(strict=True)
mine = mx.array([1.0, 2.0, 3.0, 4.0]) * (world.rank() + 1)
total = mx.distributed.all_sum(mine).tolist()
ranks = world.size() * (world.size() + 1) / 2
assert total == [ranks * i for i in (1, 2, 3, 4)], total
for size in (4, 1_000_000, 10_000_000):
    message, times = mx.ones((size,)), []
    mx.eval(message)
    for _ in range(12):
        start = time.perf_counter()
        mx.eval(mx.distributed.all_sum(message))
        times.append(1e3 * (time.perf_counter() - start))
    if world.rank() == 0:
        print(f"SUM {size} floats {statistics.median(times[2:]):.2f} ms", flush=True)
"""
CLOSE = 1e-5


class Check:
    """A model, pairs and runs of the command in one folder."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        config = SHAPES[args.shape] | {"vocab_size": 512}
        self.model = save_random_model(folder / "model", config, "float32")
        rows = random_rows([(12, 8, 5), (7, 4, 9)], 64, config["vocab_size"])
        self.data = folder / "train.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "sitecustomize.py").write_text(STARTS)
        self.env = os.environ | {"RANKS_CHECK": str(folder), "MLX_ENABLE_TF32": "0"}
        self.env["RANKS_WAIT"] = str(args.wait / 2)
        paths = [str(folder), self.env.get("PYTHONPATH", "")]
        self.env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

    def command(self, name: str, iters: int) -> list[str]:
        """A short run of ``mlx_lm.dpo`` with its folder."""
        settings = {
            **{"model": self.model, "data": self.data, "iters": iters},
            **{"adapter-path": self.folder / name, "batch-size": 8, "save-every": 4},
            **{"steps-per-report": 1, "steps-per-eval": 10**6, "val-batches": 1},
            **{"learning-rate": 1e-4, "num-layers": -1, "max-seq-length": 64},
        }
        words = [f"--{key}={value}" for key, value in settings.items()]
        return ["-m", "mlx_lm", "dpo", "--train", "--no-share-prompt", *words]

    def start(self, words: list[str], ranks: int, **env: str) -> subprocess.Popen:
        """Start a Python process on every rank."""
        launch = launcher(ranks, self.args.backend) if ranks > 1 else []
        return subprocess.Popen(
            [*launch, sys.executable, *map(str, words)],
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, words: list[str], ranks: int, **env: str) -> str:
        """What a run prints; one that hangs is ended, and says where it stood."""
        process = self.start(words, ranks, **env)
        try:
            printed, _ = process.communicate(timeout=self.args.wait)
        except subprocess.TimeoutExpired:
            self.end(process)
            stacks = [f.read_text() for f in sorted(self.folder.glob("*.stack"))]
            where = "\n".join(stacks)
            raise AssertionError(f"no end in {self.args.wait:g} s:\n{where}") from None
        if process.returncode:
            raise AssertionError(f"exit code {process.returncode}:\n{printed[-2000:]}")
        return printed

    def end(self, process: subprocess.Popen) -> None:
        """End the launcher and every rank."""
        process.kill()
        for rank in range(self.args.ranks):
            self.kill(rank)
        process.communicate()

    def kill(self, rank: int) -> None:
        """Kill one rank."""
        try:
            os.kill(int((self.folder / f"{rank}.pid").read_text()), signal.SIGKILL)
        except (OSError, ValueError):
            pass

    def losses(self, name: str) -> list[float]:
        """The losses that a run reported."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        rows = map(json.loads, lines)
        return [row["train_loss"] for row in rows if "train_loss" in row]

    def weights(self, name: str) -> dict[str, np.ndarray]:
        """The adapter that a run wrote."""
        loaded = mx.load(str(self.folder / name / "adapters.safetensors"))
        return {key: np.array(value) for key, value in loaded.items()}


def sums(check: Check) -> str:
    """Sums over the ranks are right, and take this long."""
    printed = check.run(["-c", SUMS], check.args.ranks)
    lines = [line for line in printed.splitlines() if "SUM" in line]
    assert len(lines) == 3, printed[-2000:]
    return ", ".join(line[line.index("SUM") + 4 :].strip() for line in lines)


def _equal(check: Check, name: str, other: str, steps: int) -> str:
    ours, theirs = check.losses(name), check.losses(other)
    assert len(ours) == len(theirs) == steps, (len(ours), len(theirs))
    loss = max(abs(a - b) for a, b in zip(ours, theirs))
    first, second = check.weights(name), check.weights(other)
    weight = max(float(np.abs(first[key] - second[key]).max()) for key in second)
    assert max(loss, weight) <= CLOSE, f"losses off by {loss:.1e}, weights {weight:.1e}"
    return f"losses off by {loss:.1e}, weights by {weight:.1e}"


def same_as_one(check: Check, graphs: str = "0") -> str:
    """Losses and weights are those of one rank."""
    if not (check.folder / "one").exists():
        check.run(check.command("one", 8), 1)
    name = f"ranks{graphs}"
    check.run(check.command(name, 8), check.args.ranks, MLX_USE_CUDA_GRAPHS=graphs)
    return _equal(check, name, "one", 8)


def resumed_alone(check: Check) -> str:
    """A run of several ranks goes on with one."""
    check.run(check.command("longer", 12), 1)
    check.run(check.command("shared", 8), check.args.ranks)
    resume = [f"--resume={check.folder / 'shared'}", "--iters=12"]
    check.run(["-m", "mlx_lm", "dpo", *resume], 1)
    return _equal(check, "shared", "longer", 12)


def a_lost_rank(check: Check) -> str:
    """A killed rank ends the others."""
    process = check.start(check.command("lost", 10**6), check.args.ranks)
    metrics, deadline = (
        check.folder / "lost/metrics.jsonl",
        time.time() + check.args.wait,
    )
    while not metrics.exists() or metrics.read_text().count("train_loss") < 2:
        if time.time() > deadline or process.poll() is not None:
            check.end(process)
            raise AssertionError("the run did not begin")
        time.sleep(0.1)
    check.kill(1)
    start = time.time()
    try:
        printed, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        check.end(process)
        raise AssertionError("the others were still there after a minute") from None
    assert "Rank lost" in printed, printed[-2000:]
    return f"the others ended after {time.time() - start:.1f} s and say how to go on"


def build_parser() -> argparse.ArgumentParser:
    """The check's command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "nccl" if mx.cuda.is_available() else "ring"
    parser.add_argument("--backend", default=default)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--wait", type=float, default=240, help="Seconds for a run.")
    return parser


def main() -> None:
    """
    Print one line a promise.

    Raises:
        SystemExit: With code 1 if one was not kept.
    """
    args = build_parser().parse_args()
    checks: dict[str, Callable[[Check], str]] = {
        "sums": sums,
        "losses and weights of one rank": same_as_one,
        "a killed rank": a_lost_rank,
        "goes on with one rank": resumed_alone,
    }
    if args.backend == "nccl":
        checks["the same with CUDA graphs"] = lambda check: same_as_one(check, "1")
    broken = False
    with tempfile.TemporaryDirectory() as folder:
        check = Check(Path(folder), args)
        print(f"| {args.ranks} ranks, {args.backend} | |\n|---|---|")
        for what, tried in checks.items():
            try:
                outcome = tried(check)
            except AssertionError as error:
                outcome, broken = f"**no**: {error}", True
            print(f"| {what} | {outcome} |", flush=True)
    sys.exit(broken)


if __name__ == "__main__":
    main()
