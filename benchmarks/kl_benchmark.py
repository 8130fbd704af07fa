# Copyright © 2026 MLX Contributors

"""
How far from the start are adapters, and what does part of the way bring?

A LoRA adapter times a strength between 0 and 1 is a policy between the start and the
trained one, without training anew. Each is tested on the same held-out pairs; with
``--prompts`` it also answers some of their prompts twice, by sampling at temperature 1,
and the KL is taken on its own answers.

    python benchmarks/kl_benchmark.py --adapter-path A B C --data FOLDER \\
        --strengths 0.25 0.5 1 --prompts 50
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from quality_benchmark import COLUMNS

from mlx_lm.dpo import resolve_args
from mlx_lm.generate import batch_generate
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.policy.model import (
    load_model,
    read_weights,
)
from mlx_lm.preference.policy.start import load_weights
from mlx_lm.preference.report.evaluate import score_pairs
from mlx_lm.preference.run.layouts import find_sharing
from mlx_lm.preference.run.setup import load_data, make_policy, training_args
from mlx_lm.preference.settings.checks import fit_to_model
from mlx_lm.preference.settings.finished import finished_runs
from mlx_lm.sample_utils import make_sampler

SHOWN = (
    "reward accuracy",
    "chosen likelier",
    "KL a chosen answer",
    "KL a token",
    "perplexity of chosen",
)
HEADER = f"| adapter | strength | {' | '.join(SHOWN)} | KL an own answer | its tokens |"
HEADER += "\n" + "|---" * (len(SHOWN) + 4) + "|"
# Longer answers are cut off, which ends their KL there.
MOST_TOKENS = 128


def set_strength(model: nn.Module, scales: dict[str, float], strength: float) -> None:
    """Multiply the trained scale of every adapted layer."""
    modules = dict(model.named_modules())
    for name, scale in scales.items():
        modules[name].scale = scale * strength


def lora_scales(model: nn.Module) -> dict[str, float]:
    """The scale of every layer that has an adapter."""
    return {n: m.scale for n, m in model.named_modules() if hasattr(m, "lora_b")}


def own_answers(model: nn.Module, tokenizer: Any, prompts: list[list[int]]) -> list:
    """Sample two answers to each prompt, as pairs of token ids."""
    mx.random.seed(0)
    options = {"max_tokens": MOST_TOKENS, "return_token_ids": True}
    sampler = make_sampler(temp=1.0)
    found = batch_generate(model, tokenizer, prompts * 2, sampler=sampler, **options)
    ended = [tokenizer.eos_token_id]
    answers = [x + ended * (len(x) < MOST_TOKENS) for x in found.token_ids]
    pairs = []
    for prompt, *two in zip(prompts, answers, answers[len(prompts) :]):
        lengths = (len(prompt), *(len(prompt) + len(x) for x in two))
        pairs.append((np.array(prompt), *map(np.array, two), lengths))
    return pairs


def row(name: str, strength: float, found: dict[str, Any], own: list[float]) -> str:
    """A line of the table; ``own``: KL and length of the policy's answers, if any."""
    columns = [COLUMNS[title] for title in SHOWN]
    cells = [name, f"{strength:g}", *(form.format(found[k]) for k, form in columns)]
    cells += [f"{own[0]:.2f}", f"{own[1]:.0f}"] if own else ["-", "-"]
    return f"| {' | '.join(cells)} |"


def measure(run: Any, strengths: list[float], count: int, batch_size: int) -> list[str]:
    """Test one adapter at every strength; return the lines."""
    run.batch_size = batch_size
    model, tokenizer = load_model(run.model, run.trust_remote_code)
    fit_to_model(run, model)
    _, _, test_set = load_data(run, tokenizer)
    make_policy(run, model)
    start = FrozenStart(model)
    load_weights(model, Path(run.adapter_path) / "adapters.safetensors")
    read_weights(model, run.model)
    scales, lines = lora_scales(model), []
    if not scales:
        raise ValueError(f"{run.adapter_path} has no LoRA layers, which have a scale.")
    prompts = [test_set[i][0].tolist() for i in range(min(count, len(test_set)))]
    grade = find_sharing(run, model, start).grade
    settings = replace(training_args(run), sharing=grade)
    for strength in strengths:
        set_strength(model, scales, strength)
        found, _ = score_pairs(model, start, test_set, settings, run.test_batches)
        own = []
        if prompts:
            answers = own_answers(model, tokenizer, prompts)
            kl = score_pairs(model, start, answers, settings)[1].kl
            tokens = [len(answer) for pair in answers for answer in pair[1:3]]
            own = [float(kl.mean()), float(np.mean(tokens))]
        lines.append(row(Path(run.adapter_path).name, strength, found, own))
        print(lines[-1], flush=True)
    return lines


def main(argv: list[str] | None = None) -> list[str]:
    """Measure all adapters."""
    parser = argparse.ArgumentParser(description="KL and accuracy of adapters.")
    parser.add_argument("--adapter-path", nargs="+", required=True)
    parser.add_argument("--data", required=True, help="A folder with test.jsonl.")
    parser.add_argument("--model", help="Default: that of the runs.")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0])
    parser.add_argument("--prompts", type=int, default=0, help="How many to answer.")
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args(argv)
    given = ["--test", "--data", args.data, "--test-batches", "-1"]
    given += ["--model", args.model] if args.model else []
    settings = resolve_args(given)
    settings.adapter_path, lines = args.adapter_path, []
    for run in finished_runs(settings):
        lines += measure(run, args.strengths, args.prompts, args.batch_size)
    print("\n".join([HEADER, *lines]))
    return lines


if __name__ == "__main__":
    main()
