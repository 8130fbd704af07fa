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
from mlx.nn.utils import average_gradients
from mlx.utils import tree_map

from ..cli_ui import PreferenceTrainUI, TrainUI, rprint
from ..utils import maybe_set_recommended_wired_limit
from ._upstream_trainer import (
    CacheDataset,
    Optional,
    TrainingArgs,
    TrainingCallback,
    _clear_cache,
    default_loss,
    evaluate,
    grad_checkpoint,
    iterate_batches,
    train,
    tree_flatten,
)
from .checkpoints import save_adapter
from .grad_checkpoint import keyed_layers
from .logps import paired_sequence_logps, sequence_logps
from .losses import check_loss_options, preference_loss
from .master_weights import MasterWeights, with_master_weights
from .preference_batches import iterate_preference_batches
from .preference_metrics import (
    MetricsWindow,
    add_metrics,
    all_sum_metrics,
    mean_metrics,
    preference_sums,
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


def _reference_scores(reference_model, batch):
    """The reference's logits, or None where the batch brings its log-probs."""
    if reference_model is None:
        if "reference_logps" not in batch:
            raise ValueError(
                "Without a reference_model the batch needs 'reference_logps', the "
                "reference's summed log-probs of its 2B rows."
            )
        return None
    training = getattr(reference_model, "training", False)
    if training:
        reference_model.eval()
    # Outside value_and_grad: inside, attention takes its slower training path.
    logits = mx.stop_gradient(reference_model(batch["tokens"][:, :-1]))
    if training:
        reference_model.train()
    return logits


def _loss_and_sums(
    policy_model, reference_logits, batch, beta, label_smoothing, loss_type
):
    """The loss summed over the batch's pairs, and the summed metrics."""
    tokens, lengths, weights = batch["tokens"], batch["lengths"], batch["weights"]
    if reference_logits is None:
        policy_logps = sequence_logps(policy_model, tokens, lengths)
        reference_logps, kl = batch["reference_logps"], None
    else:
        policy_logps, reference_logps, kl = paired_sequence_logps(
            policy_model, reference_logits, tokens, lengths
        )
    losses, *rewards = preference_loss(
        *mx.split(policy_logps, 2),
        *mx.split(reference_logps, 2),
        beta,
        label_smoothing,
        loss_type,
    )
    sums = preference_sums(
        losses, *rewards, policy_logps, reference_logps, lengths, weights, kl
    )
    return (losses * weights).sum(), sums


def _update(policy_model, optimizer, gradients, pairs, max_grad_norm):
    """Average the summed float32 gradients over all ranks' pairs, clip, apply."""
    gradients = average_gradients(gradients)
    pairs = average_gradients({"pairs": pairs})["pairs"]
    scale = 1 / mx.maximum(pairs, 1)
    gradients = tree_map(lambda g: g * scale, gradients)
    gradients, norm = optim.clip_grad_norm(gradients, max_grad_norm or float("inf"))
    if not isinstance(optimizer, MasterWeights):
        gradients = tree_map(
            lambda g, p: g.astype(p.dtype),
            gradients,
            policy_model.trainable_parameters(),
        )
    optimizer.update(policy_model, gradients)
    return norm


def dpo_step(
    policy_model: nn.Module,
    reference_model: Callable[[mx.array], mx.array] | None,
    batch: dict[str, mx.array],
    optimizer: Any,
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    max_grad_norm: float | None = None,
    accumulator: dict | None = None,
    do_update: bool = True,
    reduce: bool = True,
) -> tuple[mx.array, dict[str, mx.array]]:
    """
    One training step: both forwards, the loss, its gradient and the update.

    Paper: https://arxiv.org/abs/2305.18290, Eq. 7.

    Args:
        policy_model (nn.Module): The model in training; its trainable
            parameters are updated in place.
        reference_model (Callable, optional): A ``FrozenStart``, or another model
            in evaluation mode. ``None`` takes the log-probs that are known from
            ``batch["reference_logps"]``, in nats, shape ``(2B,)``.
        batch (dict): What ``collate_pairs`` makes of ``B`` pairs.
        optimizer (optim.Optimizer): The optimizer, or a ``MasterWeights``.
        beta (float): Inverse temperature. Default: ``0.1``.
        label_smoothing (float): Probability that a label is wrong. Default: ``0``.
        loss_type (str): A key of ``losses.LOSSES``. Default: ``"sigmoid"``.
        max_grad_norm (float, optional): Clip the gradient to this norm.
        accumulator (dict, optional): Holds the gradient of earlier batches, see
            ``gradient_accumulator``. The update uses the mean over all pairs
            since the last one, as one big batch would.
        do_update (bool): ``False`` only adds to the accumulator.
        reduce (bool): Average the metrics. ``False`` returns sums, to be added
            over batches and given to ``mean_metrics``. Default: ``True``.

    Returns:
        tuple: the mean loss over the batch's pairs in nats, a float32 scalar,
        and a dict of metrics (scalars), with ``grad_norm`` after an update.

    Raises:
        ValueError: If an option is out of range, or there is neither a reference
            model nor known log-probs.

    Example:
        >>> from mlx_lm.tuner.preference_batches import collate_pairs
        >>> class Bigram(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = mx.zeros((8, 8))
        ...     def __call__(self, tokens):
        ...         return self.table[tokens]
        >>> policy = Bigram()
        >>> reference = FrozenStart(policy)
        >>> batch = collate_pairs([([1], [2], [3], (1, 2, 2))])
        >>> for _ in range(2):
        ...     loss, metrics = dpo_step(policy, reference, batch, optim.SGD(1.0))
        >>> loss.item() < 0.6931, metrics["rewards/accuracies"].item()
        (True, 1.0)
    """
    check_loss_options(beta, label_smoothing, loss_type)
    reference_logits = _reference_scores(reference_model, batch)
    parameters = policy_model.trainable_parameters()

    def loss_fn(batch):
        return _loss_and_sums(
            policy_model, reference_logits, batch, beta, label_smoothing, loss_type
        )

    (loss, sums), gradients = nn.value_and_grad(policy_model, loss_fn)(batch)
    # Differentiation leaves its tracers in the model.
    policy_model.update(parameters)
    gradients = tree_map(lambda g: g.astype(mx.float32), gradients)

    pairs = sums["pairs"]
    if accumulator is not None:
        gradients = tree_map(mx.add, accumulator["gradients"], gradients)
        pairs = pairs + accumulator["pairs"]
        keep = mx.zeros_like if do_update else lambda x: x
        accumulator["gradients"] = tree_map(keep, gradients)
        accumulator["pairs"] = keep(pairs)
    metrics = mean_metrics(sums) if reduce else sums
    if do_update:
        metrics["grad_norm"] = _update(
            policy_model, optimizer, gradients, pairs, max_grad_norm
        )
    return loss / mx.maximum(sums["pairs"], 1), metrics


def gradient_accumulator(model: nn.Module) -> dict:
    """
    An empty accumulator for ``dpo_step``, in float32.

    Args:
        model (nn.Module): The policy.

    Returns:
        dict: The summed gradient and the number of pairs in it.

    Example:
        >>> gradient_accumulator(nn.Linear(1, 1))["pairs"].item()
        0.0
    """
    zeros = tree_map(
        lambda p: mx.zeros(p.shape, dtype=mx.float32), model.trainable_parameters()
    )
    return {"gradients": zeros, "pairs": mx.array(0.0)}


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
    total_batches = -(-len(dataset) // batch_size)
    if total_batches == 0 or num_batches == 0:
        raise ValueError("There are no pairs to evaluate.")
    sample = np.arange(total_batches)
    if 0 < num_batches < total_batches:
        # The same sample at every evaluation, of all lengths.
        sample = np.linspace(0, total_batches - 1, num_batches).round()
    chosen_batches, totals = set(sample.tolist()), None
    policy_model.eval()
    group = mx.distributed.init()
    batches = iterate_preference_batches(
        dataset, batch_size, max_seq_length, comm_group=group
    )
    for i, batch in enumerate(batches):
        if i not in chosen_batches:
            continue
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
