# Copyright © 2026 MLX Contributors

import time
from collections.abc import Mapping
from types import SimpleNamespace

from rich.console import Console

from ._upstream_cli_ui import (
    _ANSI_RE,
    ROUNDED,
    ChatUI,
    Panel,
    Progress,
    ProgressColumn,
    SquareBar,
    Text,
    TextColumn,
    Theme,
    TrainUI,
    _make_theme,
    _terminal_width,
    contextmanager,
    corridor_input,
    lru_cache,
    make_console,
    make_train_progress,
    mx,
    print_chat_help,
    print_header_panel,
    print_lora_run_header,
    re,
    rprint,
    shutil,
    sys,
)


def format_duration(seconds: float) -> str:
    """
    Write a duration in its two largest units.

    Args:
        seconds (float): The duration.

    Returns:
        str: Such as ``1h 02m``, ``3m 20s`` or ``8s``.

    Example:
        >>> [format_duration(s) for s in (8, 200, 3720)]
        ['8s', '3m 20s', '1h 02m']
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


def print_dpo_run_header(
    console: Console, args: SimpleNamespace, rows: list[tuple[str, str]]
) -> None:
    """
    Render the start-up panel of a preference run.

    Args:
        console (Console): Where to print.
        args (SimpleNamespace): The run's settings, after defaults and clamping.
        rows (list): More rows, label and text, such as data and reference.

    Example:
        >>> args = SimpleNamespace(model="m", fine_tune_type="full", num_layers=2,
        ...     optimizer="adam", learning_rate=1e-6, loss_type="sigmoid", beta=0.1,
        ...     batch_size=4, iters=10, max_seq_length=64, lr_schedule=None)
        >>> with make_console().capture() as screen:
        ...     print_dpo_run_header(make_console(), args, [])
        >>> "sigmoid · beta 0.1" in screen.get()
        True
    """
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


def print_test_table(console: Console, parts: list[list[list[str]]]) -> None:
    """
    Print a table of test metrics.

    Args:
        console (Console): Where to print.
        parts (list): What ``fit_table`` returned; the columns from the third one on
            are those of policies.

    Example:
        >>> with make_console().capture() as screen:
        ...     print_test_table(make_console(), [[["KL", "  -", "  0.5"]]])
        >>> "KL" in screen.get()
        True
    """
    for part in parts:
        for i, (label, before, *cells) in enumerate(part):
            style = "ui.heading" if i == 0 else ""
            line = Text.assemble(
                (f"  {label}{before}", style), ("".join(cells), "ui.strong")
            )
            console.print(line, no_wrap=True, crop=False)
        if part is not parts[-1]:
            console.print()


class PreferenceTrainUI(TrainUI):
    """
    The training display of ``mlx_lm.lora`` with accuracy, margin and time left.

    Args:
        total_iters (int): Iterations of the run.
        rank (int): Only rank 0 shows anything. Default: ``0``.
        noun (str): What is trained on. Default: ``"pairs"``.

    Example:
        >>> ui = PreferenceTrainUI(10, rank=1)
        >>> ui.report_train(1, {})
    """

    def __init__(self, total_iters: int, rank: int = 0, noun: str = "pairs"):
        super().__init__(total_iters, rank)
        self._total = total_iters
        self._noun = noun
        self._prev_train_loss: float | None = None
        self._seconds_per_iter: float | None = None
        self._last = (0, 0.0)

    def __enter__(self) -> "PreferenceTrainUI":
        if self._rank == 0:
            self._console.print(
                "  [ui.heading] iter     loss      acc   margin   tok/s"
                f"{self._noun:>9}     left[/ui.heading]"
            )
        self._progress.__enter__()
        self._last = (0, time.perf_counter())
        return self

    def start_at(self, it: int) -> None:
        """
        Show that some steps were done before.

        Args:
            it (int): How many.

        Example:
            >>> PreferenceTrainUI(10, rank=1).start_at(5)
        """
        self._last = (it, time.perf_counter())
        for _ in range(it):
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
        """
        Print one line of training metrics.

        Args:
            it (int): The iteration.
            metrics (dict): As ``train_dpo`` gives them to callbacks.

        Example:
            >>> PreferenceTrainUI(10, rank=1).report_train(1, {})
        """
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
        """
        Print one line of validation metrics.

        The start is its own reference: what it shows is the share of pairs
        whose chosen answer is the more likely one.

        Args:
            it (int): The iteration, 0 before the first step.
            metrics (dict): What ``evaluate_dpo`` returned.
            val_time (float): Seconds it took.

        Example:
            >>> PreferenceTrainUI(10, rank=1).report_val(0, {}, 1.0)
        """
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
