# Copyright © 2026 MLX Contributors

"""Whether preference tuning moves the balance of a mixture's experts.

    python benchmarks/moe_balance.py --families qwen3_moe mixtral

A tiny mixture learns texts together with the router's balance loss, so that it starts
balanced. Then LoRA-DPO trains it on the pairs, once for each rate and set of keys. The
balance loss of held-out pairs is measured before and after, every token counted once:

    E * sum_i f_i P_i / k, the mean over layers,

where f_i is how often expert i is among a token's k, and P_i its mean softmax
probability, over all tokens (Switch Transformers, https://arxiv.org/abs/2101.03961, Eq.
4 to 6; over the whole batch as in https://arxiv.org/abs/2501.11873). It is 1 if all
experts have the same share. The last column is the norm of its gradient at 0.001, the
coefficient of transformers, in per cent of that of DPO's loss, at the start.
"""

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from shapes import random_model

from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.forward.answers import sequence_logps
from mlx_lm.preference.objective.objective import Objective
from mlx_lm.preference.step import loss_and_values
from mlx_lm.tuner.trainer import DPOTrainingArgs, evaluate_dpo, train_dpo
from mlx_lm.tuner.utils import linear_to_lora_layers

PAIRS = Path(__file__).parents[1] / "mlx_lm/examples/preferences"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 256, "rms_norm_eps": 1e-5}
SIZES |= {"rope_theta": 10000.0, "num_experts_per_tok": 2, "head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **SIZES,
        **{"num_experts": 8, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
        **{"intermediate_size": 128, "mlp_only_layers": [], "norm_topk_prob": True},
        **{"tie_word_embeddings": False, "max_position_embeddings": 512},
    },
    "mixtral": {**SIZES, "num_local_experts": 8, "intermediate_size": 32},
}
KEYS = {"attention": ["self_attn.q_proj", "self_attn.v_proj"], "all, router too": None}
COEFFICIENT, LONGEST = 1e-3, 96


class Pairs(list):
    """Pairs of bytes."""

    def pair_lengths(self) -> np.ndarray:
        """Where prompts and answers end."""
        return np.array([lengths for *_, lengths in self])


def read_pairs(split: str) -> Pairs:
    """The example's pairs, a token for each byte."""
    found = Pairs()
    for line in (PAIRS / f"{split}.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        texts = [row[name][-1]["content"] for name in ("prompt", "chosen", "rejected")]
        p, c, r = (list(text.encode()[:LONGEST]) for text in texts)
        found.append((p, c, r, (len(p), len(p) + len(c), len(p) + len(r))))
    return found


class Watched(nn.Module):
    """A router that hands on what it gives."""

    def __init__(self, gate: nn.Module, seen: list[mx.array]):
        super().__init__()
        self.gate, self._seen = gate, seen

    def __call__(self, x: mx.array) -> mx.array:
        logits = self.gate(x)
        self._seen.append(logits)
        return logits


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[list[mx.array]]:
    """Collect the routers' logits of a forward pass."""
    seen: list[mx.array] = []
    blocks = [m for _, m in model.named_modules() if "switch_mlp" in m and "gate" in m]
    gates = [block.gate for block in blocks]
    for block, gate in zip(blocks, gates):
        block.gate = Watched(gate, seen)
    try:
        yield seen
    finally:
        for block, gate in zip(blocks, gates):
            block.gate = gate


def balance(seen: list[mx.array], real: mx.array, k: int = 2) -> mx.array:
    """The balance loss of layers' logits, over the real tokens."""
    losses = []
    for logits in seen:
        logits = logits.astype(mx.float32)
        weights = real.reshape(*real.shape, 1) / real.sum()
        probabilities = mx.softmax(logits, axis=-1)
        kth = mx.sort(logits, axis=-1)[..., -k][..., None]
        share = mx.stop_gradient(((logits >= kth) * weights).sum((0, 1)))
        count = logits.shape[-1] / k
        losses.append(count * (share * (probabilities * weights).sum((0, 1))).sum())
    return sum(losses) / len(losses)


def rows_of(pairs: Pairs) -> tuple[mx.array, mx.array]:
    """Whole texts, and which of their tokens are real: a prompt once for each pair."""
    rows = [
        (p + a, 0 if i == 0 else len(p))
        for p, *ab, _ in pairs
        for i, a in enumerate(ab)
    ]
    width = max(len(tokens) for tokens, _ in rows)
    inputs, real = np.zeros((2, len(rows), width), np.int32)
    for i, (tokens, start) in enumerate(rows):
        inputs[i, : len(tokens)], real[i, start : len(tokens)] = tokens, 1
    return mx.array(inputs), mx.array(real).astype(mx.float32)


def measure(model: nn.Module, pairs: Pairs) -> float:
    """The balance loss of pairs."""
    inputs, real = rows_of(pairs)
    with watching(model) as seen:
        model(inputs)
        return balance(seen, real).item()


def pretrain(model: nn.Module, pairs: Pairs, steps: int) -> None:
    """Learn texts, chosen and rejected alike, with the balance loss at 0.01."""
    optimizer, rng = optim.Adam(3e-3), np.random.default_rng(0)

    def loss(model, inputs, real):
        with watching(model) as seen:
            logits = model(inputs[:, :-1])
            aux = balance(seen, real[:, :-1])
        nll = nn.losses.cross_entropy(logits, inputs[:, 1:]) * real[:, 1:]
        return nll.sum() / real[:, 1:].sum() + 0.01 * aux

    step = nn.value_and_grad(model, loss)
    for _ in range(steps):
        chosen = [pairs[i] for i in rng.integers(0, len(pairs), 8)]
        value, gradient = step(model, *rows_of(Pairs(chosen)))
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state, value)


