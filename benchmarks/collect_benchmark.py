# Copyright © 2026 MLX Contributors

"""Rounds of generating, judging and training, beside as much training on one round.

A function judges: half a point for an answer that names what was asked, and half for one
that besides is whole and has 10 to 40 words. What is held out is only measured. Offline
is as many answers, pairs and steps as all rounds have, but of answers of the start.
``--throughput`` times generation instead: answers a minute by batch size, and what a
prompt's cache saves.

    python benchmarks/collect_benchmark.py --model SmolLM2-135M-Instruct --out rounds
    python benchmarks/collect_benchmark.py --model SmolLM2-135M-Instruct --throughput
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import yaml
from collect_prompts import prompts

from mlx_lm import dpo
from mlx_lm.generate import stream_generate
from mlx_lm.preference.collect import generate
from mlx_lm.preference.collect.answers import Answers, append_answers, read_answers
from mlx_lm.preference.collect.feature import ROUNDS
from mlx_lm.preference.collect.generate import (
    Sampling,
    answer_prompts,
    encode_prompts,
    load_answering_model,
    summed_logps,
)
from mlx_lm.preference.collect.judges import label_answers
from mlx_lm.preference.collect.labels import read_labels
from mlx_lm.preference.collect.pairs import make_rows
from mlx_lm.preference.collect.prompts import PromptRow, read_prompts
from mlx_lm.preference.device import prepare_backend
from mlx_lm.preference.files import json_text, user_cache_folder
from mlx_lm.sample_utils import make_sampler

FEWEST_WORDS, MOST_WORDS = 10, 40
# Of a busy machine, seconds of the processor tell more: --cpu-time.
CLOCK = time.perf_counter
JUDGE = f"""\
def is_named(text, row):
    return row["subject"] in text.lower()

def is_short(text):
    is_whole = text.rstrip().endswith((".", "!", "?"))
    return is_whole and {FEWEST_WORDS} <= len(text.split()) <= {MOST_WORDS}

def score(prompt, responses, row):
    return [is_named(x, row) * (0.5 + 0.5 * is_short(x)) for x in responses]
"""
SAMPLING = ("samples", "temperature", "top_p", "max_tokens", "seed")


def prepare(out: Path, args: argparse.Namespace, seed: int) -> dict:
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
        "seed": seed,
        **{k: yaml.safe_load(x) for k, x in (text.split("=", 1) for text in args.set)},
    }


def run_rounds(settings: dict) -> None:
    """Train in rounds, or go on where they ended."""
    folder = settings["adapter_path"]
    if (Path(folder) / "adapter_config.json").exists():
        settings = {"resume": folder}
    dpo.run(SimpleNamespace(**settings, explicit={*settings}))


def sampling_of(settings: dict) -> Sampling:
    """How the rounds sample their answers."""
    given = {name: settings[name] for name in SAMPLING if name in settings}
    return Sampling(**given, batch_size=settings["generate_batch_size"])


def size_of_rounds(out: Path, rounds: int) -> tuple[int, int]:
    """How many pairs all rounds trained on, and in how many steps."""
    pairs = steps = 0
    for number in range(1, rounds + 1):
        rows = (out / "run" / "pairs" / f"round-{number}" / "train.jsonl").read_text()
        pairs += rows.count("\n")
        log = (out / "run" / f"round-{number}" / "metrics.jsonl").read_text()
        steps += max(json.loads(line)["iteration"] for line in log.splitlines())
    return pairs, steps


def run_offline(out: Path, settings: dict) -> None:
    """As many answers, pairs and steps as all rounds have, out of the start's answers."""
    folder = out / "offline"
    if (folder / "run" / "adapters.safetensors").exists():
        return
    folder.mkdir(exist_ok=True)
    pairs, steps = size_of_rounds(out, settings["rounds"])
    model, tokenizer = load_answering_model(settings["model"])
    rows = read_prompts(settings["prompts"])
    if not (folder / "answers.jsonl").exists():
        # The start gave those of the first round, too.
        for given_first in read_answers(out / "run" / "collected", 0):
            append_answers(folder, given_first)
    for number in range(settings["rounds"]):
        sampling = sampling_of(settings)
        answer_prompts(folder, rows, model, tokenizer, sampling, number)
    label_answers(folder, settings["judge"])
    which = settings.get("pairs", "best")
    answers = read_answers(folder)
    found, _ = make_rows(answers, read_labels(folder, answers), which)
    order = np.random.default_rng(settings["seed"]).permutation(len(found))[:pairs]
    lines = "".join(json_text(found[i]) + "\n" for i in sorted(order.tolist()))
    (folder / "train.jsonl").write_text(lines)
    print(f"Offline: {len(order)} pairs (the rounds {pairs}), {steps} steps.")
    given = {k: x for k, x in settings.items() if k not in ROUNDS}
    given |= {"data": str(folder), "train": True, "iters": steps}
    given |= {"adapter_path": str(folder / "run")}
    dpo.run(SimpleNamespace(**given, explicit={*given}))


