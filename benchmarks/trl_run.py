# Copyright © 2026 MLX Contributors

"""One epoch of DPO in PyTorch as TRL runs it; a part of ``run_benchmark.py``.

Batches at random, padded to their longest, with a mask of attention; not compiled.
A first epoch asks the reference in every step and keeps what it said, for a run
where it is known. Every step is a line of a file of metrics, as ``mlx_lm.dpo`` has.
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from dpo_report import machine
from transformers import AutoModelForCausalLM
from trl_benchmark import (
    CUDA,
    add_trained_part,
    answer_logits_logps,
    autocast_context,
    dpo_loss,
    make_optimizer,
    reference,
    train_step,
)

DEVICE = "cuda" if CUDA else "cpu"


def describe() -> str:
    """Device and versions."""
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    return machine(name, "torch", "transformers", "peft")


def load_policy(args: argparse.Namespace) -> torch.nn.Module:
    """The folder's model with adapters."""
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype="auto", attn_implementation="sdpa"
    )
    return add_trained_part(model.to(DEVICE), args)


def collate(pairs: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention and scored positions, all chosen rows first."""
    rows = [(prompt, pair[side]) for side in (0, 1) for prompt, *pair in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = np.zeros((len(rows), width), np.int64)
    attention, scored = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    for i, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        tokens[i, :length] = prompt + answer
        attention[i, :length] = 1
        scored[i, len(prompt) : length] = True
    arrays = (tokens, attention, scored[:, 1:])
    tokens, attention, scored = (torch.from_numpy(a).to(DEVICE) for a in arrays)
    return tokens, attention, scored


def epoch(
    model: torch.nn.Module, pairs: list, known: torch.Tensor, size: int
) -> Iterator[tuple[int, float, float]]:
    """Take every step of an epoch; give its pairs, its seconds and its loss."""
    optimizer = make_optimizer(model)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    for chosen in order.split(size):
        start = time.perf_counter()
        tokens, attention, scored = collate([pairs[i] for i in chosen])
        logps = partial(answer_logits_logps, attention=attention)
        if known[chosen].isnan().any():
            with autocast_context(), reference(model):
                said = logps(model, tokens, scored)
            known[chosen] = said.reshape(2, -1).T
        batch = tokens, scored, known[chosen].T.reshape(-1)
        loss = train_step(model, optimizer, dpo_loss, batch, logps).item()
        yield len(chosen), time.perf_counter() - start, loss


def run(args: argparse.Namespace) -> None:
    """Train, and write a line a step."""
    pairs = json.loads(args.pairs.read_text("utf-8"))
    torch.manual_seed(args.seed)
    model = load_policy(args)
    known = torch.full((len(pairs), 2), torch.nan, device=DEVICE)
    if args.reference.exists():
        known = torch.from_numpy(np.load(args.reference)).to(DEVICE)
    trained = 0
    with open(args.metrics, "a", encoding="utf-8") as file:
        steps = epoch(model, pairs, known, args.batch_size)
        for i, (count, seconds, loss) in enumerate(steps, 1):
            trained += count
            peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0
            line = {
                "iteration": i,
                "train_loss": loss,
                "trained_pairs": trained,
                "pairs_per_second": count / seconds,
                "peak_memory": peak,
            }
            file.write(json.dumps(line) + "\n")
            file.flush()
    np.save(args.reference, known.cpu().numpy())


def main() -> None:
    """Train, or say what is installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--versions", action="store_true", help="say what is installed, and stop")
    add("--model", type=Path, help="a model folder")
    add("--pairs", type=Path, help="JSON: token ids of prompt, chosen, rejected")
    add("--metrics", type=Path, help="the file to write a line a step to")
    add("--reference", type=Path, help=".npy of log-probs, read or written")
    add("--batch-size", type=int, default=4, help="pairs a step")
    add("--num-layers", type=int, default=-1, help="trained layers, -1 for all")
    add("--rank", type=int, default=8, help="rank of the adapters")
    add("--fine-tune-type", choices=["lora", "dora"], default="lora")
    add("--grad-checkpoint", action="store_true", help="recompute layers")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.versions:
        print(describe())
    else:
        run(args)


if __name__ == "__main__":
    main()
