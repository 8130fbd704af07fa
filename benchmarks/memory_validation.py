# Copyright © 2026 MLX Contributors

"""The predicted peak memory of a DPO step beside the measured one.

One process a row, so that none starts with another's memory.

    python benchmarks/memory_validation.py --model SMOLLM2
"""

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from dpo_benchmark import synthetic_pairs
from dpo_report import machine
from mlx.utils import tree_flatten

from mlx_lm.dpo import resolve_args
from mlx_lm.preference.batch.collate import iterate_preference_batches
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.forward.recompute import keyed_layers
from mlx_lm.preference.policy.masters import with_master_weights
from mlx_lm.preference.policy.model import load_model
from mlx_lm.preference.run.forecast import predict_run
from mlx_lm.preference.run.plan import training_plan
from mlx_lm.preference.run.setup import make_policy, training_args
from mlx_lm.tuner.trainer import training_step


def peaks(
    model: nn.Module,
    reference: Any,
    optimizer: Any,
    pairs: Any,
    settings: Any,
    steps: int,
) -> Iterator[tuple[int, float]]:
    """Run steps on one batch of all pairs; give each one's peak in bytes and seconds."""
    # One at a time: all weights in another type may not fit beside these.
    for _, x in tree_flatten(model.parameters()):
        mx.eval(x)
    step, state = training_step(model, optimizer, settings)
    plan = training_plan(pairs, settings, in_order=True)
    ((_, batch),) = iterate_preference_batches(pairs, len(pairs), plan)
    mx.eval(state, batch)
    model.train()
    with keyed_layers(model, settings.grad_checkpoint):
        for _ in range(steps):
            gc.collect()
            mx.reset_peak_memory()
            start = time.perf_counter()
            values = step(reference, batch, True)
            mx.eval(state, values)
            yield mx.get_peak_memory(), time.perf_counter() - start
            del values


def measure(args: argparse.Namespace) -> None:
    """Predict, then run two steps; print a row of the table."""
    (kind,), (size,), (length,) = args.kinds, args.batch_size, args.lengths
    given = ["--train", "--model", args.model, "--fine-tune-type", kind]
    options = resolve_args([*given, "--batch-size", str(size)])
    options.grad_checkpoint = args.checkpoint == ["yes"]
    model, _ = load_model(args.model)
    options.num_layers = min(options.num_layers, len(model.layers))
    make_policy(options, model)
    reference = FrozenStart(model)
    optimizer = with_master_weights(optim.Adam(1e-5), model)
    half = length // 2
    pairs = synthetic_pairs(half, length - half, size, 1000, 0)
    settings = replace(training_args(options), sharing=args.sharing)
    estimate = predict_run(model, reference, optimizer, pairs, settings)
    run = model, reference, optimizer, pairs, settings
    measured = max(peak for peak, _ in peaks(*run, steps=2))
    cells = [kind, args.checkpoint[0], f"{size} x {length}"]
    cells += [f"{x / 1e9:.3f}" for x in (estimate.total, measured)]
    cells.append(f"{estimate.total / measured - 1:+.1%}")
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure one row, or start a process for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="a folder or a Hugging Face repo")
    add("--kinds", nargs="+", default=["lora", "dora", "full"])
    add("--checkpoint", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    add("--batch-size", nargs="+", type=int, default=[1])
    add("--lengths", nargs="+", type=int, default=[96, 256])
    add("--sharing", default="equal", help="how prompts are shared")
    args = parser.parse_args()
    columns = [args.kinds, args.checkpoint, args.batch_size, args.lengths]
    table = list(product(*columns))
    if len(table) == 1:
        measure(args)
        return
    print(machine(str(mx.default_device()), "mlx", "mlx-lm"))
    print(
        "| trained | checkpoints | batch x tokens | predicted GB | measured | error |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    names = ("--kinds", "--checkpoint", "--batch-size", "--lengths")
    for row in table:
        options = [str(x) for pair in zip(names, row) for x in pair]
        options += ["--model", args.model, "--sharing", args.sharing]
        subprocess.run([sys.executable, __file__, *options], check=True)


if __name__ == "__main__":
    main()
