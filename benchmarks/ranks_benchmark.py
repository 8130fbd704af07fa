# Copyright © 2026 MLX Contributors

"""Pairs per second at a fixed batch per rank, and what the ranks' messages cost.

    python benchmarks/ranks_benchmark.py --model MODEL --data train.jsonl --ranks 1 2 4

Each count is a run of ``mlx_lm.dpo`` through ``mlx.launch``. N ranks get the data N
times over, so that every count takes the same steps in the same shapes. Only the last
epoch counts: it knows the reference. What a step's messages take is timed by
themselves, the adapter that was trained in them.
"""

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

# A step's messages: the gradient's average, and whether a signal came to any rank.
MESSAGES = """
import statistics, sys, time
import mlx.core as mx
from mlx_lm.preference.ranks import average_over_ranks
world = mx.distributed.init(strict=True)
gradient, times = mx.load(sys.argv[1]), []
mx.eval(gradient)
for _ in range(22):
    start = time.perf_counter()
    mx.eval(average_over_ranks(gradient))
    mx.eval(mx.distributed.all_max(mx.array(0)))
    times.append(time.perf_counter() - start)
if world.rank() == 0:
    print("SECONDS", statistics.median(times[2:]), flush=True)
"""


def build_parser() -> argparse.ArgumentParser:
    """The benchmark's command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="A JSONL file.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-per-rank", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    default = "nccl" if mx.cuda.is_available() else "ring"
    parser.add_argument("--backend", default=default)
    parser.add_argument("more", nargs="*", help="Flags of mlx_lm.dpo, after --")
    return parser


def launcher(ranks: int, backend: str) -> list[str]:
    """The words that start a command on several ranks of this machine."""
    beside = Path(sys.executable).parent / "mlx.launch"
    script = str(beside) if beside.exists() else shutil.which("mlx.launch")
    if script is None:
        raise SystemExit("mlx.launch is not on the PATH: it comes with mlx.")
    # Two rings on the launcher's own port would wait for each other without an end.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ring = ["--starting-port", str(free.getsockname()[1])]
    words = [sys.executable, script, "-n", str(ranks), "--backend", backend]
    return words + ring * (backend == "ring")


def run(words: list[object]) -> str:
    """What a process prints."""
    result = subprocess.run(
        list(map(str, words)), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if result.returncode:
        raise SystemExit(f"A run failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def measure(
    args: argparse.Namespace, ranks: int, folder: Path
) -> tuple[float, float | None]:
    """The pairs per second of a run's last epoch; the seconds of a step's messages."""
    folder = folder / str(ranks)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "data/train.jsonl").write_text(args.data.read_text("utf-8") * ranks)
    adapters = folder / "adapters"
    # What an earlier round left would only be resumed.
    shutil.rmtree(adapters, ignore_errors=True)
    launch = launcher(ranks, args.backend) if ranks > 1 else []
    run(
        [
            *(*launch, sys.executable, "-m", "mlx_lm", "dpo", "--train"),
            *("--model", args.model, "--data", folder / "data"),
            *("--adapter-path", adapters, "--epochs", args.epochs),
            *("--batch-size", ranks * args.batch_per_rank, "--steps-per-report", 5),
            *("--steps-per-eval", 10**9, "--save-every", 10**9),
            *("--no-reference-cache", "--no-token-cache", *args.more),
        ]
    )
    lines = map(json.loads, (adapters / "metrics.jsonl").read_text().splitlines())
    speeds = [x["pairs_per_second"] for x in lines if "pairs_per_second" in x]
    # The last report may hold fewer steps.
    last = speeds[-(len(speeds) // args.epochs) : -1]
    if not last:
        raise SystemExit("Too few reports in an epoch: give more data.")
    speed = statistics.harmonic_mean(last)
    if ranks == 1:
        return speed, None
    words = [sys.executable, "-c", MESSAGES, adapters / "adapters.safetensors"]
    seconds = run([*launch, *words]).split("SECONDS")[1].split()[0]
    return speed, float(seconds)


def main() -> None:
    """Print one line a count: pairs per second, speed-up, the share of messages."""
    args = build_parser().parse_args()
    speeds: dict[int, list[float]] = {ranks: [] for ranks in args.ranks}
    seconds: dict[int, list[float]] = {ranks: [] for ranks in args.ranks}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for ranks in args.ranks:
                speed, messages = measure(args, ranks, Path(folder))
                speeds[ranks].append(speed)
                if messages is not None:
                    seconds[ranks].append(messages)
                print(f"{ranks} ranks: {speed:.1f} pairs/s", file=sys.stderr)
    first = statistics.median(speeds[args.ranks[0]])
    print("| ranks | batch | pairs/s | times | messages |\n|---|---|---|---|---|")
    for ranks, found in speeds.items():
        own, batch, share = statistics.median(found), ranks * args.batch_per_rank, ""
        spread = f"{own:.1f} ({min(found):.1f} to {max(found):.1f})"
        if seconds[ranks]:
            share = f"{statistics.median(seconds[ranks]) * own / batch:.1%}"
        print(f"| {ranks} | {batch} | {spread} | {own / first:.2f} | {share} |")


if __name__ == "__main__":
    main()
