# Copyright © 2026 MLX Contributors

"""The test of a run: its numbers, its table, its file, and single pairs."""

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from rich.text import Text
from tqdm import tqdm

from ...cli_ui import make_console, rprint
from ...tuner.trainer import evaluate_dpo
from ..batch.shape import batches_per_epoch
from ..errors import InputError
from ..forward.frozen import FrozenStart
from ..measure.evaluation import CHOSEN, REJECTED, PairCollector, ScoredPairs
from ..measure.pair_metrics import pair_metrics, write_test_metrics
from ..run.plan import training_plan
from ..run.setup import find_sharing, training_args
from ..watch.retained_text import retained_metrics
from .inspect import (
    inspection_lines,
    inspection_order,
    pair_texts,
    pick_pairs,
    save_pairs,
    uncut_pairs,
)
from .table import fit_table, metrics_table, print_test_table

WIDEST = 100


def score_pairs(
    args: SimpleNamespace, model: nn.Module, dataset: Any, reference_model: Any
) -> tuple[dict[str, float], ScoredPairs]:
    """Score a data set with policy and reference, on all ranks."""
    settings = training_args(args)
    grade = find_sharing(args, model, reference_model).grade
    settings = replace(settings, sharing=grade)
    plan = training_plan(dataset, settings, in_order=True)
    batches = batches_per_epoch(plan, args.batch_size)
    if args.test_batches != -1:
        batches = min(batches, args.test_batches)
    collector = PairCollector(dataset)
    quiet = mx.distributed.init().rank() != 0
    with tqdm(total=batches, desc="Testing", disable=quiet, leave=False) as pbar:
        means = evaluate_dpo(
            model,
            reference_model,
            dataset,
            args.batch_size,
            args.test_batches,
            buckets=plan,
            objective=settings.objective,
            clear_cache_threshold=args.clear_cache_threshold,
            compile=settings.compile,
            progress_callback=pbar.update,
            collector=collector,
        )
    return means, collector.gather()


def measure(
    args: SimpleNamespace, model: nn.Module, test_set: Any, reference_model: Any
) -> tuple[dict[str, Any], ScoredPairs]:
    """Test a policy, and write ``test_metrics.json`` into its folder."""
    means, scored = score_pairs(args, model, test_set, reference_model)
    objective = training_args(args).objective
    metrics = pair_metrics(
        means, scored, objective.data, objective.rewards_are == "log-ratios"
    )
    if mx.distributed.init().rank() == 0 and args.adapter_path:
        try:
            text = retained_metrics(args.adapter_path)
            if args.retain_data:
                metrics |= text
            tested = {
                "test/data": str(args.hf_dataset or args.data),
                "test/max_seq_length": args.max_seq_length,
            }
            write_test_metrics(args.adapter_path, metrics | text | tested)
            if objective.data == "pairs":
                _save_for_report(args, test_set, scored)
        except InputError as e:
            # Somebody else's adapter can be tested, too.
            rprint(f"[WARNING] {e}")
    return metrics, scored


def _save_for_report(args, dataset, scored):
    """Keep all margins; texts of the data stay out unless a report is asked for."""
    before, after = (
        logps[:, CHOSEN] - logps[:, REJECTED]
        for logps in (scored.reference_logps, scored.policy_logps)
    )
    shown = []
    if args.report:
        shown = pick_pairs(dataset.select(scored.indices), scored.margins.tolist())
    for pair in shown:
        # Of a sample of the test set: its place in the whole one.
        pair["pair"] = int(scored.indices[pair["pair"]])
    save_pairs(args.adapter_path, shown, before.tolist(), after.tolist())


def evaluate_model(
    args: SimpleNamespace, model: nn.Module, test_set: Any, reference_model: Any
) -> dict[str, Any]:
    """Evaluate on the test set and print the start beside the result."""
    metrics, scored = measure(args, model, test_set, reference_model)
    own = isinstance(reference_model, FrozenStart)
    noun = training_args(args).objective.noun
    show_metrics({"policy": metrics}, "start" if own else "reference", noun)
    if args.inspect:
        _show_pairs(args, test_set, scored, is_test=True)
    return metrics


def show_metrics(
    runs: Mapping[str, Mapping[str, Any]], before: str | None, noun: str = "pairs"
) -> None:
    """Print the table of one or several runs' tests."""
    if mx.distributed.init().rank() == 0:
        console = make_console()
        table = metrics_table(runs, before, noun)
        print_test_table(
            console, fit_table(table, console.width - 2, 2 if before else 1)
        )


def inspect_model(
    args: SimpleNamespace,
    model: nn.Module,
    dataset: Any,
    reference_model: Any,
    is_test: bool,
) -> None:
    """Show single pairs of a data set, the surest mistakes first."""
    _, scored = score_pairs(args, model, dataset, reference_model)
    _show_pairs(args, dataset, scored, is_test)


def _show_pairs(args, dataset, scored, is_test):
    if mx.distributed.init().rank() != 0:
        return
    chosen = scored.select(inspection_order(scored.margins, args.inspect))
    indices = chosen.indices.tolist()
    whole = uncut_pairs(args, dataset, indices, is_test)
    console = make_console()
    console.print()
    lines = inspection_lines(
        chosen, pair_texts(dataset, indices, whole), min(console.width, WIDEST)
    )
    for line in lines:
        # Not as markup: a row may hold brackets.
        console.print(Text(line), no_wrap=True, crop=False)
