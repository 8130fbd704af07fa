# Copyright © 2026 MLX Contributors

"""Whether LoRA's gradient on sharded layers is that of the whole model.

    python benchmarks/tensor_parallel.py --ranks 2

Each rank has the whole model and, beside it, its part of one that mlx-lm's
``model.shard`` made, whose adapters are cut as their layers are. Both take the gradient
of DPO's loss on the same pairs: what a rank has of it is compared with that part of the
whole one, as it comes and after the sums over ranks that are missing.
"""

import argparse
import os
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from dpo_report import SHAPES
from mlx.nn.layers.distributed import AllToShardedLinear, sum_gradients
from mlx.utils import tree_flatten, tree_unflatten
from ranks_benchmark import launcher
from shapes import random_model

from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.forward.answers import sequence_logps
from mlx_lm.preference.objective.objective import Objective
from mlx_lm.preference.step import loss_and_values
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers

SCALE = 4.0


class ShardedLoRA(nn.Module):
    """LoRA on a rank's part of a layer, with its part of one of the matrices."""

    def __init__(self, linear: nn.Module, whole: LoRALinear):
        super().__init__()
        self.linear, self.scale = linear, whole.scale
        rank, size = linear.group.rank(), linear.group.size()
        # Outputs are cut with b, inputs with a; the other matrix is on every rank.
        self.cuts_outputs = isinstance(linear, AllToShardedLinear)
        part = lambda x, axis: mx.split(x, size, axis)[rank]
        a, b = whole.lora_a, whole.lora_b
        self.lora_a = a if self.cuts_outputs else part(a, 0)
        self.lora_b = part(b, 1) if self.cuts_outputs else b

    def __call__(self, x: mx.array) -> mx.array:
        group, y = self.linear.group, self.linear(x)
        if self.cuts_outputs:
            x = sum_gradients(group)(x)
            return y + self.scale * (x @ self.lora_a) @ self.lora_b
        # Fewer numbers between the matrices than after them.
        return y + self.scale * mx.distributed.all_sum(x @ self.lora_a, group=group) @ (
            self.lora_b
        )


def adapted(config: dict) -> nn.Module:
    """A model with adapters that are not at their start."""
    model = random_model(config)
    model.freeze()
    parameters = {"rank": 4, "scale": SCALE, "dropout": 0.0}
    linear_to_lora_layers(model, len(model.layers), parameters)
    rng = np.random.default_rng(1)
    for name, w in tree_flatten(model.trainable_parameters()):
        drawn = mx.array(0.1 * rng.standard_normal(w.shape).astype("f4"))
        model.load_weights([(name, drawn)], strict=False)
    return model


def sharded(config: dict, whole: nn.Module, group: mx.distributed.Group) -> nn.Module:
    """This rank's part of the model, its adapters put on after the layers are cut."""
    model = random_model(config)
    model.shard(group)
    model.freeze()
    layers = dict(model.named_modules())
    adapters = [(k, m) for k, m in whole.named_modules() if isinstance(m, LoRALinear)]
    model.update_modules(
        tree_unflatten([(k, ShardedLoRA(layers[k], m)) for k, m in adapters])
    )
    for _, module in model.named_modules():
        if isinstance(module, ShardedLoRA):
            module.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    return model


def loss_and_gradient(model: nn.Module, batch: dict) -> tuple[mx.array, dict]:
    """DPO's loss, with its prompts computed once, and the adapters' gradient."""

    def loss(model):
        logps = sequence_logps(model, batch, gradient=True)
        return loss_and_values(logps, batch["reference_logps"], batch, Objective())[0]

    value, gradient = nn.value_and_grad(model, loss)(model)
    return value, dict(tree_flatten(gradient))


def compare(shape: str) -> dict[str, float]:
    """The largest differences of losses and gradients, relative to the largest."""
    group = mx.distributed.init(strict=True)
    config = SHAPES[shape] | {"vocab_size": 64}
    rng = np.random.default_rng(2)
    row = lambda n: rng.integers(1, 64, n).tolist()
    rows = [(row(p), row(c), row(r)) for p, c, r in ((7, 5, 3), (4, 6, 8))]
    ends = [(len(p), len(p) + len(c), len(p) + len(r)) for p, c, r in rows]
    batch = collate_pairs([(*texts, end) for texts, end in zip(rows, ends)])
    batch["reference_logps"] = -4.0 * mx.arange(1.0, 5.0)
    whole = adapted(config)
    loss, gradient = loss_and_gradient(whole, batch)
    part, mine = loss_and_gradient(sharded(config, whole, group), batch)
    largest = max(g.abs().max().item() for g in gradient.values())
    found = {"loss": abs(loss - part).item(), "cut": 0.0, "alone": 0.0, "summed": 0.0}
    for name, g in gradient.items():
        own, far = mine[name], lambda x, g=g: (x - g).abs().max().item() / largest
        if own.shape != g.shape:
            axis = next(i for i in range(2) if own.shape[i] != g.shape[i])
            g = mx.split(g, group.size(), axis)[group.rank()]
            found["cut"] = max(found["cut"], (own - g).abs().max().item() / largest)
            continue
        found["alone"] = max(found["alone"], far(own))
        # A matrix before the cut gets a part of its gradient on each rank.
        if name.endswith("lora_a"):
            own = mx.distributed.all_sum(own, group=group)
        found["summed"] = max(found["summed"], far(own))
    return found


def build_parser() -> argparse.ArgumentParser:
    """The benchmark's command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--backend", default="ring")
    parser.add_argument("--shape", default="tiny", choices=SHAPES)
    return parser


def main() -> None:
    """Start the ranks, or be one of them."""
    args = build_parser().parse_args()
    if "MLX_RANK" not in os.environ:
        command = [*launcher(args.ranks, args.backend), "--", sys.executable]
        raise SystemExit(subprocess.call([*command, *sys.argv]))
    found = compare(args.shape)
    if mx.distributed.init().rank() == 0:
        print(" ".join(f"{name} {value:.1e}" for name, value in found.items()))


if __name__ == "__main__":
    main()
