# Copyright © 2026 MLX Contributors

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ..cli_ui import PreferenceTrainUI, TrainUI, rprint
from ..utils import maybe_set_recommended_wired_limit
from ._upstream_trainer import (
    CacheDataset,
    Optional,
    TrainingArgs,
    TrainingCallback,
    _clear_cache,
    average_gradients,
    default_loss,
    evaluate,
    grad_checkpoint,
    iterate_batches,
    train,
    tree_flatten,
    tree_map,
)
from .checkpoints import save_adapter
from .grad_checkpoint import keyed_layers
from .losses import check_loss_options
from .master_weights import MasterWeights, with_master_weights
from .preference_batches import iterate_preference_batches
from .preference_metrics import (
    MetricsWindow,
    add_metrics,
    all_sum_metrics,
    mean_metrics,
)
from .preference_step import (
    _loss_and_sums,
    _reference_scores,
    dpo_step,
    gradient_accumulator,
)
from .reference import FrozenStart


@dataclass
class DPOTrainingArgs(TrainingArgs):
    """
    The settings of a preference run, beside those of ``TrainingArgs``.

    Example:
        >>> DPOTrainingArgs(iters=10).beta
        0.1
    """

    beta: float = field(
        default=0.1,
        metadata={"help": "Inverse temperature: how strongly the reference holds."},
    )
    loss_type: str = field(
        default="sigmoid", metadata={"help": "Which preference loss to use."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Probability that a preference label is wrong."}
    )
    max_grad_norm: float | None = field(
        default=1.0,
        metadata={"help": "Clip the gradient to this norm, null or 0 for no clipping."},
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of the order of the data and of dropout."}
    )


def evaluate_dpo(
    policy_model: nn.Module,
    reference_model: Callable[[mx.array], mx.array],
    dataset: Any,
    batch_size: int = 4,
    num_batches: int = -1,
    beta: float = 0.1,
    *,
    max_seq_length: int | None = None,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    clear_cache_threshold: int = 0,
    progress_callback: Callable[[], Any] | None = None,
) -> dict[str, float]:
    """
    Loss and metrics over held-out pairs, each pair counted once.

    Args:
        policy_model (nn.Module): The model to evaluate; left in evaluation mode.
        reference_model (Callable): A ``FrozenStart`` or another model.
        dataset (PreferenceDataset): The pairs. The last, shorter batch counts.
        batch_size (int): Pairs a batch over all ranks. Default: ``4``.
        num_batches (int): Evaluate a fixed sample of so many batches, all of
            them with ``-1``. Default: ``-1``.
        beta (float): Inverse temperature. Default: ``0.1``.
        max_seq_length (int, optional): Never pad beyond it, in tokens.
        label_smoothing (float): Probability that a label is wrong. Default: ``0``.
        loss_type (str): A key of ``losses.LOSSES``. Default: ``"sigmoid"``.
        clear_cache_threshold (int): Clear the allocator's cache beyond so many
            bytes. Default: ``0``.
        progress_callback (Callable, optional): Called after every batch.

    Returns:
        dict: The averages by name, see ``mean_metrics``, and ``pairs``, how many
        there were.

    Raises:
        ValueError: If the data set is empty or an option is out of range.

    Example:
        >>> class Pairs(list):
        ...     itemlen = lambda self, i: self[i][3][2]
        >>> pairs = Pairs([([1], [2], [3, 4], (1, 2, 3))])
        >>> model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
        >>> metrics = evaluate_dpo(model, model, pairs)
        >>> round(metrics["loss"], 4), metrics["rewards/accuracies"]
        (0.6931, 0.0)
    """
    score = _compile_score(
        policy_model,
        reference_model,
        beta=beta,
        label_smoothing=label_smoothing,
        loss_type=loss_type,
    )
    return _evaluate(
        score,
        policy_model,
        dataset,
        batch_size,
        num_batches,
        max_seq_length,
        clear_cache_threshold,
        progress_callback,
    )


def _compile_score(policy_model, reference_model, **objective):
    """A function of a batch that returns its summed metrics."""
    check_loss_options(**objective)

    def score(batch):
        reference_logits = _reference_scores(reference_model, batch)
        return _loss_and_sums(policy_model, reference_logits, batch, **objective)[1]

    # The compiler fails on a graph that computes everything twice.
    if reference_model is policy_model:
        return score
    reference_state = getattr(reference_model, "state", {})
    return mx.compile(score, inputs=[policy_model.state, reference_state])


def _evaluate(
    score,
    policy_model,
    dataset,
    batch_size,
    num_batches,
    max_seq_length,
    clear_cache_threshold,
    progress_callback,
):
    """Score a data set, or a sample of its batches, and average over all ranks."""
    if len(dataset) == 0 or num_batches == 0:
        raise ValueError("There are no pairs to evaluate.")
    policy_model.eval()
    totals, group = None, mx.distributed.init()
    for batch in iterate_preference_batches(
        dataset,
        batch_size,
        max_seq_length,
        comm_group=group,
        num_batches=num_batches,
    ):
        totals = add_metrics(totals, score(batch))
        mx.eval(totals)
        _clear_cache(clear_cache_threshold)
        if progress_callback is not None:
            progress_callback()
    totals = all_sum_metrics(totals, group)
    means = {k: v.item() for k, v in mean_metrics(totals).items()}
    return means | {"pairs": totals["pairs"].item()}


def _step_seed(seed, it, rank):
    # Random numbers are a function of the step, so a resumed run repeats them.
    return int(np.random.SeedSequence([seed, it, rank]).generate_state(1)[0])


def _objective(args):
    return {
        "beta": args.beta,
        "label_smoothing": args.label_smoothing,
        "loss_type": args.loss_type,
    }


def _compile_step(policy_model, reference_model, optimizer, args):
    """``dpo_step`` compiled, and the state that it changes."""
    accumulator = None
    if args.grad_accumulation_steps > 1:
        accumulator = gradient_accumulator(policy_model)
    if not isinstance(optimizer, MasterWeights):
        # A state that grows during the first step would compile it twice.
        optimizer.init(policy_model.trainable_parameters())
    state = [
        policy_model.state,
        optimizer.state,
        mx.random.state,
        accumulator or {},
    ]
    # An argument, not a constant: it may change during the run.
    reference_state = getattr(reference_model, "state", {})

    @partial(mx.compile, inputs=[*state, reference_state], outputs=state)
    def step(batch, do_update):
        return dpo_step(
            policy_model,
            reference_model,
            batch,
            optimizer,
            **_objective(args),
            max_grad_norm=args.max_grad_norm,
            accumulator=accumulator,
            do_update=do_update,
            reduce=False,
        )[1]

    return step, state


def _validate(it, ui, score, policy_model, dataset, args, callback):
    """Evaluate, show and report, and go back to training mode."""
    tic = time.perf_counter()
    batches = -(-len(dataset) // args.batch_size)
    if args.val_batches != -1:
        batches = min(batches, args.val_batches)
    with ui.val_task(batches) as advance:
        metrics = _evaluate(
            score,
            policy_model,
            dataset,
            args.batch_size,
            args.val_batches,
            args.max_seq_length,
            args.clear_cache_threshold,
            advance,
        )
    policy_model.train()
    seconds = time.perf_counter() - tic
    ui.report_val(it, metrics, seconds)
    if callback is not None:
        info = {f"val_{k}": v for k, v in metrics.items()}
        callback.on_val_loss_report({"iteration": it, **info, "val_time": seconds})


def _report(it, ui, window, optimizer, grad_norm, world, callback):
    """Average what happened since the last report, show and report it."""
    metrics = window.report(world)
    metrics["learning_rate"] = optimizer.learning_rate.item()
    metrics["grad_norm"] = grad_norm.item()
    ui.report_train(it, metrics)
    if callback is not None:
        info = {"iteration": it, "train_loss": metrics["loss"], **metrics}
        callback.on_train_loss_report(info)
    return metrics


def _save(it, ui, policy_model, args):
    """Write the adapter and a numbered copy of it."""
    file = Path(args.adapter_file)
    checkpoint = file.with_name(f"{it:07d}_{file.name}")
    save_adapter(policy_model, file)
    save_adapter(policy_model, checkpoint)
    ui.report_save(checkpoint)


def train_dpo(
    policy_model: nn.Module,
    optimizer: optim.Optimizer,
    train_dataset: Any,
    val_dataset: Any = None,
    args: DPOTrainingArgs | None = None,
    reference_model: Callable[[mx.array], mx.array] | None = None,
    training_callback: TrainingCallback | None = None,
) -> dict[str, float]:
    """
    Train a policy on preference pairs and save what was trained.

    Args:
        policy_model (nn.Module): The model, its trainable parameters set up.
        optimizer (optim.Optimizer): Any of MLX's optimizers.
        train_dataset (PreferenceDataset): The pairs.
        val_dataset (PreferenceDataset, optional): Held-out pairs, evaluated
            before the first step, every ``steps_per_eval`` and at the end.
        args (DPOTrainingArgs, optional): The settings of the run.
        reference_model (Callable, optional): Default: the policy as it is now.
        training_callback (TrainingCallback, optional): Gets flat dicts of
            metrics, the names of validation with ``val_`` before them; on rank 0.

    Returns:
        dict: The last report's metrics.

    Raises:
        ValueError: If a setting is out of range or the data set is too small.

    Example:
        >>> import tempfile
        >>> class Pairs(list):
        ...     itemlen = lambda self, i: self[i][3][2]
        >>> pairs = Pairs([([1], [2], [3, 4], (1, 2, 3))])
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = [nn.Embedding(8, 8)]
        ...     def __call__(self, tokens):
        ...         return self.layers[0](tokens)
        >>> import contextlib, io
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = DPOTrainingArgs(batch_size=1, iters=2)
        ...     args.adapter_file = f"{folder}/adapters.safetensors"
        ...     with contextlib.redirect_stdout(io.StringIO()):
        ...         metrics = train_dpo(Model(), optim.SGD(1.0), pairs, args=args)
        >>> metrics["trained_pairs"]
        2.0
    """
    args = args or DPOTrainingArgs()
    if args.grad_accumulation_steps < 1:
        raise ValueError("grad_accumulation_steps must be at least 1")
    maybe_set_recommended_wired_limit()
    world = mx.distributed.init()
    rank = world.rank()
    if rank == 0:
        Path(args.adapter_file).parent.mkdir(parents=True, exist_ok=True)
    else:
        training_callback = None
    if reference_model is None:
        reference_model = FrozenStart(policy_model)
    score = _compile_score(policy_model, reference_model, **_objective(args))
    optimizer = with_master_weights(optimizer, policy_model)
    window, metrics, grad_norm = MetricsWindow(), {}, mx.array(0.0)
    ui = PreferenceTrainUI(args.iters, rank=rank)
    batches = iterate_preference_batches(
        train_dataset,
        args.batch_size,
        args.max_seq_length,
        loop=True,
        seed=args.seed,
        comm_group=world,
    )

    def validate(it):
        _validate(it, ui, score, policy_model, val_dataset, args, training_callback)

    with ui, keyed_layers(policy_model, args.grad_checkpoint):
        step, state = _compile_step(policy_model, reference_model, optimizer, args)
        if val_dataset:
            validate(0)
        policy_model.train()
        for it, batch in zip(range(1, args.iters + 1), batches):
            tic = time.perf_counter()
            last = it == args.iters
            mx.random.seed(_step_seed(args.seed, it, rank))
            sums = step(batch, it % args.grad_accumulation_steps == 0 or last)
            grad_norm = sums.pop("grad_norm", grad_norm)
            window.add(sums, batch["tokens"].size)
            mx.eval(state, window.sums, grad_norm)
            _clear_cache(args.clear_cache_threshold)
            window.seconds += time.perf_counter() - tic
            ui.advance()
            if it % args.steps_per_report == 0 or last:
                metrics = _report(
                    it, ui, window, optimizer, grad_norm, world, training_callback
                )
            if val_dataset and (it % args.steps_per_eval == 0 or last):
                validate(it)
            if it % args.steps_per_save == 0 and rank == 0:
                _save(it, ui, policy_model, args)
    if rank == 0:
        save_adapter(policy_model, args.adapter_file)
    policy_model.eval()
    return metrics
