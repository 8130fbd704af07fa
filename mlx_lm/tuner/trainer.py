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

from ..cli_ui import TrainUI, rprint
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
from .batch_shape import Bucket
from .grad_checkpoint import keyed_layers
from .logps import paired_sequence_logps
from .memory_plan import cache_limit
from .objective import Objective
from .pair_scores import PairCollector
from .preference_evaluation import evaluate_pairs
from .preference_metrics import hidden_metrics, sum_values
from .preference_run import PreferenceRun
from .preference_step import (
    answer_logps,
    dpo_step,
    gradient_accumulator,
    loss_and_values,
)
from .reference import FrozenStart
from .remembered_reference import NoReference, RememberedReference
from .training_state import TrainingState
from .training_step import compiles


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
    # Made of the three above if it is not given.
    objective: Objective = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "All of what is minimised, instead of these three."},
    )
    max_grad_norm: float | None = field(
        default=1.0,
        metadata={"help": "Clip the gradient to this norm, null or 0 for no clipping."},
    )
    clear_cache_threshold: int | None = field(
        default=None,
        metadata={
            "help": "Empty the allocator's cache when it holds more bytes, default: "
            "an eighth of the device's memory, of a CUDA card three quarters."
        },
    )
    debug_gradients: bool = field(
        default=False,
        metadata={"help": "Report the gradient of every module."},
    )
    keep_checkpoints: int | None = field(
        default=None,
        metadata={"help": "Keep so many checkpoints. Default: every adapter."},
    )
    save_best: str | None = field(
        default=None,
        metadata={"help": "Keep the best adapter by validation: accuracy or loss."},
    )
    max_skipped_steps: int = field(
        default=10,
        metadata={"help": "Stop after so many steps in a row without finite numbers."},
    )
    sync_reference: bool = field(
        default=False, metadata={"help": "Let the reference follow the policy."}
    )
    sync_alpha: float = field(
        default=0.6, metadata={"help": "The policy's share in the new reference."}
    )
    sync_steps: int = field(
        default=512, metadata={"help": "Updates between two new references."}
    )
    sharing: str = field(
        default="plain",
        metadata={"help": "How prompts are shared: ragged, equal or plain."},
    )
    compile: bool | None = field(
        default=None, metadata={"help": "Compile the step. Default: on a GPU."}
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of the order of the data and of dropout."}
    )

    def __post_init__(self) -> None:
        if self.objective is None:
            self.objective = Objective(
                self.beta, self.loss_type, label_smoothing=self.label_smoothing
            )