def gradient_share(model: nn.Module, pairs: Pairs) -> float:
    """The balance loss's gradient beside DPO's at its start, a share of the norm."""
    batch = collate_pairs(list(pairs[:16]))
    reference = mx.stop_gradient(sequence_logps(model, batch))

    def dpo(model):
        logps = sequence_logps(model, batch, gradient=True)
        return loss_and_values(logps, reference, batch, Objective())[0] / 16

    def auxiliary(model):
        inputs, real = rows_of(Pairs(pairs[:16]))
        with watching(model) as seen:
            model(inputs)
            return COEFFICIENT * balance(seen, real)

    norms = []
    for loss in (auxiliary, dpo):
        _, gradient = nn.value_and_grad(model, loss)(model)
        norms.append(sum((g**2).sum() for _, g in tree_flatten(gradient)) ** 0.5)
    return (norms[0] / norms[1]).item()


def report(family: str, args: argparse.Namespace) -> None:
    """Print a row for each rate and set of keys."""
    train_set, held_out = read_pairs("train"), read_pairs("test")
    model = random_model(FAMILIES[family] | {"model_type": family})
    pretrain(model, train_set, args.pretrain)
    weights = tree_map(lambda x: x, model.parameters())
    for name, keys in KEYS.items():
        for rate in args.rates:
            model = random_model(FAMILIES[family] | {"model_type": family})
            model.update(weights)
            before = measure(model, held_out)
            model.freeze()
            shape = {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": keys}
            mx.random.seed(0)
            linear_to_lora_layers(model, 2, shape)
            share = gradient_share(model, train_set)
            with tempfile.TemporaryDirectory() as folder:
                settings = DPOTrainingArgs(
                    batch_size=4,
                    iters=args.iters,
                    steps_per_save=10**6,
                    adapter_file=f"{folder}/adapters.safetensors",
                )
                with contextlib.redirect_stdout(io.StringIO()):
                    train_dpo(model, optim.Adam(rate), train_set, None, settings)
            start = random_model(FAMILIES[family] | {"model_type": family})
            start.update(weights)
            test = evaluate_dpo(model, start, held_out)
            print(
                f"| {family} | {name} | {rate:g} | {before:.3f} | "
                f"{measure(model, held_out):.3f} | {test['rewards/accuracies']:.0%} | "
                f"{test['kl']:.2f} | {share:.2%} |",
                flush=True,
            )


def main() -> None:
    """Measure every family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=[*FAMILIES])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 1e-4, 1e-3])
    parser.add_argument("--iters", type=int, default=150)
    parser.add_argument("--pretrain", type=int, default=300)
    args = parser.parse_args()
    print("| family | keys | rate | before | after | accuracy | KL | share |")
    print("|---|---|---|---|---|---|---|---|")
    for family in args.families:
        report(family, args)


if __name__ == "__main__":
    main()
