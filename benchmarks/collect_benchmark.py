# Copyright © 2026 MLX Contributors

"""Rounds of generating, judging and training, beside training on the first round alone.

A function judges: half a point for an answer that names what was asked, half for one of
at most 40 words. What is held out is only measured. ``--throughput`` times generation
instead: answers a minute by batch size, and what a prompt's cache saves.

    python benchmarks/collect_benchmark.py --model SmolLM2-135M-Instruct --out rounds
    python benchmarks/collect_benchmark.py --model SmolLM2-135M-Instruct --throughput
"""

import argparse
import copy
import json
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from collect_prompts import prompts

from mlx_lm import dpo
from mlx_lm.generate import stream_generate
from mlx_lm.preference.collect import generate
from mlx_lm.preference.collect.answers import Answers, read_answers
from mlx_lm.preference.collect.generate import (
    Sampling,
    answer_prompts,
    encode_prompts,
    load_answering_model,
    summed_logps,
)
from mlx_lm.preference.collect.prompts import PromptRow, read_prompts
from mlx_lm.sample_utils import make_sampler

MOST_WORDS = 40
# Of a busy machine, seconds of the processor tell more: --cpu-time.
CLOCK = time.perf_counter
JUDGE = f"""\
def score(prompt, responses, row):
    names = [row["subject"] in text.lower() for text in responses]
    is_short = [len(text.split()) <= {MOST_WORDS} for text in responses]
    return [0.5 * a + 0.5 * b for a, b in zip(names, is_short)]
"""


def prepare(out: Path, args: argparse.Namespace) -> dict:
    """Write prompts and judge; the settings of the rounds."""
    out.mkdir(parents=True, exist_ok=True)
    for name, held_out in (("train", False), ("held_out", True)):
        lines = "".join(json.dumps(row) + "\n" for row in prompts(held_out))
        (out / f"{name}.jsonl").write_text(lines)
    (out / "judge.py").write_text(JUDGE)
    return {
        "model": args.model,
        "adapter_path": str(out / "run"),
        "rounds": args.rounds,
        "prompts": str(out / "train.jsonl"),
        "held_out_prompts": str(out / "held_out.jsonl"),
        "judge": f"function:{out / 'judge.py'}:score",
        "samples": args.samples,
        "max_tokens": args.max_tokens,
        "generate_batch_size": args.batch_size,
        "epochs_per_round": 1,
        "learning_rate": args.learning_rate,
        "num_layers": 8,
        "seed": 0,
    }


def run_rounds(settings: dict) -> None:
    """Train in rounds, or go on where they ended."""
    folder = settings["adapter_path"]
    if (Path(folder) / "adapter_config.json").exists():
        settings = {"resume": folder}
    dpo.run(SimpleNamespace(**settings, explicit={*settings}))