def held_out_answers(out: Path, settings: dict) -> Iterator[tuple[str, list[Answers]]]:
    """The start's, each round's and the offline run's answers."""
    for at in range(settings["rounds"] + 1):
        name = f"after round {at}" if at else "start"
        if (out / "run" / "held_out" / "answers.jsonl").exists():
            if answers := read_answers(out / "run" / "held_out", at):
                yield name, answers
    run = out / "offline" / "run"
    if (run / "adapters.safetensors").exists():
        model, tokenizer = load_answering_model(settings["model"], str(run))
        rows = read_prompts(out / "held_out.jsonl")
        (out / "offline_answers").mkdir(exist_ok=True)
        sampling = sampling_of({**settings, "samples": 1})
        yield "offline", answer_prompts(
            out / "offline_answers", rows, model, tokenizer, sampling, 1
        )


def facts_of(answers: list[Answers], model: Any, tokenizer: Any) -> np.ndarray:
    """A row of numbers for each answer: those of the table. Shape: ``(n, 6)``."""
    judge: dict = {}
    exec(JUDGE, judge)
    asked = [PromptRow(line.id, line.prompt, line.row) for line in answers]
    rows = []
    for line, prompt in zip(answers, encode_prompts(asked, tokenizer, model, 0)):
        said = line.responses[0]
        rows.append(
            [
                judge["score"](None, [said.text], line.row)[0],
                judge["is_named"](said.text, line.row),
                judge["is_short"](said.text),
                len(said.tokens),
                said.finished,
                said.logps - summed_logps(model, prompt.ids, said.tokens),
            ]
        )
    return np.array(rows, float)


def report(runs: dict[Path, dict]) -> None:
    """A table of what was held out: means of the seeds, intervals over the prompts."""
    model, tokenizer = load_answering_model(next(iter(runs.values()))["model"])
    found: dict[str, list[np.ndarray]] = {}
    for out, settings in runs.items():
        for name, answers in held_out_answers(out, settings):
            print(f"{out.name}: measuring {name}.", flush=True)
            found.setdefault(name, []).append(facts_of(answers, model, tokenizer))
    words = f"whole, {FEWEST_WORDS} to {MOST_WORDS} words"
    print(f"| | score | of each seed | names it | {words} | tokens | EOS | KL, nats |")
    print("|---|---|---|---|---|---|---|---|")
    for name, seeds in found.items():
        mean = np.mean(seeds, axis=0)
        error = 1.96 * mean[:, 0].std(ddof=1) / len(mean) ** 0.5
        score, named, short, tokens, ended, kl = mean.mean(axis=0)
        cells = [name, f"{score:.3f} ± {error:.3f}"]
        cells += [", ".join(f"{one[:, 0].mean():.2f}" for one in seeds)]
        cells += [f"{named:.0%}", f"{short:.0%}", f"{tokens:.0f}", f"{ended:.0%}"]
        print(f"| {' | '.join([*cells, f'{kl:.2f}'])} |")
    whole = {k: x for k, x in found.items() if len(x) == len(runs)}
    for one, other in combinations(whole, 2):
        gain = np.mean(whole[other], axis=0)[:, 0] - np.mean(whole[one], axis=0)[:, 0]
        error = 1.96 * gain.std(ddof=1) / len(gain) ** 0.5
        print(f"{other} minus {one}: {gain.mean():+.3f} ± {error:.3f}")


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
        group = encoded[:count]
        # Once before, so that no kernel is built in the time that is measured.
        short = replace(sampling, max_tokens=4)
        list(generate._answer(group, model, tokenizer, short, 0))
        tic = CLOCK()
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
    add("--learning-rate", type=float, default=5e-5)
    add("--seeds", type=int, nargs="+", default=[0])
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of mlx_lm.dpo")
    add("--no-offline", action="store_true")
    add("--throughput", action="store_true")
    add("--prompts", type=int, default=16, help="of --throughput")
    add("--long", type=int, default=1000, help="tokens of its long prompt")
    add("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    add("--cpu-time", action="store_true", help="Time by the processor's seconds.")
    add("--report", action="store_true", help="Only print what there is so far.")
    args = parser.parse_args()
    # As the command does.
    prepare_backend(user_cache_folder("kernels"))
    if args.cpu_time:
        global CLOCK
        CLOCK = time.process_time
    if args.throughput:
        throughput(args)
        return
    runs = {}
    for seed in args.seeds:
        out = args.out / f"seed-{seed}"
        runs[out] = settings = prepare(out, args, seed)
        if not args.report:
            run_rounds(dict(settings))
        if not (args.report or args.no_offline):
            run_offline(out, settings)
    report(runs)


if __name__ == "__main__":
    main()
