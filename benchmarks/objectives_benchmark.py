# Copyright © 2026 MLX Contributors

"""
One run of each preference objective: same pairs, same budget, one table.

    python benchmarks/objectives_benchmark.py --model MODEL

The settings are the quickstart's, but for those that ``OWN`` names. Every run starts
from the same adapter and sees the same pairs; all are tested on the same held-out
pairs. Log-ratios are compared without beta, so the columns mean the same in every row.
Results are kept after every run: a command that was cut off goes on.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from objectives_report import START, describe, row, section, write_section

import mlx_lm
from mlx_lm import batch_generate
from mlx_lm.dpo import resolve_args, train_model
from mlx_lm.preference.files import replace_file
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.objective.losses import LOSSES
from mlx_lm.preference.objective.objective import objective_of
from mlx_lm.preference.policy.model import load_model
from mlx_lm.preference.report.evaluate import score_pairs
from mlx_lm.preference.run.job import Job
from mlx_lm.preference.run.layouts import find_sharing
from mlx_lm.preference.run.setup import load_data, make_policy, training_args
from mlx_lm.preference.settings.checks import check_args, fit_to_model
from mlx_lm.tuner.utils import remove_lora_layers

EXAMPLES = Path(mlx_lm.__file__).parent / "examples"
# Where the quickstart's beta is of another scale, or a loss needs more than beta.
OWN: dict[str, dict[str, Any]] = {
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 0.1},
    "sppo_hard": {"beta": 0.001},
    "sigmoid_norm": {"beta": 5.0},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "alphapo": {"beta": 2.0, "gamma": 1.0},
}
COMBINED: dict[str, dict[str, Any]] = {
    "sigmoid + sft (RPO)": {"loss_type": ["sigmoid", "sft"]},
    "sigmoid, smoothed (cDPO)": {"loss_type": "sigmoid", "label_smoothing": 0.1},
    "sigmoid, ld_alpha 0.5 (LD-DPO)": {"loss_type": "sigmoid", "ld_alpha": 0.5},
    "sigmoid, weighted (WPO)": {"loss_type": "sigmoid", "use_weighting": True},
}


def all_runs() -> dict[str, dict[str, Any]]:
    """The settings of every run by name."""
    runs = {name: {"loss_type": name, **OWN.get(name, {})} for name in LOSSES}
    return runs | COMBINED


def run_settings(options: argparse.Namespace, own: dict[str, Any]) -> Any:
    """Checked settings of one run: the quickstart's, the budget's, its own."""
    args = resolve_args(["--config", str(EXAMPLES / "dpo_quickstart.yaml")])
    budget = {
        "model": options.model,
        "data": options.data,
        "iters": options.iters,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "steps_per_report": options.iters,
        "save_every": options.iters,
        "num_layers": options.num_layers,
        "test": True,
        "reference_cache": options.reference_cache,
    }
    given = {k: v for k, v in (budget | own).items() if v is not None}
    vars(args).update(given)
    args.explicit |= given.keys()
    check_args(args)
    if objective_of(args).data == "labels":
        args.batch_size *= 2  # A pair is two labelled answers.
    return args


def answer_lengths(model: Any, tokenizer: Any, prompts: list, most: int) -> list[int]:
    """Tokens of a greedy answer to each prompt."""
    model.eval()
    ids = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        for prompt in prompts
    ]
    texts = batch_generate(model, tokenizer, ids, max_tokens=most).texts
    return [len(tokenizer.encode(x, add_special_tokens=False)) for x in texts]


class Bench:
    """One model for all runs, as it starts."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        args = run_settings(options, {})
        self.model, self.tokenizer = load_model(args.model, args.trust_remote_code)
        fit_to_model(args, self.model)
        args.batch_size = options.test_batch_size
        _, _, self.test_set = load_data(args, self.tokenizer)
        # Whatever was trained on, log-probs are compared as plain pairs.
        self.pairs = args
        rows = (Path(options.data) / "test.jsonl").read_text("utf-8").splitlines()
        rows = rows[:: max(len(rows) // max(options.prompts, 1), 1)][: options.prompts]
        self.prompts = [json.loads(row)["prompt"] for row in rows]

    def measure(self, own: dict[str, Any], trained: bool = True) -> dict[str, Any]:
        """Train one objective from the start, test it, and let it answer."""
        model, tic = self.model, time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            args = run_settings(self.options, own | {"adapter_path": folder})
            # The adapter's start and the order of pairs are the same in every run.
            mx.random.seed(args.seed)
            np.random.seed(args.seed)
            fit_to_model(args, model)
            if trained:
                train_set, _, _ = load_data(args, self.tokenizer)
                job = Job(args, model, self.tokenizer, train_set, [])
                train_model(job)
                start = job.reference.model
            else:
                make_policy(args, model)
                start = FrozenStart(model)
        seconds = time.perf_counter() - tic
        grade = find_sharing(self.pairs, model, start).grade
        settings = replace(training_args(self.pairs), sharing=grade)
        _, scored = score_pairs(model, start, self.test_set, settings)
        result = describe(scored)
        lengths = answer_lengths(
            model, self.tokenizer, self.prompts, self.options.max_tokens
        )
        remove_lora_layers(model)
        model.freeze()
        return result | {
            "settings": {k: v for k, v in own.items() if k != "loss_type"},
            "lengths": lengths,
            "train_seconds": seconds,
        }


def budget_of(options: argparse.Namespace) -> dict[str, Any]:
    """What all runs of one table have in common."""
    names = "iters batch_size learning_rate num_layers prompts max_tokens".split()
    return {name: getattr(options, name) for name in names}


def kept_results(options: argparse.Namespace) -> dict[str, Any]:
    """Earlier results of the same budget."""
    path = Path(options.results)
    if not path.exists():
        return {"budget": budget_of(options), "runs": {}}
    kept = json.loads(path.read_text("utf-8"))
    if (other := kept["budget"]) != budget_of(options):
        raise ValueError(f"{path} holds runs with {other}: give other --results.")
    return kept


def add_result(options: argparse.Namespace, name: str, run: dict[str, Any]) -> dict:
    """Keep a result, beside those that another process may have added."""
    results = kept_results(options)
    results["runs"][name] = run
    text = json.dumps(results, indent=1) + "\n"
    replace_file(Path(options.results), lambda x: Path(x).write_text(text, "utf-8"))
    return results


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="One run of each objective.")
    add = parser.add_argument
    add("--model", required=True, help="a model's folder or repo")
    add("--data", default=str(EXAMPLES / "preferences"), help="a folder of pairs")
    add("--iters", type=int, default=6, help="steps of a run")
    add("--batch-size", type=int, default=4, help="pairs a step")
    add("--learning-rate", type=float, default=8e-5)
    add("--num-layers", type=int, default=8, help="trained layers")
    add("--test-batch-size", type=int, default=6, help="pairs at a time in the test")
    add("--prompts", type=int, default=10, help="how many to answer")
    add("--max-tokens", type=int, default=64, help="most tokens of an answer")
    add("--only", nargs="+", help="names of some runs")
    add("--results", default="objectives.json", help="file that keeps results")
    add("--reference-cache", help="folder, default: the user's cache folder")
    add("--readme", help="a Markdown file that gets the section")
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = build_parser().parse_args(argv)
    runs: dict[str, dict[str, Any]] = {START: {}, **all_runs()}
    if unknown := set(options.only or []) - runs.keys():
        raise ValueError(f"Unknown run {', '.join(unknown)}: choose from {list(runs)}.")
    results, bench = kept_results(options), None
    for name in options.only or runs:
        if name not in results["runs"]:
            bench = bench or Bench(options)
            run = bench.measure(runs[name], name != START)
            results = add_result(options, name, run)
        print(row(name, results["runs"][name]), flush=True)
    done = [name for name in runs if name in results["runs"]]
    how = f"python benchmarks/{Path(__file__).name} --model {Path(options.model).name}"
    text = section(results, done, how)
    print("\n" + text)
    if options.readme:
        write_section(Path(options.readme), text)
    return results


if __name__ == "__main__":
    main()
