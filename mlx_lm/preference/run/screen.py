# Copyright © 2026 MLX Contributors

import time
from collections.abc import Mapping
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from ...cli_ui import TrainUI, print_header_panel
from ..batch.shape import (
    Bucket,
    batches_per_epoch,
    needed_tokens,
    padded_tokens,
    pair_lengths,
)
from ..memory.predict import MemoryEstimate
from ..objective.objective import Objective, objective_of
from ..reference.remembered import NoReference, RememberedReference
from .forecast import describe_memory


def format_duration(seconds: float) -> str:
    """Write a duration in its two largest units."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


def print_dpo_run_header(
    console: Console, args: SimpleNamespace, rows: list[tuple[str, str]]
) -> None:
    """Render the start-up panel of a preference run."""
    layers = "all" if args.num_layers == -1 else args.num_layers
    kind = f"{args.fine_tune_type} · {layers} layers"
    if args.fine_tune_type != "full":
        kind += f" · rank {args.lora_parameters['rank']}"
    rate = f"lr {args.learning_rate:.1e}"
    if isinstance(args.lr_schedule, dict):
        # mlx-lm's own form brings its rates along.
        own = "arguments" in args.lr_schedule
        rate = args.lr_schedule["name"] if own else f"{rate} {args.lr_schedule['name']}"
    elif args.lr_schedule:
        rate = f"{rate} {args.lr_schedule}"
    print_header_panel(
        console,
        "mlx_lm.dpo",
        [
            ("model", str(args.model)),
            ("type", kind),
            ("loss", f"{_names(args.loss_type)} · beta {args.beta:g}"),
            ("optimizer", f"{args.optimizer} · {rate}"),
            ("batch · iters", f"{args.batch_size} · {args.iters:,}"),
            ("max seq", f"{args.max_seq_length:,}"),
            *rows,
        ],
    )


def _names(names):
    return names if isinstance(names, str) else " + ".join(names)


class PreferenceTrainUI(TrainUI):
    """The training display of ``mlx_lm.lora`` with accuracy, margin and time left."""

    def __init__(self, total_iters: int, rank: int = 0, noun: str = "pairs"):
        super().__init__(total_iters, rank)
        self._total = total_iters
        self._noun = noun
        self._prev_train_loss: float | None = None
        self._seconds_per_iter: float | None = None
        self._last, self._steps = (0, 0.0), 0

    def __enter__(self) -> "PreferenceTrainUI":
        if self._rank == 0:
            self._console.print(
                "  [ui.heading] iter     loss      acc   margin   tok/s"
                f"{self._noun:>9}     left[/ui.heading]"
            )
        self._progress.__enter__()
        self._last = (0, time.perf_counter())
        return self

    def advance(self) -> None:
        """Show that one more step is done."""
        self._steps += 1
        super().advance()

    def state_dict(self) -> tuple[dict, dict[str, Any]]:
        """What a checkpoint holds of it."""
        return {}, {"steps": self._steps, "loss": self._prev_train_loss}

    def load_state_dict(self, arrays: dict, info: dict[str, Any]) -> None:
        """Show the steps that were done before."""
        self._last = (info["steps"], time.perf_counter())
        self._prev_train_loss = info["loss"]
        for _ in range(info["steps"]):
            self.advance()

    def _left(self, it):
        """Time left, from the time that passed since the last line."""
        done, then = self._last
        now = time.perf_counter()
        if it > done:
            self._seconds_per_iter = (now - then) / (it - done)
            self._last = (it, now)
        if self._seconds_per_iter is None:
            return ""
        return format_duration(self._seconds_per_iter * (self._total - it))

    def report_train(self, it: int, metrics: Mapping[str, float]) -> None:
        """Print one line of training metrics."""
        if self._rank != 0:
            return
        loss = metrics["loss"]
        better = self._prev_train_loss is None or loss <= self._prev_train_loss
        arrow, style = ("▼", "green") if better else ("▲", "yellow")
        self._prev_train_loss = loss
        self._console.print(
            f"  [ui.muted]{it:>5}[/ui.muted]  "
            f"[bold {style}]{loss:>6.3f} {arrow}[/bold {style}]"
            f"   {metrics['rewards/accuracies']:>6.1%}"
            f"  {metrics['rewards/margins']:>+7.3f}"
            f"  [ui.strong]{metrics['tokens_per_second']:>6,.0f}[/ui.strong]"
            f"  [ui.muted]{metrics['trained_pairs']:>7,.0f}"
            f"  {self._left(it):>7}[/ui.muted]"
        )

    def report_val(
        self, it: int, metrics: Mapping[str, float], val_time: float
    ) -> None:
        """Print one line of validation metrics."""
        if self._rank != 0:
            return
        if self._last[0] == 0 and it == 0:
            self._last = (0, time.perf_counter())
        likelier = ""
        if "logps/accuracies" in metrics:
            likelier = (
                f"likelier {metrics['logps/accuracies']:.1%},"
                f" per token {metrics['logps/accuracies_per_token']:.1%} · "
            )
        self._console.print(
            f"  [ui.muted]{it:>5}[/ui.muted]  [ui.accent]val[/ui.accent]"
            f" [ui.strong]{metrics['loss']:>5.3f}[/ui.strong]"
            f"  {metrics['rewards/accuracies']:>6.1%}"
            f"  {metrics['rewards/margins']:>+7.3f}"
            f"  [ui.muted]{likelier}{val_time:.1f}s[/ui.muted]"
        )


def header_rows(
    args: SimpleNamespace,
    train_set: Any,
    valid_set: Any,
    reference: RememberedReference,
    plan: list[Bucket],
    estimate: MemoryEstimate,
) -> list[tuple[str, str]]:
    """What the run's header says about data, batches, reference and memory."""
    per_epoch = batches_per_epoch(plan, args.batch_size)
    what = objective_of(args).noun
    lengths = pair_lengths(train_set)
    needed = needed_tokens(plan, lengths)
    padding = 1 - needed / padded_tokens(plan, args.batch_size, lengths)
    shared = "shared" if any(b.shape.prompt for b in plan) else "not shared"
    shared += ", rows packed" if args.pack else ""
    shapes = f"{len(plan)} batch shape{'s' if len(plan) > 1 else ''}"
    modifiers = _modifiers(args)
    rows = [
        *([("loss has", modifiers)] if modifiers else []),
        ("data", str(args.hf_dataset or args.data)),
        (what, f"{len(train_set):,} train · {len(valid_set):,} valid"),
        ("an epoch", f"{per_epoch:,} iters · {args.iters / per_epoch:.3g} epochs"),
        ("rows are", f"{train_set.shape} · {train_set.format}"),
        ("prompts", f"{shared} · {shapes} · {padding:.0%} padding"),
        ("reference", _reference_name(args, train_set, reference, what)),
        ("peak memory", describe_memory(estimate)),
    ]
    return [(label, text.replace("[", r"\[")) for label, text in rows]


def _reference_name(args, train_set, reference, what):
    if isinstance(reference, NoReference):
        return "none"
    start = "the start" if args.sync_reference else "the frozen start"
    if args.resume_adapter_file:
        start = args.resume_adapter_file + ("" if args.sync_reference else ", frozen")
    if args.sync_reference:
        return f"{start} · follows the policy every {args.sync_steps:,} updates"
    known = len(train_set) - reference.unknown(train_set)
    count = f" · {known:,} of {len(train_set):,} {what} known" if known else ""
    return (args.reference_model or start) + count


def _modifiers(args):
    """What is not as it is by default, beside the loss and beta."""
    objective = objective_of(args)
    given = {f.name: getattr(objective, f.name) for f in fields(objective)}
    changed = {
        name: value
        for name, value in given.items()
        if name not in ("loss_type", "beta") and value != getattr(Objective, name)
    }
    columns = {k: getattr(args, k) for k in ("weight_feature", "margin_feature")}
    changed |= {name: value for name, value in columns.items() if value}
    return " · ".join(
        name if value is True else f"{name} {value}" for name, value in changed.items()
    )
