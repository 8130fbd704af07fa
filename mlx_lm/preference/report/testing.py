# Copyright © 2026 MLX Contributors

"""Tests: of a run, of what an earlier one trained, and of several beside each other."""

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn

from ..features import features
from ..forward.frozen import FrozenStart
from ..objective.objective import objective_of
from ..policy import model as models
from ..policy.start import load_weights
from ..run import setup
from ..run.identity import tested
from ..run.job import Job
from ..run.layouts import find_sharing, likely_sharing, shared_settings
from ..settings.begin import load_models
from ..settings.finished import finished_runs
from ..settings.together import agree
from ..terminal import rprint
from ..watch.feature import score_text
from . import evaluate
from .inspect import show_pairs
from .page import show_report
from .review import keep_looks
from .table import short_names


def evaluate_model(
    args: SimpleNamespace,
    model: nn.Module,
    dataset: Any,
    reference_model: Any,
    is_test: bool = True,
    show: bool = True,
) -> dict[str, Any]:
    """Score held-out pairs, keep a test's numbers, and show them or single pairs."""
    sharing = find_sharing(args, model, reference_model)
    if sharing.warning and not args.train:
        rprint(sharing.warning)
    settings = shared_settings(args, setup.training_args(args), sharing.grade)
    metrics, scored = evaluate.score_pairs(
        model, reference_model, dataset, settings, args.test_batches
    )
    if args.test and args.adapter_path:
        data, longest = str(args.hf_dataset or args.data), args.max_seq_length
        metrics |= evaluate.keep_test(
            args.adapter_path,
            metrics,
            dataset,
            scored,
            {"test/data": data, "test/max_seq_length": longest},
            ordinary_text=args.retain_data is not None,
            pair_texts=args.report,
        )
    if args.test and show:
        before = "start" if isinstance(reference_model, FrozenStart) else "reference"
        evaluate.show_metrics({"policy": metrics}, before, settings.objective.noun)
    if args.adapter_path and args.data and dataset.kind == "pairs":
        keep_looks(args.adapter_path, dataset, scored, args.data)
    if args.inspect:
        again = copy.copy(args)
        # More tokens than any row has.
        again.max_seq_length, again.token_cache = 2**30, False
        if is_test:
            again.train, again.test = False, True
        read_uncut = partial(setup.load_data, again, dataset.tokenizer)
        show_pairs(dataset, scored, args.inspect, read_uncut)
    return metrics


def compare(args: SimpleNamespace) -> None:
    """Test finished runs on one test set, and print one table."""
    runs = {run.adapter_path: run for run in finished_runs(args)}
    sets: dict[tuple, Any] = {}

    def test(folder):
        run = runs[folder]
        rprint(f"Loading {run.model} with {folder}")
        model, tokenizer, reference_model = load_models(run)
        # What only the loss reads; but rows without a usable number are left out.
        columns = (run.weight_feature, run.margin_feature)
        if columns not in sets:
            _, _, sets[columns] = setup.load_data(run, tokenizer)
            for line in sets[columns].summary():
                rprint(line)
            evaluate.check_same_pairs(folder, sets[columns], next(iter(sets.values())))
            models.check_token_ids(model, sets[columns].largest_token())
        reference = load_trained(run, model, tokenizer, reference_model)
        models.read_weights(model, run.model)
        agree(run, partial(tested, model, reference, sets[columns]))
        return evaluate_model(run, model, sets[columns], reference, show=False)

    results = [test(folder) for folder in runs]
    first = next(iter(runs.values()))
    names = ("reference_model", "reference_bits", "resume_adapter_file")
    starts = {tuple(getattr(run, name) for name in names) for run in runs.values()}
    is_other = first.reference_model or first.reference_bits
    before: str | None = "reference" if is_other else "start"
    if len(starts) > 1:
        before = None
        rprint("The runs have different references: rewards and KL are from each own.")
    table = dict(zip(short_names(list(runs)), results))
    evaluate.show_metrics(table, before, objective_of(first).noun)
    for folder in runs if args.report else []:
        show_report(folder)


def load_trained(
    args: SimpleNamespace, model: nn.Module, tokenizer: Any, reference_model: Any
) -> Any:
    """Load what a run trained, if there is any, and return the reference."""
    reference = reference_model or model
    if args.adapter_path:
        setup.make_policy(args, model)
        reference = reference_model or FrozenStart(model)
    with score_text(args, model, tokenizer, start=bool(args.adapter_path)):
        if args.adapter_path:
            load_weights(model, Path(args.adapter_path) / "adapters.safetensors")
    return reference


def finish(job: Job) -> None:
    """Test, show pairs and write the report, as far as the settings ask for it."""
    args, model = job.args, job.model
    reference = job.reference and job.reference.model
    if not args.train:
        reference = load_trained(args, model, job.tokenizer, job.reference_model)
    if args.test or args.inspect:
        held_out = job.test_set or job.valid_set
        if not args.train:
            likely = likely_sharing(args)
            job.settings = shared_settings(args, setup.training_args(args), likely)
            for feature in features():
                feature.before_test(job, reference, held_out)
        models.read_weights(model, args.model)
        agree(args, partial(tested, model, reference, held_out))
        evaluate_model(args, model, held_out, reference, is_test=bool(job.test_set))
    if args.report:
        show_report(args.adapter_path)
