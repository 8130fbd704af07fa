# Copyright © 2026 MLX Contributors

"""Whole runs, from the command to the last step, beside PyTorch as TRL runs it.

``mlx_lm.dpo`` through its command, and DPO in PyTorch over the same pairs and the same
weights: one epoch in which the reference is asked, and one where it is known. Every run
is a process of its own and every step's end is read off the clock, so that compiling,
checkpoints and reports count; validations don't, but for the one before the first step.

    python benchmarks/run_benchmark.py --shape qwen3-0.6b --tokenizer SMOLLM2 \\
        --vocabulary 49152 --data pairs.jsonl.gz --max-length 512 --batch-size 4 16
    python benchmarks/run_benchmark.py --shape tiny --lengths 24+8 12+4+6 --pairs 32
    python benchmarks/run_benchmark.py --model MODEL --data pairs.jsonl -- --no-share-prompt

Pairs longer than ``--max-length`` are left out. What stands behind ``--`` goes to
``mlx_lm.dpo``. PyTorch is left out, and said so, where it is not installed.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from dpo_report import SHAPES, command, machine
from quality_benchmark import read_lines, write_lines
from shapes import DTYPES, link_model, random_rows, save_random_model

from mlx_lm.preference.run.folder import METRICS
from mlx_lm.preference.run.reading import read_lines as read_metrics
from mlx_lm.tuner.datasets import PreferenceDataset, load_preference_dataset
from mlx_lm.utils import load_tokenizer

PYTORCH = Path(__file__).with_name("trl_run.py")
FRAMEWORKS = {"mlx": "mlx_lm.dpo", "torch": "PyTorch"}
PASSES = {"first": "first epoch", "known": "reference known"}
UNITS = {
    "start_up": "start-up s",
    "whole": "pairs/s, whole epoch",
    "half": "pairs/s, second half",
    "peak": "peak GB",
    "predicted": "predicted GB",
}


@dataclass
class Run:
    """One run's numbers: seconds, pairs a second, GB; None where there is none."""

    start_up: float
    whole: float
    half: float
    peak: float | None
    predicted: float | None = None
    plan: str = ""
    # Kernels that a GPU lacked: the next run finds them.
    built: int = 0


@dataclass
class Job:
    """What all runs train: a model folder, a data folder, its pairs as JSON."""

    model: Path
    data: Path
    pairs: Path
    count: int
    tokens: int


def make_model(args: argparse.Namespace, folder: Path) -> tuple[Path, int]:
    """The model folder, made if it is not there, and its vocabulary's size."""
    if args.model:
        config = json.loads((args.model / "config.json").read_text("utf-8"))
        model = link_model(folder, args.model) if args.lengths else args.model
        return model.resolve(), config["vocab_size"]
    config = dict(SHAPES[args.shape])
    config["vocab_size"] = args.vocabulary or config["vocab_size"]
    tokenizer = args.tokenizer if args.data else None
    save_random_model(folder, config, args.dtype, tokenizer, args.seed)
    return folder.resolve(), config["vocab_size"]


def parse_lengths(words: list[str]) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected answer: 256+128 or 256+128+90."""
    lengths = []
    for word in words:
        numbers = [int(n) for n in word.split("+") if n.isdigit()]
        if len(numbers) not in (2, 3) or word.count("+") != len(numbers) - 1:
            raise ValueError(f"Write lengths as 256+128 or 256+128+90, not {word!r}.")
        if numbers[0] < 1 or min(numbers[1:]) < 2:
            raise ValueError(
                f"{word}: an answer has two tokens at least, a prompt one."
            )
        lengths.append((numbers[0], numbers[1], numbers[-1]))
    return lengths


def rows_that_fit(args: argparse.Namespace, tokenizer: Any) -> list[str]:
    """The file's first rows whose pairs are no longer than asked for."""
    lines = read_lines(args.data)
    rows = [json.loads(line) for line in lines]
    dataset = PreferenceDataset(rows, tokenizer, 2**30, source=args.data.name)
    fits = (i for i in range(len(dataset)) if dataset.itemlen(i) <= args.max_length)
    chosen = list(dict.fromkeys(dataset.source_row(i) for i in fits))
    return [lines[int(i)] for i in chosen[: args.pairs]]


