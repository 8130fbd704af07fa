# Copyright © 2026 MLX Contributors

"""The test of a run: its numbers, its table, its file, and single pairs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from rich.text import Text
from tqdm import tqdm

from ...cli_ui import make_console, rprint
from ...tuner.trainer import DPOTrainingArgs, evaluate_dpo
from ..batch.shape import batches_per_epoch
from ..errors import InputError
from ..measure.evaluation import CHOSEN, REJECTED, PairCollector, ScoredPairs
from ..measure.pair_metrics import pair_metrics, write_test_metrics
from ..run.plan import training_plan
from ..watch.retained_text import retained_metrics
from .inspect import (
    inspection_lines,
    inspection_order,
    pick_pairs,
    save_pairs,
    uncut_pairs,
)
from .table import metrics_table, print_test_table, short_names

WIDEST = 100


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


@dataclass(frozen=True)
class KeptTest:
    """What is kept of a test: of which data, in which folder, and which texts."""

    folder: str | Path
    data: str
    max_seq_length: int
    ordinary_text: bool = False
    pair_texts: bool = False

    def save(
        self, metrics: dict[str, Any], dataset: Any, scored: ScoredPairs
    ) -> dict[str, Any]:
        """Write a test's files, and return what they add to its metrics."""
        if mx.distributed.init().rank() != 0:
            return {}
        added: dict[str, Any] = {}
        try:
            text = retained_metrics(self.folder)
            added = text if self.ordinary_text else {}
            tested = {
                "test/data": self.data,
                "test/max_seq_length": self.max_seq_length,
            }
            write_test_metrics(self.folder, metrics | text | tested)
            if dataset.kind == "pairs":
                self._save_pairs(dataset, scored)
        except InputError as e:
            # Somebody else's adapter can be tested, too.
            rprint(f"[WARNING] {e}")
        return added

    def _save_pairs(self, dataset, scored):
        """Keep all margins; texts stay out unless a report shows them."""
        before, after = (
            logps[:, CHOSEN] - logps[:, REJECTED]
            for logps in (scored.reference_logps, scored.policy_logps)
        )
        shown = pick_pairs(dataset, scored) if self.pair_texts else []
        save_pairs(self.folder, shown, before.tolist(), after.tolist())


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


def compare_runs(
    folders: Sequence[str],
    test: Callable[[str], dict[str, Any]],
    before: str | None,
    noun: str,
) -> dict[str, dict[str, Any]]:
    """Test finished runs one after the other, and print one table."""
    results = {folder: test(folder) for folder in folders}
    if before is None:
        rprint("The runs have different references: rewards and KL are from each own.")
    show_metrics(dict(zip(short_names(folders), results.values())), before, noun)
    return results


def show_pairs(
    dataset: Any, scored: ScoredPairs, count: int, read_uncut: Callable[[], Any]
) -> None:
    """Show single pairs of a data set, the surest mistakes first."""
    if mx.distributed.init().rank() != 0:
        return
    chosen = scored.select(inspection_order(scored.margins, count))
    whole = uncut_pairs(dataset, chosen.indices.tolist(), read_uncut)
    console = make_console()
    console.print()
    for line in inspection_lines(dataset, chosen, whole, min(console.width, WIDEST)):
        # Not as markup: a row may hold brackets.
        console.print(Text(line), no_wrap=True, crop=False)
