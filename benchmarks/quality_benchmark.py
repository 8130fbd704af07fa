# Copyright © 2026 MLX Contributors

"""
Does a model prefer what was chosen, on real pairs that it has not seen?

One file of pairs is split in its own order: the first for training, the last for the
test, which is reported once, and those between them, if asked for, for validation.
Each seed trains an adapter from the same start with ``mlx_lm.dpo`` and tests it. What
is there is not trained again, so that a run that was cut off goes on.

    python benchmarks/quality_benchmark.py --model MODEL --data pairs.jsonl.gz \\
        --train 1500 --test 200 --seeds 0 1 2
"""

import argparse
import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mlx_lm import dpo
from mlx_lm.preference.files import replace_file

# What a table's columns are called, where they come from, and how they are written.
COLUMNS: dict[str, tuple[str, str]] = {
    "reward accuracy": ("rewards/accuracies", "{:.1%}"),
    "chosen likelier": ("logps/accuracies", "{:.1%}"),
    "margin": ("rewards/margins", "{:+.3f}"),
    "KL a chosen answer": ("kl_per_answer/chosen", "{:.2f}"),
    "KL a token": ("kl", "{:.4f}"),
    "perplexity of chosen": ("perplexity/policy", "{:.2f}"),
    "ordinary text": ("retained_text/change", "{:+.1%}"),
}


def read_lines(path: Path) -> list[str]:
    """The rows of a JSONL file, or of a JSON list, compressed or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        text = file.read()
    if text.lstrip().startswith("["):
        return [json.dumps(row) for row in json.loads(text)]
    # Not splitlines: JSON may hold other ends of lines as they are.
    return [line for line in text.split("\n") if line.strip()]


def write_lines(file: Path, lines: list[str]) -> None:
    """Write a JSONL file, whole or not at all: another process may read it."""
    text = "\n".join(lines) + "\n"
    replace_file(file, lambda name: Path(name).write_text(text, "utf-8"))


def split(path: Path, folder: Path, train: int, valid: int, test: int) -> Path:
    """Write the parts of a file where ``mlx_lm.dpo`` finds them."""
    rows = read_lines(path)
    if len(rows) < train + valid + test:
        raise ValueError(
            f"{path} has {len(rows)} rows, fewer than {train} + {valid} + {test}."
        )
    parts = {
        "train": rows[:train],
        "valid": rows[train : train + valid],
        "test": rows[-test:],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        file = folder / f"{name}.jsonl"
        if part:
            write_lines(file, part)
        else:
            # Of an earlier split it would be taken for one of this.
            file.unlink(missing_ok=True)
    return folder


def settings(args: argparse.Namespace, data: Path, seed: int) -> dict[str, Any]:
    """A run's settings: LoRA on all layers, a cosine to 0 in one epoch."""
    updates = -(-args.train * args.epochs // args.batch_size)
    return {
        "model": str(args.model),
        "train": True,
        "test": True,
        "test_batches": -1,
        "data": str(data),
        "num_layers": -1,
        "lora_parameters": {"rank": args.rank, "scale": args.scale, "dropout": 0.0},
        "optimizer": "adamw",
        "learning_rate": args.learning_rate,
        "lr_schedule": {
            "name": "cosine_decay",
            "arguments": [args.learning_rate, updates],
        },
        "batch_size": args.batch_size // args.accumulate,
        "grad_accumulation_steps": args.accumulate,
        "epochs": args.epochs,
        "max_seq_length": args.max_seq_length,
        "beta": args.beta,
        "loss_type": args.loss_type,
        "valid_fraction": 0.0,
        "retain_data": str(args.retain_data) if args.retain_data else None,
        "seed": seed,
        "adapter_path": str(args.output / f"seed{seed}"),
    }


def table(results: dict[int, dict[str, float]]) -> str:
    """A row for each seed, then their mean and the spread from least to most."""
    known = {
        k: v for k, v in COLUMNS.items() if all(v[0] in r for r in results.values())
    }
    lines = [f"| seed | {' | '.join(known)} |", "|---" * (len(known) + 1) + "|"]
    for seed, found in results.items():
        cells = [form.format(found[key]) for key, form in known.values()]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    cells = []
    for key, form in known.values():
        values = [found[key] for found in results.values()]
        low, high = form.format(min(values)), form.format(max(values))
        cells.append(f"{form.format(np.mean(values))} ({low} to {high})")
    return "\n".join([*lines, f"| mean | {' | '.join(cells)} |"])


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Quality on held-out pairs.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="A file of pairs.")
    parser.add_argument("--output", type=Path, default=Path("quality"))
    parser.add_argument("--train", type=int, default=1500, help="The first pairs.")
    parser.add_argument("--valid", type=int, default=0, help="Those that follow.")
    parser.add_argument("--test", type=int, default=200, help="The last pairs.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16, help="Pairs an update.")
    parser.add_argument("--accumulate", type=int, default=4, help="Batches an update.")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--loss-type", default="sigmoid")
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--retain-data", type=Path, help="Ordinary text, see DPO.md.")
    return parser


def main(argv: list[str] | None = None) -> dict[int, dict[str, float]]:
    """Train and test every seed, and print the table."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.batch_size % args.accumulate:
        parser.error(f"--accumulate {args.accumulate} does not divide --batch-size.")
    data = split(args.data, args.output / "data", args.train, args.valid, args.test)
    results = {}
    for seed in args.seeds:
        run = settings(args, data, seed)
        metrics = Path(run["adapter_path"]) / "test_metrics.json"
        if not metrics.exists():
            given = {k: v for k, v in run.items() if v is not None}
            dpo.run(SimpleNamespace(**given))
        results[seed] = json.loads(metrics.read_text("utf-8"))
    print(table(results))
    return results


if __name__ == "__main__":
    main()