def prepare(args: argparse.Namespace, folder: Path) -> Job:
    """Write what all runs train."""
    model, vocabulary = make_model(args, folder / "model")
    tokenizer = load_tokenizer(model)
    if args.data:
        lines = rows_that_fit(args, tokenizer)
    else:
        lengths, count = parse_lengths(args.lengths), args.pairs or 64
        rows = random_rows(lengths, count, vocabulary, args.seed)
        lines = [json.dumps(row) for row in rows]
    data, pairs = folder / "data", folder / "pairs.json"
    data.mkdir(parents=True)
    write_lines(data / "train.jsonl", lines)
    # What the command holds out by default, PyTorch leaves out too.
    train = load_preference_dataset(
        data, tokenizer, max_length=args.max_length, token_cache=False
    )[0]
    ids = [[part.tolist() for part in pair[:3]] for pair in train]
    pairs.write_text(json.dumps(ids), "utf-8")
    return Job(model, data, pairs, len(ids), int(train.pair_lengths()[:, 1:].sum()))


def watch(words: list[Any], metrics: Path, log: Path) -> list[tuple[float, dict]]:
    """Run a program; its lines of metrics, each with its seconds from the launch."""
    times: list[float] = []
    size = 0
    start = time.perf_counter()
    # Nothing needs the network; a working folder of its own hides no package.
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with open(log, "w") as screen:
        process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.DEVNULL,
            stdout=screen,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=env,
        )
        try:
            while True:
                ended = process.poll() is not None
                now = time.perf_counter() - start
                if metrics.exists() and metrics.stat().st_size > size:
                    size = metrics.stat().st_size
                    count = metrics.read_bytes().count(b"\n")
                    times += [now] * (count - len(times))
                if ended:
                    break
                time.sleep(0.005)
        finally:
            process.kill()
    if process.returncode:
        # The log may show the data, so that its path is all that is said.
        raise ValueError(f"A run ended with code {process.returncode}: see {log}")
    return list(zip(times, read_metrics(metrics), strict=True))