def run_offline(out: Path, settings: dict) -> None:
    """As many pairs as all rounds have, out of the first one again and again."""
    if (out / "offline" / "adapters.safetensors").exists():
        return
    pairs = out / "run" / "pairs"
    counts = [len(p.read_text().splitlines()) for p in pairs.glob("*/train.jsonl")]
    kept = ("model", "learning_rate", "num_layers", "seed")
    given = {name: settings[name] for name in kept}
    given |= {"data": str(pairs / "round-1"), "train": True}
    given |= {"adapter_path": str(out / "offline"), "iters": sum(counts) // 4}
    dpo.run(SimpleNamespace(**given, explicit={*given}))


def held_out_answers(out: Path, settings: dict) -> dict[str, list[Answers]]:
    """The start's, each round's and the offline run's answers."""
    found: dict[str, list[Answers]] = {}
    for at in range(settings["rounds"] + 1):
        name = f"after round {at}" if at else "start"
        with suppress(Exception):
            answers = read_answers(out / "run" / "held_out", at)
            found |= {name: answers} if answers else {}
    if (out / "offline" / "adapters.safetensors").exists():
        model, tokenizer = load_answering_model(settings["model"], str(out / "offline"))
        rows = read_prompts(out / "held_out.jsonl")
        (out / "offline_answers").mkdir(exist_ok=True)
        sampling = Sampling(
            1, 1.0, 1.0, settings["max_tokens"], settings["generate_batch_size"]
        )
        found["round 1 alone"] = answer_prompts(
            out / "offline_answers", rows, model, tokenizer, sampling, 1
        )
    return found


def report(out: Path, settings: dict) -> None:
    """A table of what was held out."""
    judge: dict = {}
    exec(JUDGE, judge)
    model, tokenizer = load_answering_model(settings["model"])
    print(
        "| | score | names it | at most 40 words | tokens | EOS | KL, nats an answer |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, answers in held_out_answers(out, settings).items():
        said = [line.responses[0] for line in answers]
        rows = [line.row for line in answers]
        scores = [
            judge["score"](None, [one.text], row)[0] for one, row in zip(said, rows)
        ]
        named = [row["subject"] in one.text.lower() for one, row in zip(said, rows)]
        short = [len(one.text.split()) <= MOST_WORDS for one in said]
        asked = [PromptRow(line.id, line.prompt, line.row) for line in answers]
        ids = [p.ids for p in encode_prompts(asked, tokenizer, model, 0)]
        kl = [
            one.logps - summed_logps(model, prompt, one.tokens)
            for one, prompt in zip(said, ids)
        ]
        error = 1.96 * np.std(scores, ddof=1) / len(scores) ** 0.5
        cells = [name, f"{np.mean(scores):.3f} ± {error:.3f}"]
        cells += [f"{np.mean(named):.0%}", f"{np.mean(short):.0%}"]
        cells += [f"{np.mean([len(one.tokens) for one in said]):.0f}"]
        cells += [
            f"{np.mean([one.finished for one in said]):.0%}",
            f"{np.mean(kl):.2f}",
        ]
        print("| " + " | ".join(cells) + " |")


def one_by_one(
    model: Any, tokenizer: Any, encoded: list[Any], args: argparse.Namespace
) -> float:
    """Answers a minute of ``mlx_lm.generate``, each with its own prefill."""
    sampler, tic = make_sampler(temp=1.0), CLOCK()
    for prompt in encoded:
        for _ in stream_generate(
            model, tokenizer, prompt.ids, max_tokens=args.max_tokens, sampler=sampler
        ):
            pass
    return len(encoded) * 60 / (CLOCK() - tic)


def throughput(args: argparse.Namespace) -> None:
    """Answers a minute by batch size; the share of time a prompt's cache saves."""
    model, tokenizer = load_answering_model(args.model)
    # Every answer has as many tokens: none ends by itself.
    tokenizer._eos_token_ids = {10**6}
    rows = [PromptRow(x["id"], x["prompt"], x) for x in prompts(False)][: args.prompts]
    encoded = encode_prompts(rows, tokenizer, model, args.max_tokens)
    print("| | answers a minute | tokens/s |\n|---|---|---|")
    rate = one_by_one(model, tokenizer, encoded[: max(args.prompts // 4, 2)], args)
    show = lambda name, rate: print(
        f"| {name} | {rate:.1f} | {rate * args.max_tokens / 60:.1f} |", flush=True
    )
    show("`mlx_lm.generate`, one by one", rate)
    for size in args.batch_sizes:
        count = min(args.prompts, max(2 * size // args.samples, 1))
        sampling = Sampling(args.samples, max_tokens=args.max_tokens, batch_size=size)
        if size == 1:
            sampling = Sampling(1, max_tokens=args.max_tokens, batch_size=1)
        tic = CLOCK()
        group = encoded[:count]
        done = sum(
            len(found)
            for _, found in generate._answer(group, model, tokenizer, sampling, 0)
        )
        show(f"batch {size}", done * 60 / (CLOCK() - tic))
    long = (tokenizer.encode("A long story of nothing. ") * 400)[: args.long]
    seconds = {}
    for name, batch in (("one prefill", 1), ("one each", args.samples)):
        tic = CLOCK()
        for _ in range(batch):
            mx.eval([c.state for c in generate._prefill(model, long)])
        seconds[name] = CLOCK() - tic
    tic = CLOCK()
    sampling = Sampling(
        args.samples, max_tokens=args.max_tokens, batch_size=args.samples
    )
    row = generate._Encoded(PromptRow("long", "long"), long)
    list(generate._answer([row], model, tokenizer, sampling, 0))
    whole = CLOCK() - tic
    saved = seconds["one each"] - seconds["one prefill"]
    print(
        f"\n{args.long:,}-token prompt, {args.samples} samples of {args.max_tokens} "
        f"tokens: {whole:.1f} s with one prefill ({seconds['one prefill']:.1f} s), "
        f"{whole + saved:.1f} s with one each: {saved / (whole + saved):.0%} saved."
    )


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True)
    add("--out", type=Path, default=Path("rounds"))
    add("--rounds", type=int, default=3)
    add("--samples", type=int, default=4)
    add("--max-tokens", type=int, default=64)
    add("--batch-size", type=int, default=60)
    add("--learning-rate", type=float, default=2e-4)
    add("--throughput", action="store_true")
    add("--prompts", type=int, default=16, help="of --throughput")
    add("--long", type=int, default=1000, help="tokens of its long prompt")
    add("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    add("--cpu-time", action="store_true", help="Time by the processor's seconds.")
    add("--report", action="store_true", help="Only print what there is so far.")
    args = parser.parse_args()
    if args.cpu_time:
        global CLOCK
        CLOCK = time.process_time
    if args.throughput:
        throughput(args)
        return
    settings = prepare(args.out, args)
    if not args.report:
        run_rounds(copy.copy(settings))
        run_offline(args.out, settings)
    report(args.out, settings)


if __name__ == "__main__":
    main()
