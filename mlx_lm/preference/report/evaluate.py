# Copyright © 2026 MLX Contributors

"""The test of a run: its numbers, its table, its file, and single pairs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ...cli_ui import make_console
from ...tuner.trainer import DPOTrainingArgs, evaluate_dpo
from ..batch.shape import batches_per_epoch
from ..errors import InputError
from ..files import write_json
from ..measure.pair_metrics import FILE_NAME, pair_metrics
from ..measure.pair_scores import CHOSEN, REJECTED, PairCollector, ScoredPairs
from ..run.plan import training_plan
from ..terminal import rprint
from ..watch.retained_text import retained_metrics
from .inspect import pick_pairs, save_pairs
from .table import metrics_table, print_test_table


def score_pairs(
    model: nn.Module,
    reference_model: Any,
    dataset: Any,
    settings: DPOTrainingArgs,
    num_batches: int = -1,
) -> tuple[dict[str, Any], ScoredPairs]:
    """Everything that a test reports, and the scores of each pair, on all ranks."""
    plan = training_plan(dataset, settings, in_order=True)
    batches = batches_per_epoch(plan, settings.batch_size)
    if num_batches != -1:
        batches = min(batches, num_batches)
    collector = PairCollector(dataset)
    quiet = mx.distributed.init().rank() != 0
    with tqdm(total=batches, desc="Testing", disable=quiet, leave=False) as pbar:
        means = evaluate_dpo(
            model,
            reference_model,
            dataset,
            settings.batch_size,
            num_batches,
            buckets=plan,
            objective=settings.objective,
            clear_cache_threshold=settings.clear_cache_threshold,
            compile=settings.compile,
            progress_callback=pbar.update,
            collector=collector,
        )
    scored = collector.gather()
    return pair_metrics(means, scored, settings.objective), scored


def keep_test(
    folder: str | Path,
    metrics: dict[str, Any],
    dataset: Any,
    scored: ScoredPairs,
    tested: dict[str, Any],
    ordinary_text: bool = False,
    pair_texts: bool = False,
) -> dict[str, Any]:
    """Write the files of a test, and return what a text adds to its metrics."""
    if mx.distributed.init().rank() != 0:
        return {}
    added: dict[str, Any] = {}
    try:
        text = retained_metrics(folder)
        added = text if ordinary_text else {}
        write_json(Path(folder) / FILE_NAME, metrics | text | tested, indent=2)
        if dataset.kind == "pairs":
            # All margins are kept; texts stay out unless a report shows them.
            shown = pick_pairs(dataset, scored) if pair_texts else []
            both = (scored.reference_logps, scored.policy_logps)
            before, after = (logps[:, CHOSEN] - logps[:, REJECTED] for logps in both)
            save_pairs(folder, shown, before, after)
    except InputError as e:
        # Somebody else's adapter can be tested, too.
        rprint(f"[WARNING] {e}")
    return added


def show_metrics(
    runs: Mapping[str, Mapping[str, Any]], before: str | None, noun: str = "pairs"
) -> None:
    """Print the table of one or several runs' tests."""
    if mx.distributed.init().rank() == 0:
        table = metrics_table(runs, before, noun)
        print_test_table(make_console(), table, 2 if before else 1)


def check_same_pairs(folder: str, dataset: Any, earlier: Any) -> None:
    """Rows without a number that a run needs are left out, here and not there."""
    if not np.array_equal(dataset.pair_lengths(), earlier.pair_lengths()):
        raise InputError(
            f"{folder} has another weight_feature or margin_feature, which leaves out "
            "other pairs: compare runs on the same pairs."
        )