def summarize(lines: list[tuple[float, dict]]) -> Run:
    """The numbers of a run whose every step is a line."""
    # Seconds of a clock that stands still in validations, and pairs, after each step.
    steps: list[tuple[float, float]] = []
    pauses, peak = 0.0, 0.0
    for when, info in lines:
        pauses += info.get("val_time", 0.0)
        if "pairs_per_second" in info:
            steps.append((when - pauses, info["trained_pairs"]))
            peak = max(peak, info["peak_memory"])
    if len(steps) < 2:
        raise ValueError(f"{len(steps)} steps are too few: give more pairs.")
    when, info = next(line for line in lines if "pairs_per_second" in line[1])
    begin = steps[0][0] - info["trained_pairs"] / info["pairs_per_second"]
    (middle, before), (end, pairs) = steps[len(steps) // 2 - 1], steps[-1]
    half = (pairs - before) / (end - middle)
    return Run(when, pairs / (end - begin), half, peak or None)


def run_command(args: argparse.Namespace, job: Job, size: int, folder: Path) -> Run:
    """A run of ``mlx_lm.dpo``; the reference's log-probs are kept beside it."""
    config = {"lora_parameters": {"rank": args.rank, "scale": 20.0, "dropout": 0.0}}
    # JSON is YAML.
    (folder / "config.yaml").write_text(json.dumps(config), "utf-8")
    words = [
        *(sys.executable, "-m", "mlx_lm", "dpo", "--train"),
        *("--config", folder / "config.yaml", "--model", job.model),
        *("--data", job.data, "--adapter-path", folder / "adapters"),
        *("--reference-cache", folder.parent / "references", "--no-token-cache"),
        *("--batch-size", size, "--epochs", 1, "--steps-per-report", 1),
        *("--max-seq-length", args.max_length, "--num-layers", args.num_layers),
        *(["--grad-checkpoint"] if args.grad_checkpoint else []),
        *args.more,
    ]
    log = folder / "log.txt"
    run = summarize(watch(words, folder / "adapters" / METRICS, log))
    text = log.read_text("utf-8", errors="replace")
    header = read_header(text)
    if found := re.search(r"Built ([\d,]+) GPU kernels", text):
        run.built = int(found[1].replace(",", ""))
    if "peak memory" in header:
        amount, unit, *_ = header["peak memory"].replace(":", "").split()
        run.predicted = float(amount) / {"GB": 1, "MB": 1000}[unit]
    run.plan = header.get("prompts", "")
    return run


def read_header(text: str) -> dict[str, str]:
    """The rows of the panel that a run begins with."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
    rows = (re.match(r"│ +(.+?)  +(.+?) *│$", line) for line in lines)
    return {row[1]: row[2] for row in rows if row}


def run_pytorch(args: argparse.Namespace, job: Job, size: int, folder: Path) -> Run:
    """The same epoch in PyTorch."""
    metrics = folder / METRICS
    words = [
        *(args.torch_python, PYTORCH, "--model", job.model, "--pairs", job.pairs),
        *("--metrics", metrics, "--reference", folder.parent / "references.npy"),
        *("--batch-size", size, "--num-layers", args.num_layers, "--rank", args.rank),
        *(["--grad-checkpoint"] if args.grad_checkpoint else []),
    ]
    return summarize(watch(words, metrics, folder / "log.txt"))


RUNNERS = {"mlx": run_command, "torch": run_pytorch}


def pytorch_versions(python: str) -> tuple[str, str]:
    """What is installed; or nothing, and why PyTorch is left out."""
    result = subprocess.run(
        [python, str(PYTORCH), "--versions"], capture_output=True, text=True
    )
    if result.returncode == 0:
        return result.stdout.strip(), ""
    reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
    return "", f"PyTorch is left out: {reason}"


def measure(
    args: argparse.Namespace, job: Job, size: int, folder: Path
) -> dict[tuple[str, str], list[Run]]:
    """All rounds of one batch size, the frameworks in turns."""
    runs: dict[tuple[str, str], list[Run]] = {}
    for turn in range(args.rounds):
        for framework in args.frameworks:
            # A first epoch finds no reference, the next one finds what it left.
            for name in PASSES:
                own = folder / f"batch{size}" / f"{framework}{turn}" / name
                own.mkdir(parents=True)
                run = RUNNERS[framework](args, job, size, own)
                runs.setdefault((framework, name), []).append(run)
                numbers = "; ".join(
                    f"{k} {c}" for k, c in zip(UNITS.values(), cells([run]))
                )
                title = f"{FRAMEWORKS[framework]}, {PASSES[name]}, batch {size}"
                print(f"{title}, round {turn + 1}: {numbers}", file=sys.stderr)
    return runs


def cells(runs: list[Run]) -> list[str]:
    """The medians, with the smallest and largest value where there are several."""
    texts = []
    for name in UNITS:
        values = [value for run in runs if (value := getattr(run, name)) is not None]
        text = f"{statistics.median(values):.4g}" if values else "-"
        if len(values) > 1 and min(values) < max(values):
            text += f" ({min(values):.4g} - {max(values):.4g})"
        texts.append(text)
    return texts


def table(title: str, runs: dict[tuple[str, str], list[Run]]) -> list[str]:
    """Lines of a Markdown table, and the ratios below it."""
    lines = [f"\n{title}\n", f"| | {' | '.join(UNITS.values())} |"]
    lines.append("|---" * (len(UNITS) + 1) + "|")
    for (framework, name), found in runs.items():
        built = sum(run.built for run in found)
        more = f" (built {built} kernels)" if built else ""
        row = [f"{FRAMEWORKS[framework]}, {PASSES[name]}{more}", *cells(found)]
        lines.append(f"| {' | '.join(row)} |")
    ratios = []
    for name, what in PASSES.items():
        ours, theirs = (runs.get((framework, name), []) for framework in FRAMEWORKS)
        for part in ("whole", "half") if ours and theirs else ():
            values = [getattr(a, part) / getattr(b, part) for a, b in zip(ours, theirs)]
            unit = UNITS[part].removeprefix("pairs/s, ")
            ratios.append(f"{what}, {unit}: {statistics.median(values):.2f}")
    if ratios:
        lines.append(f"\nTimes PyTorch's pairs/s: {'; '.join(ratios)}.")
    plans = dict.fromkeys(r.plan for found in runs.values() for r in found if r.plan)
    lines += [f"\nPrompts in `mlx_lm.dpo`: {plan}." for plan in plans]
    return lines


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="a model folder")
    model.add_argument("--shape", choices=list(SHAPES), help="or random weights")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, help="a JSONL file of pairs, also .gz")
    data.add_argument(
        "--lengths", nargs="+", help="or tokens, as 256+128 or 256+128+90, in turns"
    )
    add("--pairs", type=int, help="so many at most (lengths: 64)")
    add("--max-length", type=int, default=512, help="longer pairs are left out")
    add("--tokenizer", type=Path, help="a folder; a shape needs it to read --data")
    add("--vocabulary", type=int, help="of a shape, instead of its own")
    add("--dtype", choices=list(DTYPES), help="of a shape's weights (by device)")
    add("--batch-size", type=int, nargs="+", default=[4], help="pairs a step")
    add("--num-layers", type=int, default=-1, help="trained layers, -1 for all")
    add("--rank", type=int, default=8, help="rank of the adapters")
    add("--grad-checkpoint", action="store_true", help="recompute layers")
    add("--rounds", type=int, default=1, help="runs of each kind")
    add("--frameworks", nargs="+", choices=list(FRAMEWORKS), default=list(FRAMEWORKS))
    add("--torch-python", default=sys.executable, help="an interpreter with PyTorch")
    add("--output", type=Path, help="a new folder that keeps runs and their logs")
    add("--seed", type=int, default=0)
    add("more", nargs="*", help="flags of mlx_lm.dpo, after --")
    return parser


def measure_all(
    args: argparse.Namespace, folder: Path, argv: list[str] | None = None
) -> dict[int, dict]:
    """Every batch size; print a table for each."""
    device = mx.device_info().get("device_name", "unknown device")
    print(machine(f"{device} ({mx.default_device()})", "mlx", "mlx-lm"))
    if "torch" in args.frameworks:
        versions, reason = pytorch_versions(args.torch_python)
        print(versions or reason)
        if reason:
            args.frameworks.remove("torch")
    print(f"`{command(__file__, argv)}`", flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        job = prepare(args, folder)
    name = args.shape or args.model.name
    lengths = args.data.name if args.data else ", ".join(args.lengths)
    results = {}
    for size in args.batch_size:
        results[size] = measure(args, job, size, folder)
        title = f"{name}, {lengths}: {job.count} pairs, {job.tokens:,} tokens in both "
        title += f"sequences, batch {size}, LoRA rank {args.rank}"
        print("\n".join(table(title, results[size])) + "\n", flush=True)
    return results


def main(argv: list[str] | None = None) -> dict[int, dict]:
    """Measure every batch size that was asked for."""
    args = build_parser().parse_args(argv)
    if args.data and args.shape and not args.tokenizer:
        raise ValueError("--data with --shape needs a --tokenizer.")
    if args.output:
        args.output.mkdir(parents=True)
        return measure_all(args, args.output.resolve(), argv)
    with tempfile.TemporaryDirectory() as folder:
        return measure_all(args, Path(folder), argv)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"{error}")
