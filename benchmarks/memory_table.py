# Copyright © 2026 MLX Contributors

"""The largest models that Macs can train with DPO, by the predictor of `mlx_lm.dpo`.

Nothing is allocated: the weights stay random and lazy. `--prove ROW` runs steps of a
row under an enforced limit, on the device that there is.

    python benchmarks/memory_table.py [--prove 1]
"""

import argparse
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from itertools import islice, takewhile
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from dpo_benchmark import synthetic_pairs
from dpo_report import SHAPES, machine
from memory_validation import peaks
from shapes import random_model

from mlx_lm.dpo import resolve_args
from mlx_lm.preference.forward import head as completion_head
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.policy.masters import with_master_weights
from mlx_lm.preference.run.forecast import describe_memory, predict_run
from mlx_lm.preference.run.setup import make_policy, training_args

# GiB of RAM, and the part of it that Metal recommends to use.
MACS = {8: 2 / 3, 16: 2 / 3, 32: 2 / 3, 64: 3 / 4}
MODELS = "qwen3-32b qwen3-14b qwen3-8b llama2-7b qwen3-4b qwen3-1.7b qwen3-0.6b".split()
MODELS.append("smollm2-135m")
# (pairs a batch, max_seq_length, grad_checkpoint), each asking for more than the last.
SETTINGS = [(1, 512, True), (1, 1024, True), (1, 2048, True), (2, 2048, True)]
SETTINGS += [(4, 2048, True), (4, 2048, False)]
# Rows that a CPU can run in minutes.
SMALL = [(8, "smollm2-135m", "float32", (2, 1024, False))]
SMALL += [(8, "qwen3-0.6b", "float32", (1, 512, True))]


def limit(ram: int) -> int:
    """Bytes that a run may use on such a Mac."""
    return int(ram * 2**30 * MACS[ram])


def chunks_of(ram: int) -> AbstractContextManager:
    """The head's chunks are as large as on such a Mac, until the end of the block."""
    size = min(max(ram * 2**30 // 128, 2**26), 2**29)
    return mock.patch.object(completion_head, "default_chunk_bytes", lambda: size)


def setup(shape: str, weights: str, options: tuple[int, int, bool]) -> tuple:
    """Policy, reference, optimizer, pairs and settings of a run; weights are lazy."""
    size, length, checkpoint = options
    model = random_model(SHAPES[shape])
    model.set_dtype(mx.float32 if weights == "float32" else mx.bfloat16)
    if weights == "4-bit":
        nn.quantize(model, 64, 4)
    args = resolve_args(["--train", "--batch-size", str(size)])
    args.max_seq_length, args.grad_checkpoint = length, checkpoint
    args.sharing = "equal"
    make_policy(args, model)
    optimizer = with_master_weights(optim.Adam(1e-5), model)
    pairs = synthetic_pairs(length // 2, length // 2, size, 1000, 0)
    return model, FrozenStart(model), optimizer, pairs, training_args(args)


@cache
def predicted(ram: int, shape: str, weights: str, options: tuple) -> int:
    """Bytes that a Mac's step takes at its peak: compiled, attention not fused."""
    model, reference, optimizer, pairs, settings = setup(shape, weights, options)
    settings = replace(settings, compile=True)
    with chunks_of(ram):
        return predict_run(model, reference, optimizer, pairs, settings).total


def rows() -> Iterator[tuple[int, str, str, tuple]]:
    """Small ones; each Mac's largest model at all, at 4 x 2048 tokens, in 16 bits."""
    yield from SMALL
    for ram in MACS:
        fits = lambda *run: predicted(ram, *run) <= limit(ram)
        models = MODELS
        for weights, least in (("4-bit", 0), ("4-bit", -2), ("bfloat16", 0)):
            shape = next(s for s in models if fits(s, weights, SETTINGS[least]))
            models = models[models.index(shape) :] if least == 0 else models
            fitting = takewhile(lambda o: fits(shape, weights, o), SETTINGS)
            yield ram, shape, weights, list(fitting)[-1]


def line(number: int, row: tuple[int, str, str, tuple]) -> str:
    """A row of the table."""
    ram, shape, weights, (size, length, checkpoint) = row
    text = f"{size} x {length}" + ", `grad_checkpoint`" * checkpoint
    cells = [number, f"{ram} GB ({limit(ram) / 1e9:.1f})", shape, weights, text]
    return f"| {' | '.join(map(str, cells))} | {predicted(*row) / 1e9:.2f} |"


def prove(ram: int, shape: str, weights: str, options: tuple, steps: int) -> None:
    """Run steps of a row with no more memory than the Mac would give."""
    mx.set_memory_limit(limit(ram))
    mx.set_cache_limit(limit(ram) // 8)
    mx.eval(mx.random.normal((512, 512)) @ mx.random.normal((512, 512)))
    if mx.default_device() != mx.gpu:
        # What exceeds it fails to be allocated.
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + limit(ram),) * 2)
    model, reference, optimizer, pairs, settings = setup(shape, weights, options)
    estimate = predict_run(model, reference, optimizer, pairs, settings)
    print(f"on this device {describe_memory(estimate)}")
    for peak, seconds in peaks(model, reference, optimizer, pairs, settings, steps):
        print(
            f"a step of {seconds:.1f} s, peak {peak / 1e9:.2f} GB of "
            f"{limit(ram) / 1e9:.2f} GB, predicted {estimate.total / peak - 1:+.1%}",
            flush=True,
        )
        if peak > limit(ram):
            sys.exit("The peak is above the limit.")


def main() -> None:
    """Print the table, or prove one of its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prove", type=int, help="number of a row to run")
    parser.add_argument("--steps", type=int, default=2, help="steps to run")
    args = parser.parse_args()
    print(machine(str(mx.default_device()), "mlx", "mlx-lm"))
    if args.prove:
        row = next(islice(rows(), args.prove - 1, None))
        print(line(args.prove, row))
        with chunks_of(row[0]):
            return prove(*row, args.steps)
    print("| row | Mac (usable GB) | model | weights | batch x tokens | predicted GB |")
    print(f"|{6 * '---|'}")
    for number, row in enumerate(rows()):
        print(line(number + 1, row), flush=True)


if __name__ == "__main__":
    main()
