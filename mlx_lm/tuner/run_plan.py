# Copyright © 2026 MLX Contributors

"""What a run will do, before it does it: its batches and its memory."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .batch_shape import Bucket, padded_tokens, pair_lengths
from .grad_checkpoint import keyed_layers
from .length_buckets import FREE_SHAPES, plan_batches
from .memory_plan import (
    MemoryEstimate,
    check_fits,
    device_memory,
    predict_peak,
    smaller_settings,
)
from .preference_batches import collate_pairs, value_arrays
from .training_step import compiles, training_step

# Every batch shape is compiled once, and its program is never dropped.
MAX_SHAPES = 32


def training_plan(dataset: Any, args: Any, in_order: bool = False) -> list[Bucket]:
    """
    The buckets that a run makes batches of.

    Args:
        dataset (PreferenceDataset): The pairs.
        args (DPOTrainingArgs): The settings of the run.
        in_order (bool): Nothing is shuffled, as in evaluation, so that buckets may
            be smaller. Default: ``False``.

    Returns:
        list: What ``plan_batches`` returned.

    Example:
        >>> from mlx_lm.tuner.trainer import DPOTrainingArgs
        >>> pairs = [([1], [2], [3, 4], (1, 2, 3))] * 8
        >>> len(training_plan(pairs, DPOTrainingArgs(batch_size=2)))
        1
    """
    shapes = {"max_shapes": MAX_SHAPES, "min_batches": 4, "pad": 8}
    if args.grad_accumulation_steps > 1:
        # The step has two forms then.
        shapes["max_shapes"] //= 2
    if mx.cuda.is_available():
        # Attention has a fused gradient for queries of such a length.
        shapes["prompt_pad"] = 128
    if not compiles(args):
        # A shape costs nothing, so that padding decides.
        shapes = {"max_shapes": FREE_SHAPES, "min_batches": 2}
    if in_order:
        shapes["min_batches"] = 1
    return plan_batches(
        dataset,
        args.batch_size,
        args.sharing,
        max_length=args.max_seq_length,
        ranks=mx.distributed.init().size(),
        **shapes,
    )


class _Unread:
    """Pairs of given lengths, since shapes are all that memory depends on."""

    def __init__(self, lengths, dataset):
        self.lengths = lengths
        self.values = getattr(dataset, "values", {})
        self.group_size = getattr(dataset, "group_size", 1)

    def pair_lengths(self):
        return self.lengths

    def __getitem__(self, index):
        prompt, chosen, rejected = (int(n) for n in self.lengths[index])
        row = lambda n: np.zeros(n, dtype=np.int32)
        answers = row(chosen - prompt), row(rejected - prompt)
        return row(prompt), *answers, (prompt, chosen, rejected)


def _worst_batch(plan, lengths, size):
    """Shape and pairs of the batch that computes the most tokens."""

    def heaviest(bucket):
        total = lengths[bucket.indices, 1:].sum(axis=1)
        return bucket.indices[np.argsort(-total, kind="stable")[:size]]

    batches = [Bucket(bucket.shape, heaviest(bucket)) for bucket in plan]
    tokens = lambda batch: padded_tokens([batch], size, lengths)
    return max(batches, key=lambda batch: (tokens(batch), batch.shape.scored))


def predict_run(
    policy_model: nn.Module, reference: Any, optimizer: Any, dataset: Any, args: Any
) -> MemoryEstimate:
    """
    Predict the peak memory of a run from the worst of its batches.

    Nothing is computed: the weights may still be on the disk.

    Args:
        policy_model (nn.Module): The policy, its trainable parameters set up.
        reference (Callable, optional): The reference, None if its log-probs are
            known.
        optimizer (optim.Optimizer): The optimizer, or a ``MasterWeights``; gets
            its state but takes no step.
        dataset (PreferenceDataset): The pairs.
        args (DPOTrainingArgs): The settings of the run.

    Returns:
        MemoryEstimate: In bytes.

    Example:
        >>> predict_run.__name__  # see tests/test_run_plan.py
        'predict_run'
    """
    lengths = np.minimum(pair_lengths(dataset), args.max_seq_length)
    pairs = _Unread(lengths, dataset)
    plan = training_plan(pairs, args)
    ranks = mx.distributed.init().size()
    size = -(-args.batch_size // ranks)
    shape, indices = _worst_batch(plan, lengths, size)
    batch = collate_pairs([pairs[i] for i in indices], size, shape)
    batch |= value_arrays(pairs, indices.tolist(), batch["weights"])
    step, state = training_step(policy_model, optimizer, args)
    if reference is None:
        batch["reference_logps"] = mx.zeros((2 * size,))
    training = policy_model.training
    policy_model.train()
    try:
        with keyed_layers(policy_model, args.grad_checkpoint):
            return predict_peak(
                lambda batch: step(reference, batch, True),
                (batch,),
                [*state, getattr(reference, "state", {})],
                compiled=compiles(args),
            )
    finally:
        policy_model.train(training)


def check_memory(
    policy_model: nn.Module, reference: Any, optimizer: Any, dataset: Any, args: Any
) -> MemoryEstimate:
    """
    Predict a run's memory, and refuse the run if the device has less.

    Args:
        policy_model (nn.Module): The policy, its trainable parameters set up.
        reference (Callable, optional): The reference, None if its log-probs are
            known.
        optimizer (optim.Optimizer): The optimizer, or a ``MasterWeights``.
        dataset (PreferenceDataset): The pairs.
        args (DPOTrainingArgs): The settings of the run.

    Returns:
        MemoryEstimate: In bytes.

    Raises:
        ValueError: If the run does not fit; the message names settings that would.

    Example:
        >>> check_memory.__name__  # see tests/test_run_plan.py
        'check_memory'
    """
    predict = lambda change: predict_run(
        policy_model, reference, optimizer, dataset, replace(args, **change)
    )
    estimate = predict({})
    keys = ("batch_size", "max_seq_length", "grad_checkpoint")
    settings = {key: getattr(args, key) for key in keys}
    longest = int(pair_lengths(dataset).max())
    settings["max_seq_length"] = min(settings["max_seq_length"], longest)
    changes = smaller_settings(settings)
    limit = device_memory()
    check_fits(estimate, limit, changes, predict, _weight_bits(policy_model))
    return estimate


def _weight_bits(model):
    # The commonest kind of weight; packed ones are stored as integers.
    sizes = {4: 0, 16: 0, 32: 0}
    for _, x in tree_flatten(model.parameters()):
        bits = 8 * x.dtype.size if mx.issubdtype(x.dtype, mx.floating) else 4
        sizes[bits] = sizes.get(bits, 0) + x.nbytes
    return max(sizes, key=lambda bits: sizes[bits])


def describe_memory(estimate: MemoryEstimate) -> str:
    """
    Write a prediction for the run's header.

    Args:
        estimate (MemoryEstimate): In bytes.

    Returns:
        str: The peak and its parts in GB, in MB if it is small.

    Example:
        >>> describe_memory(MemoryEstimate(10**9, 0, 0, 2 * 10**8, 3 * 10**8))
        '1.50 GB: weights 1.00 · optimizer 0.20 · activations 0.30'
    """
    # The largest of the parts is never rounded to 0.
    size, unit = (1e9, "GB") if estimate.total >= 1e8 else (1e6, "MB")
    parts = {k: v / size for k, v in vars(estimate).items()}
    shown = [f"{k} {v:.2f}" for k, v in parts.items() if v >= 0.005]
    return f"{estimate.total / size:.2f} {unit}: {' · '.join(shown)}"


def describe_plan(buckets: list[Bucket], batch_size: int) -> list[str]:
    """
    Write a run's batches as a table.

    Args:
        buckets (list): What ``training_plan`` returned.
        batch_size (int): Pairs a batch.

    Returns:
        list: One line for each batch shape, after a heading.

    Example:
        >>> pairs = [([1] * 9, [2], [3, 4], (9, 10, 11))] * 4
        >>> for line in describe_plan(plan_batches(pairs, 2, "equal"), 2):
        ...     print(line)
        batches   pairs  prompt  answers  scored
              2       4       8        2       8
    """
    lines = ["batches   pairs  prompt  answers  scored"]
    for shape, indices in buckets:
        count = -(-len(indices) // batch_size)
        lines.append(
            f"{count:>7}{len(indices):>8}{shape.prompt:>8}{shape.width:>9}"
            f"{shape.scored:>8}"
        )
    return lines
