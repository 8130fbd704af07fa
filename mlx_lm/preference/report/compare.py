# Copyright © 2026 MLX Contributors

"""Several finished runs, tested on the same pairs and shown side by side."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ...cli_ui import rprint
from ...tuner.datasets import load_preference_dataset
from ..errors import InputError
from ..forward.frozen import FrozenStart
from ..objective.objective import objective_of
from ..policy.model import (
    check_token_ids,
    load_model,
    load_reference_model,
    load_weights,
    read_weights,
)
from ..ranks import start_together
from ..run.setup import make_policy
from ..settings.adopt import adopt_finished_run
from ..settings.checks import check_args, check_types, fit_to_model
from ..settings.table import names
from ..watch.retained_text import scored_text
from .evaluate import measure, show_metrics
from .table import short_names
from .watchers import show_report

# What makes the reference; where runs differ in it, there is no common start.
REFERENCE_KEYS = ("reference_model", "resume_adapter_file")
# What decides the test set's tokens.
SAME_KEYS = tuple(names(compared=True))
_TESTED = (*SAME_KEYS, "The kind of data")
# What only the loss reads; but rows without a usable number are left out.
LOSS_COLUMNS = ("weight_feature", "margin_feature")


def finished_runs(
    args: SimpleNamespace, defaults: dict[str, Any]
) -> list[SimpleNamespace]:
    """The settings of each of several runs, checked against each other."""
    folders = list(args.adapter_path)
    if args.train or args.resume or args.inspect or not args.test:
        raise InputError(
            f"adapter_path names {len(folders)} folders, which only --test alone can "
            "take: leave out --train, --resume and --inspect, or name one folder."
        )
    if len({str(Path(folder).resolve()) for folder in folders}) < len(folders):
        raise InputError(f"adapter_path names a folder twice: {', '.join(folders)}.")
    runs = []
    for folder in folders:
        one = copy.copy(args)
        one.adapter_path = folder
        check_types(vars(one))
        adopt_finished_run(one)
        given = {k: v for k, v in (one.lora_parameters or {}).items() if v is not None}
        one.lora_parameters = {**defaults["lora_parameters"], **given}
        check_args(one)
        runs.append(one)
    for other in runs[1:]:
        for what, ours, theirs in zip(_TESTED, _tested(runs[0]), _tested(other)):
            if ours != theirs:
                hint = " Or give it to the command." if what in SAME_KEYS[1:] else ""
                raise InputError(
                    f"{what} is {ours!r} in {runs[0].adapter_path} and {theirs!r} in "
                    f"{other.adapter_path}: compare runs that agree in it.{hint}"
                )
    return runs


def _tested(run):
    """What runs must agree in, in the order of ``_TESTED``."""
    return [*_values(run, SAME_KEYS), objective_of(run).data]


def _values(run, keys):
    return tuple(getattr(run, key, None) for key in keys)


def _load_pairs(run, tokenizer, earlier):
    _, _, test_set = load_preference_dataset(run, tokenizer)
    for line in test_set.summary():
        rprint(line)
    if earlier is not None and not np.array_equal(
        test_set.pair_lengths(), earlier.pair_lengths()
    ):
        raise InputError(
            f"{run.adapter_path} has another {' or '.join(LOSS_COLUMNS)}, which leaves "
            "out other pairs: compare runs on the same pairs."
        )
    return test_set


def compare_runs(
    args: SimpleNamespace, defaults: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Test finished runs one after the other on one test set, and print one table."""
    runs = finished_runs(args, defaults)
    test_set, columns = None, ()
    results: dict[str, dict[str, Any]] = {}
    for run in runs:
        rprint(f"Loading {run.model} with {run.adapter_path}")
        model, tokenizer = load_model(run.model, run.trust_remote_code)
        fit_to_model(run, model)
        reference_model = load_reference_model(
            run.reference_model, tokenizer, run.trust_remote_code
        )
        if not results or columns != _values(run, LOSS_COLUMNS):
            columns = _values(run, LOSS_COLUMNS)
            test_set = _load_pairs(run, tokenizer, test_set)
            check_token_ids(model, test_set.largest_token())
        make_policy(run, model)
        reference = reference_model or FrozenStart(model)
        with scored_text(
            model,
            tokenizer,
            run.retain_data,
            run.model,
            run.max_seq_length,
            run.adapter_path,
        ):
            load_weights(model, Path(run.adapter_path) / "adapters.safetensors")
        read_weights(model, run.model)
        start_together()
        results[run.adapter_path], _ = measure(run, model, test_set, reference)
        del model, reference_model, reference
    starts = {_values(run, REFERENCE_KEYS) for run in runs}
    before: str | None = "reference" if runs[0].reference_model else "start"
    if len(starts) > 1:
        before = None
        rprint("The runs have different references: rewards and KL are from each own.")
    shown = short_names(list(results))
    noun = objective_of(runs[0]).noun
    show_metrics(dict(zip(shown, results.values())), before, noun)
    for run in runs:
        show_report(run)
    return results
