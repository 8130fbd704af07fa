# Copyright © 2026 MLX Contributors

"""A reference with fewer bits: what it saves, and how far its log-probs are off.

python benchmarks/quantized_reference.py --model MODEL --bits 4
"""

import argparse
import gc
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from dpo_benchmark import Pairs
from dpo_report import machine
from mlx.utils import tree_flatten

import mlx_lm
from mlx_lm.preference.batch.buckets import plan_batches
from mlx_lm.preference.batch.collate import iterate_preference_batches
from mlx_lm.preference.batch.shape import pair_lengths
from mlx_lm.preference.step import reference_pass
from mlx_lm.tuner.datasets import load_preference_dataset
from mlx_lm.utils import load

EXAMPLES = str(Path(mlx_lm.__file__).parent / "examples" / "preferences")


def score(
    path: str, bits: int | None, group: int, pairs: Pairs
) -> tuple[np.ndarray, float, float, float]:
    """Log-probs (n, 2) of all pairs; seconds; bytes of the weights and at the peak."""
    model = load(path, lazy=True)[0]
    if bits:
        nn.quantize(model, group, bits)
    model.eval()
    mx.eval(model.parameters())
    weights = sum(x.nbytes for _, x in tree_flatten(model.parameters()))
    gc.collect()
    mx.reset_peak_memory()
    start = time.perf_counter()
    logps = np.zeros((len(pairs), 2))
    for indices, batch in iterate_preference_batches(
        pairs, 1, plan_batches(pairs, 1, "equal", min_batches=1)
    ):
        logps[indices] = (
            np.array(reference_pass(None, model, batch)[0]).reshape(2, -1).T
        )
    return logps, time.perf_counter() - start, weights, mx.get_peak_memory()


def main() -> None:
    """Score some pairs with both models; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="the policy's start")
    add("--bits", type=int, default=4, help="of the reference's weights")
    add("--group-size", type=int, default=64, help="weights with one scale")
    add("--data", default=EXAMPLES, help="pairs")
    add("--pairs", type=int, default=4, help="how many to score")
    args = parser.parse_args()
    tokenizer = load(args.model, lazy=True)[1]
    dataset = load_preference_dataset(
        args.data, tokenizer, max_length=256, token_cache=False
    )[0]
    pairs = Pairs(dataset[i] for i in range(args.pairs))
    prompts, chosen, rejected = pair_lengths(pairs).T
    tokens = chosen + rejected - 2 * prompts
    print(machine(str(mx.default_device()), "mlx", "mlx-lm"))
    print(f"{len(pairs)} pairs, {tokens.sum()} answer tokens")
    print(
        "| reference | weights GB | peak GB | s a pair | nats a token | margin, nats |"
    )
    print("|---|---|---|---|---|---|")
    exact = None
    for bits in (None, args.bits):
        logps, seconds, weights, peak = score(args.model, bits, args.group_size, pairs)
        exact = logps if exact is None else exact
        off = np.abs(logps - exact)
        margins = np.abs(np.diff(logps - exact)).mean()
        name = f"{bits}-bit" if bits else "as it is"
        cells = [name, f"{weights / 1e9:.3f}", f"{peak / 1e9:.3f}"]
        cells += [f"{seconds / len(pairs):.2f}", f"{off.sum() / tokens.sum():.4f}"]
        print(f"| {' | '.join(cells)} | {margins:.3f} |", flush=True)


if __name__ == "__main__":
    main()