def evaluate_dpo(
    policy_model: nn.Module,
    reference_model: Callable[[mx.array], mx.array],
    dataset: Any,
    batch_size: int = 4,
    num_batches: int = -1,
    beta: float = 0.1,
    *,
    buckets: list[Bucket] | None = None,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    objective: Objective | None = None,
    clear_cache_threshold: int | None = None,
    compile: bool | None = None,
    progress_callback: Callable[[], Any] | None = None,
    collector: PairCollector | None = None,
) -> dict[str, float]:
    """
    Loss, exact KL and metrics over held-out pairs, each pair counted once.

    Args:
        policy_model (nn.Module): The model to evaluate; left in evaluation mode.
        reference_model (Callable): A ``FrozenStart`` or another model.
        dataset (PreferenceDataset): The pairs. The last, shorter batch counts.
        batch_size (int): Pairs a batch over all ranks. Default: ``4``.
        num_batches (int): Evaluate a fixed sample of so many batches, all of
            them with ``-1``. Default: ``-1``.
        beta (float): Inverse temperature. Default: ``0.1``.
        buckets (list, optional): What ``plan_batches`` returned. Default: whole
            rows in buckets of similar length.
        label_smoothing (float): Probability that a label is wrong. Default: ``0``.
        loss_type (str): A key of ``losses.LOSSES``. Default: ``"sigmoid"``.
        objective (Objective, optional): All of what is minimised, instead of beta,
            smoothing and type.
        clear_cache_threshold (int): Clear the allocator's cache beyond so many
            bytes. Default: an eighth of the device's memory, of a CUDA card three
            quarters.
        compile (bool, optional): Compile what scores a batch. Default: on a GPU.
        progress_callback (Callable, optional): Called after every batch.
        collector (PairCollector, optional): Gets the scores of every pair.

    Returns:
        dict: The averages by name, see ``mean_metrics``, and ``pairs``, how many
        there were.

    Raises:
        ValueError: If the data set is empty or an option is out of range.

    Example:
        >>> pairs = [([1], [2], [3, 4], (1, 2, 3))]
        >>> model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
        >>> metrics = evaluate_dpo(model, model, pairs)
        >>> round(metrics["loss"], 4), metrics["rewards/accuracies"]
        (0.6931, 0.0)
    """
    objective = objective or Objective(beta, loss_type, label_smoothing=label_smoothing)

    def score(batch):
        *plain, kl = paired_sequence_logps(policy_model, reference_model, batch)
        policy_logps, reference_logps = plain
        if objective.ld_alpha < 1:
            # Loss and rewards alone are of weighted sums.
            policy_logps, reference_logps, _ = paired_sequence_logps(
                policy_model, reference_model, batch, ld_alpha=objective.ld_alpha
            )
        confidences = None
        if objective.use_weighting:
            _, confidences = answer_logps(policy_model, batch, objective)
        _, values = loss_and_values(
            policy_logps, reference_logps, batch, objective, confidences
        )
        names = ("policy_logps", "reference_logps")
        return values | dict(zip(names, plain)) | {"kl": kl}

    # The compiler fails on a graph that computes everything twice.
    twice = reference_model is policy_model or objective.ld_alpha < 1
    if not twice and compiles(DPOTrainingArgs(compile=compile)):
        state = [policy_model.state, getattr(reference_model, "state", {})]
        score = mx.compile(score, inputs=state)

    def summed(batch):
        values = score(batch.arrays)
        if collector is not None:
            collector.add(batch, values)
        return sum_values(values, batch.arrays)

    return evaluate_pairs(
        summed,
        policy_model,
        dataset,
        batch_size,
        num_batches,
        buckets,
        cache_limit(clear_cache_threshold),
        progress_callback,
        hidden_metrics(objective, tested=True),
    )


def train_dpo(
    policy_model: nn.Module,
    optimizer: optim.Optimizer,
    train_dataset: Any,
    val_dataset: Any = None,
    args: DPOTrainingArgs | None = None,
    reference_model: Callable[[mx.array], mx.array] | RememberedReference | None = None,
    training_callback: TrainingCallback | None = None,
    resume: TrainingState | None = None,
    identity: dict[str, Any] | None = None,
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
        reference_model (Callable, optional): A model, or a
            ``RememberedReference``. Default: the policy as it is now.
        training_callback (TrainingCallback, optional): Gets flat dicts of
            metrics, the names of validation with ``val_`` before them; on rank 0.
        resume (TrainingState, optional): Go on from this checkpoint; the policy is
            as it was when the run began.
        identity (dict, optional): What must be the same for a checkpoint to be
            resumed; written into every one.

    Returns:
        dict: The last report's metrics.

    Raises:
        ValueError: If a setting is out of range or the data set is too small.
        TrainingStopped: If the numbers went wrong, or memory ran out.
        SystemExit: After SIGINT or SIGTERM, when the run is saved.

    Example:
        >>> import tempfile
        >>> pairs = [([1], [2], [3, 4], (1, 2, 3))]
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
    if mx.distributed.init().rank() == 0:
        Path(args.adapter_file).parent.mkdir(parents=True, exist_ok=True)
    else:
        training_callback = None
    reference = reference_model
    if not args.objective.needs_reference:
        # Another one would remember, as its own, the zeros that stand for it.
        reference = NoReference()
    elif not isinstance(reference, RememberedReference):
        start = reference or FrozenStart(policy_model)
        reference = RememberedReference(start, moving=args.sync_reference)
    run = PreferenceRun(
        policy_model, reference, optimizer, args, train_dataset, val_dataset
    )
    run.callback, run.identity = training_callback, identity or {}
    with run.ui, keyed_layers(policy_model, args.grad_checkpoint):
        run.train(resume)
    policy_model.eval()
    return run.metrics
