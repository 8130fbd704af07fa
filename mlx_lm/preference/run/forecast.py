# Copyright © 2026 MLX Contributors

"""A run's peak memory, predicted from the worst of its batches."""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ...tuner.trainer import DPOTrainingArgs, training_step
from ..batch.collate import collate_pairs, epoch_batches, value_arrays
from ..batch.shape import Bucket, padded_tokens, pair_lengths
from ..device import compiles, device_memory
from ..features import Feature, features
from ..forward.frozen import FrozenStart, parameter_ids
from ..forward.recompute import keyed_layers
from ..forward.tokens import without_kernels
from ..memory.predict import MemoryEstimate, check_fits, predict_peak, smaller_settings
from ..memory.replay import OPERATIONS, task_limits
from ..policy.masters import as_float32
from ..step import scoring_step, testing_step
from .layouts import possible_layouts
from .loop import INPUTS
from .plan import training_plan


def plain(step: Callable) -> Callable:
    """A step that can be traced: our own kernels can't, and plain operations need more."""
    return without_kernels()(step)


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


def _heaviest(
    dataset: Any, args: DPOTrainingArgs, in_order: bool = False, batches: int = -1
) -> tuple[dict[str, mx.array], int]:
    """The batch that computes the most tokens, and how many pairs it has."""
    lengths = np.minimum(pair_lengths(dataset), args.max_seq_length)
    pairs = _Unread(lengths, dataset)
    plan = training_plan(pairs, args, in_order)
    if not in_order:
        layouts = possible_layouts(pairs, args, plan).values()
        plan = [b._replace(shape=shapes[b.shape]) for shapes in layouts for b in plan]
    if batches > 0:
        taken = epoch_batches(plan, args.batch_size, num_batches=batches)
        plan = [Bucket(shape, np.array(indices)) for shape, indices in taken]
    size = -(-args.batch_size // mx.distributed.init().size())
    shape, indices = _worst_batch(plan, lengths, size)
    batch = collate_pairs([pairs[i] for i in indices], size, shape)
    return batch | value_arrays(pairs, indices.tolist(), batch["weights"]), size


def predict_test(
    policy_model: nn.Module, reference: Any, dataset: Any, args: DPOTrainingArgs
) -> MemoryEstimate:
    """Predict the peak memory of a test from the worst of its batches."""
    batch, _ = _heaviest(dataset, args, in_order=True)
    score = plain(testing_step(policy_model, reference, args.objective))
    held = [policy_model.state, *_held_by(reference)]
    with _mode(policy_model, training=False):
        return predict_peak(score, (batch,), held, compiles(args.compile), False)


def predict_run(
    policy_model: nn.Module,
    reference: Any,
    optimizer: Any,
    dataset: Any,
    args: DPOTrainingArgs,
    valid_set: Any = None,
) -> MemoryEstimate:
    """Predict the peak memory of a run from the worst of its batches."""
    batch, size = _heaviest(dataset, args)
    step, state = training_step(policy_model, optimizer, args)
    held, compiled = [*state, *_held_by(reference)], compiles(args.compile)
    known = {} if reference is not None else {"reference_logps": mx.zeros((2 * size,))}
    if reference is not None and args.sync_reference:
        held.append(tree_map(as_float32, reference.exact))
    take = plain(lambda batch: step(reference, batch, True))
    keyed = keyed_layers(policy_model, args.grad_checkpoint)
    with _mode(policy_model, training=True), keyed:
        estimate = predict_peak(take, (batch | known,), held, compiled)
    other = valid_set and _heaviest(valid_set, args, True, args.val_batches)[0]
    if not other or not _is_larger(other, batch):
        return estimate
    score = plain(partial(scoring_step(policy_model, args.objective), reference))
    with _mode(policy_model, training=False):
        more = predict_peak(score, (other | known,), held, compiled, False).total
    # Nothing is trained there, but all of it is held.
    most = max(more - estimate.total, 0)
    return replace(estimate, activations=estimate.activations + most)


def _held_by(reference):
    # A start keeps adapters that it does not run, too.
    return [getattr(reference, name, {}) for name in ("state", "exact")]


def _is_larger(batch, other):
    """Whether a batch without a gradient may take more than another with one."""
    sizes = lambda x: [x[k].shape for k in (*INPUTS, "targets") if k in x]
    return len(sizes(batch)) != len(sizes(other)) or any(
        m > n for a, b in zip(sizes(batch), sizes(other)) for m, n in zip(a, b)
    )


@contextmanager
def _mode(model, training):
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def check_memory(
    policy_model: nn.Module,
    reference: Any,
    optimizer: Any,
    dataset: Any,
    args: DPOTrainingArgs,
    valid_set: Any = None,
) -> MemoryEstimate:
    """Predict a run's memory, and refuse the run if the device has less."""
    given = policy_model, reference, optimizer, dataset
    predict = lambda change: predict_run(*given, replace(args, **change), valid_set)
    sets = [dataset, *([valid_set] if valid_set else [])]
    return _refuse_larger(policy_model, sets, args, predict)


def check_test_memory(
    policy_model: nn.Module, reference: Any, dataset: Any, args: DPOTrainingArgs
) -> MemoryEstimate:
    """Predict a test's memory, and refuse the test if the device has less."""
    given = policy_model, reference, dataset
    predict = lambda change: predict_test(*given, replace(args, **change))
    args = replace(args, grad_checkpoint=True)  # Of no help where nothing is trained.
    return _refuse_larger(policy_model, [dataset], args, predict)


def _refuse_larger(
    policy_model: nn.Module,
    sets: list[Any],
    args: DPOTrainingArgs,
    predict: Callable[[dict[str, Any]], MemoryEstimate],
) -> MemoryEstimate:
    estimate = predict({})
    keys = ("batch_size", "max_seq_length", "grad_checkpoint")
    settings = {key: getattr(args, key) for key in keys}
    longest = max(int(pair_lengths(dataset).max()) for dataset in sets)
    settings["max_seq_length"] = min(settings["max_seq_length"], longest)
    limit, saved = device_memory(), _saved_by_4_bits(policy_model)
    others: list[tuple[str, Callable]] = [
        ("a 4-bit model", lambda: estimate.total - saved)
    ]
    if task_limits() is not None:
        # What is large enough to fill the memory keeps a GPU busy one by one.
        name = f"{OPERATIONS}=2 in the environment"
        others.append((name, lambda: _with_few_operations(predict).total))
    if limit is not None and mx.default_device() == mx.cpu:
        # A process that meets the limit there ends without a word.
        limit = limit * 9 // 10
    check_fits(estimate, limit, smaller_settings(settings), predict, others)
    return estimate


def _with_few_operations(predict):
    before = os.environ.get(OPERATIONS)
    os.environ[OPERATIONS] = "2"
    try:
        return predict({})
    finally:
        os.environ.pop(OPERATIONS)
        if before is not None:
            os.environ[OPERATIONS] = before


def _saved_by_4_bits(model):
    """How much less a policy's frozen weights would take, by their commonest kind."""
    trained = parameter_ids(model.trainable_parameters())
    # Packed ones are stored as integers.
    sizes = Counter({4: 0})
    for _, x in tree_flatten(model.parameters()):
        if id(x) not in trained:
            is_float = mx.issubdtype(x.dtype, mx.floating)
            sizes[8 * x.dtype.size if is_float else 4] += x.nbytes
    # 4 bits, and a 16-bit scale and bias for every 64 weights.
    return sizes.total() * (1 - 4.5 / sizes.most_common(1)[0][0])


def describe_memory(estimate: MemoryEstimate) -> str:
    """Write a prediction for the run's header."""
    # The largest of the parts is never rounded to 0.
    size, unit = (1e9, "GB") if estimate.total >= 1e8 else (1e6, "MB")
    parts = {k: v / size for k, v in vars(estimate).items()}
    shown = [f"{k} {v:.2f}" for k, v in parts.items() if v >= 0.005]
    return f"{estimate.total / size:.2f} {unit}: {' · '.join(shown)}"


class _Forecast(Feature):
    def before_weights(self, job: Any) -> None:
        model, settings = job.model, job.settings
        start = None
        if settings.objective.needs_reference:
            start = job.reference_model or FrozenStart(model)
        optimizer = job.optimizer
        for feature in features():
            optimizer = feature.optimizer(optimizer, model, settings)
        given = model, start, optimizer, job.train_set, settings, job.valid_set
        job.kept["memory"] = check_memory(*given)

    def before_test(self, job: Any, reference: Any, dataset: Any) -> None:
        check_test_memory(job.model, reference, dataset, job.settings)

    def header_rows(self, job: Any, rows: dict[str, str]) -> None:
        rows["peak memory"] = describe_memory(job.kept["memory"])


FEATURE = _Forecast()
