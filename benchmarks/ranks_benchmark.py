# Copyright © 2026 MLX Contributors

"""Pairs per second at a fixed batch per rank, on 1, 2 and 4 ranks.

    python benchmarks/ranks_benchmark.py --model MODEL --data DATA --ranks 1 2 4

``DATA`` is a folder with train.jsonl. Each count is a run of ``mlx_lm.dpo`` through
``mlx.launch``; the first reports are left out, as they hold warm-up.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx


def build_parser() -> argparse.ArgumentParser:
    """The benchmark's command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-per-rank", type=int, default=4)
    parser.add_argument("--iters", type=int, default=60)
    parser.add_argument("--steps-per-report", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2, help="Reports left out.")
    default = "nccl" if mx.cuda.is_available() else "ring"
    parser.add_argument("--backend", default=default)
    parser.add_argument("more", nargs="*", help="Flags of mlx_lm.dpo, after --")
    return parser


def launcher(ranks: int, backend: str) -> list[str]:
    """The words that start a command on several ranks of this machine."""
    beside = Path(sys.executable).parent / "mlx.launch"
    script = beside if beside.exists() else shutil.which("mlx.launch")
    return [sys.executable, str(script), "-n", str(ranks), "--backend", backend]


def measure(args: argparse.Namespace, ranks: int, folder: Path) -> float:
    """The median pairs per second of one run."""
    adapters = folder / str(ranks)
    words = [
        *(sys.executable, "-m", "mlx_lm", "dpo", "--train"),
        *("--model", args.model, "--data", args.data, "--adapter-path", adapters),
        *("--batch-size", ranks * args.batch_per_rank, "--iters", args.iters),
        *("--steps-per-report", args.steps_per_report, "--save-every", args.iters),
        *("--no-reference-cache", *args.more),
    ]
    if ranks > 1:
        words = [*launcher(ranks, args.backend), *words]
    result = subprocess.run(
        list(map(str, words)), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    metrics = adapters / "metrics.jsonl"
    if not metrics.exists():
        raise SystemExit(f"{ranks} ranks failed:\n{result.stdout}{result.stderr}")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    speeds = [x["pairs_per_second"] for x in lines if "pairs_per_second" in x]
    if len(speeds) <= args.warm_up:
        raise SystemExit("Too few reports: give more --iters.")
    return statistics.median(speeds[args.warm_up :])


def main() -> None:
    """Print one line a count: pairs per second, and times the first count's."""
    args = build_parser().parse_args()
    base = None
    print("ranks  batch  pairs/s  speed-up")
    with tempfile.TemporaryDirectory() as folder:
        for ranks in args.ranks:
            speed = measure(args, ranks, Path(folder))
            base = base or speed
            batch = ranks * args.batch_per_rank
            print(f"{ranks:>5}{batch:>7}{speed:>9.1f}{speed / base:>9.2f}x", flush=True)


if __name__ == "__main__":
    main()
