# Copyright © 2026 MLX Contributors

"""One preference step: both forwards, the loss, its gradient and the update."""

from typing import Any, Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.nn.utils import average_gradients
from mlx.utils import tree_map

from .logps import paired_sequence_logps, sequence_logps
from .losses import check_loss_options, preference_loss
from .master_weights import MasterWeights
from .preference_metrics import mean_metrics, preference_sums


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
        >>> from mlx_lm.tuner.reference import FrozenStart
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
