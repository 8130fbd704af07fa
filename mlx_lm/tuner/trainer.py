# Copyright © 2026 MLX Contributors

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from ..preference.device import cache_limit, compiles
from ..preference.errors import InputError
from ..preference.forward.frozen import FrozenStart
from ..preference.objective.objective import Objective
from ..preference.objective.pairs import examples
from ..preference.ranks import on_all_ranks
from ..preference.step import (
    answer_logps,
    loss_and_values,
    reference_pass,
    testing_step,
)
from ..preference.training import DPOTrainingArgs
from ..preference.update import accumulate, all_finite, gradient_accumulator, update
from ..utils import maybe_set_recommended_wired_limit
from ._upstream_trainer import (
    CacheDataset,
    Optional,
    TrainingArgs,
    TrainingCallback,
    TrainUI,
    _clear_cache,
    average_gradients,
    default_loss,
    evaluate,
    grad_checkpoint,
    iterate_batches,
    np,
    partial,
    rprint,
    time,
    train,
    tree_flatten,
    tree_map,
)

# Whoever trains with mlx_lm.lora imports this module: what only a preference run
# needs is imported when one begins.


def evaluate_dpo(
    policy_model: nn.Module,
    reference_model: Callable[[mx.array], mx.array],
    dataset: Any,
    batch_size: int = 4,
    num_batches: int = -1,
    beta: float = 0.1,
    *,
    buckets: list | None = None,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    objective: Objective | None = None,
    clear_cache_threshold: int | None = None,
    compile: bool | None = None,
    progress_callback: Callable[[], Any] | None = None,
    collector: Any = None,
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
    from ..preference.measure.evaluation import evaluate_pairs
    from ..preference.measure.metrics import hidden_metrics

    objective = objective or Objective(beta, loss_type, label_smoothing=label_smoothing)
    score = testing_step(policy_model, reference_model, objective)
    # The compiler fails on a graph that computes everything twice.
    twice = reference_model is policy_model or objective.ld_alpha < 1
    if not twice and compiles(compile):
        state = [policy_model.state, getattr(reference_model, "state", {})]
        score = mx.compile(score, inputs=state)

    return evaluate_pairs(
        lambda batch: (score(batch.arrays), batch.arrays),
        policy_model,
        dataset,
        batch_size,
        num_batches,
        buckets,
        cache_limit(clear_cache_threshold),
        progress_callback,
        hidden_metrics(objective, tested=True),
        collector and collector.add,
    )


def train_dpo(
    policy_model: nn.Module,
    optimizer: optim.Optimizer,
    train_dataset: Any,
    val_dataset: Any = None,
    args: DPOTrainingArgs | None = None,
    reference_model: Any = None,
    training_callback: TrainingCallback | None = None,
    resume: Any = None,
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
        ValueError: If a setting is out of range, the data set is too small or of
            another kind, nothing can be trained, the reference is the policy, or
            another run is writing to the folder.
        TrainingStopped: If the numbers went wrong, or memory ran out.
        SystemExit: After SIGINT or SIGTERM, when the run is saved.

    Example:
        >>> import tempfile
        >>> pairs = [([1], [2], [3, 4], (1, 2, 3))]
        >>> model = nn.Sequential(nn.Embedding(8, 8))
        >>> import contextlib, io
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = f"{folder}/adapters.safetensors"
        ...     args = DPOTrainingArgs(batch_size=1, iters=2, adapter_file=file)
        ...     with contextlib.redirect_stdout(io.StringIO()):
        ...         metrics = train_dpo(model, optim.SGD(1.0), pairs, args=args)
        >>> metrics["trained_pairs"]
        2.0
    """
    from ..preference.features import features
    from ..preference.reference.live import LiveReference, NoReference
    from ..preference.run.loop import PreferenceRun
    from ..preference.terminal import lasting_output

    args = args or DPOTrainingArgs()
    if reference_model is policy_model:
        raise InputError(
            "reference_model is the policy itself, which moves: leave it out, and the "
            "reference is the policy as it is now."
        )
    if not tree_flatten(policy_model.trainable_parameters()):
        raise InputError("Nothing to train: policy_model has no trainable parameters.")
    maybe_set_recommended_wired_limit()
    folder = Path(args.adapter_file).parent
    if mx.distributed.init().rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    else:
        training_callback = None
    reference = reference_model
    if not args.objective.needs_reference:
        # Another one would remember, as its own, the zeros that stand for it.
        reference = NoReference()
    elif not isinstance(reference, LiveReference):
        start = reference = LiveReference(reference or FrozenStart(policy_model))
        for feature in features():
            reference = feature.reference(start.model, args) or reference
    for feature in features():
        optimizer = feature.optimizer(optimizer, policy_model, args)
    sets = train_dataset, val_dataset
    run = PreferenceRun(policy_model, reference, optimizer, args, *sets)
    run.callback, run.identity, run.resume = training_callback, identity or {}, resume
    run.take_part(features())
    with ExitStack() as stack:
        for feature in features():
            stack.enter_context(feature.around(policy_model, args, folder))
        stack.enter_context(lasting_output())
        stack.enter_context(run.ui)
        run.train()
    policy_model.eval()
    return run.metrics


def dpo_step(
    policy_model: nn.Module,
    reference_model: Callable[[mx.array], mx.array] | None,
    batch: dict[str, mx.array],
    optimizer: Any,
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    objective: Objective | None = None,
    max_grad_norm: float | None = None,
    accumulator: dict | None = None,
    do_update: bool = True,
    reduce: bool = True,
    keep_gradients: bool = False,
) -> tuple[mx.array, dict[str, mx.array]]:
    """
    One training step: both forwards, the loss, its gradient and the update.

    Paper: https://arxiv.org/abs/2305.18290, Eq. 7.

    Args:
        policy_model (nn.Module): The model in training; its trainable
            parameters are updated in place.
        reference_model (Callable, optional): A ``FrozenStart``, or another model
            in evaluation mode. ``None`` takes the log-probs that are known from
            ``batch["reference_logps"]``, in nats, shape ``(2B,)``. An objective
            without a reference runs none.
        batch (dict): What ``collate_pairs`` makes of ``B`` pairs.
        optimizer (optim.Optimizer): The optimizer, or a ``MasterWeights``.
        beta (float): Inverse temperature. Default: ``0.1``.
        label_smoothing (float): Probability that a label is wrong. Default: ``0``.
        loss_type (str): A key of ``losses.LOSSES``. Default: ``"sigmoid"``.
        objective (Objective, optional): All of what is minimised, instead of beta,
            smoothing and type.
        max_grad_norm (float, optional): Clip the gradient to this norm.
        accumulator (dict, optional): Holds the gradient of earlier batches, see
            ``gradient_accumulator``. The update uses the mean over all pairs
            since the last one, as one big batch would.
        do_update (bool): ``False`` only adds to the accumulator.
        reduce (bool): Average the metrics. ``False`` returns arguments of
            ``preference_sums`` instead, whose sums may be added over batches and
            given to ``mean_metrics``. Default: ``True``.
        keep_gradients (bool): Return the gradient that was applied, a tree, as
            ``gradients``. Default: ``False``.

    Returns:
        tuple: the mean loss over the batch's pairs in nats, a float32 scalar,
        and a dict of metrics (scalars), with ``grad_norm`` after an update and
        ``skipped``: 1 if a loss or gradient was not finite, so that the batch
        changed nothing.

    Raises:
        ValueError: If an option is out of range, or there is neither a reference
            model nor known log-probs.

    Example:
        >>> from mlx_lm.preference.batch.collate import collate_pairs
        >>> from mlx_lm.preference.forward.frozen import FrozenStart
        >>> policy = nn.Sequential(nn.Embedding(8, 8))
        >>> reference = FrozenStart(policy)
        >>> batch = collate_pairs([([1], [2], [3], (1, 2, 2))])
        >>> for _ in range(2):
        ...     loss, metrics = dpo_step(policy, reference, batch, optim.SGD(1.0))
        >>> loss.item() < 0.6931, metrics["rewards/accuracies"].item()
        (True, 1.0)
    """
    objective = objective or Objective(beta, loss_type, label_smoothing=label_smoothing)
    reference_logps, common = reference_pass(
        policy_model, reference_model, batch, objective
    )
    parameters, joins = policy_model.trainable_parameters(), hasattr(optimizer, "join")
    if joins:
        optimizer.round(policy_model)

    def loss_fn(batch):
        with common.replaying():
            logps, sure = answer_logps(policy_model, batch, objective, gradient=True)
        return loss_and_values(logps, reference_logps, batch, objective, sure)

    (loss, values), gradients = nn.value_and_grad(policy_model, loss_fn)(batch)
    # Differentiation leaves its tracers in the model.
    policy_model.update(parameters)
    if not joins or accumulator is not None:
        gradients = tree_map(lambda g: g.astype(mx.float32), gradients)

    batch_pairs = pairs = examples(batch["weights"], batch.get("places")).sum()
    # An infinite log-prob may leave the loss finite.
    applies = all_finite([loss, values])
    if accumulator is not None:
        # Of several batches, only what is finite counts: on no rank if on one not.
        applies = on_all_ranks(mx.logical_and(applies, all_finite(gradients)))
        gradients, pairs = accumulate(accumulator, gradients, pairs, applies, do_update)
    else:
        # No number of pairs: the update sees it on every rank.
        pairs = mx.where(applies, pairs, mx.nan)
    metrics = values
    if reduce:
        from ..preference.measure import metrics as measure

        sums = measure.preference_sums(**values, **measure.metric_columns(batch))
        metrics = measure.mean_metrics(sums, hidden=measure.hidden_metrics(objective))
    if do_update:
        metrics["grad_norm"], updated, gradients = update(
            policy_model, optimizer, gradients, pairs, max_grad_norm
        )
        if keep_gradients:
            metrics["gradients"] = gradients
        applies = mx.logical_and(applies, updated)
    metrics["skipped"] = 1 - applies.astype(mx.float32)
    return loss / mx.where(batch_pairs > 0, batch_pairs, 1), metrics


def training_step(
    policy_model: nn.Module, optimizer: Any, args: DPOTrainingArgs
) -> tuple[Callable, list]:
    """``dpo_step`` with a run's settings, and the state that it changes."""
    adds = args.grad_accumulation_steps > 1
    accumulator = gradient_accumulator(policy_model) if adds else None
    if not hasattr(optimizer, "masters"):
        # A state that grows during the first step would compile it twice.
        optimizer.init(policy_model.trainable_parameters())
    state = [policy_model.state, optimizer.state, mx.random.state, accumulator or {}]

    def step(reference_model, batch, do_update):
        return dpo_step(
            policy_model,
            reference_model,
            batch,
            optimizer,
            objective=args.objective,
            max_grad_norm=args.max_grad_norm,
            accumulator=accumulator,
            do_update=do_update,
            reduce=False,
            keep_gradients=args.debug_gradients,
        )[1]

    return step, state
