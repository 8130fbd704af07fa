# Copyright © 2026 MLX Contributors

"""The memory that a training step will need, before anything is allocated."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .memory_replay import Replay
from .memory_tape import fuse
from .memory_trace import array_places, trace_step


@dataclass(frozen=True)
class MemoryEstimate:
    """
    The predicted peak of a step, and what it is made of, in bytes.

    Args:
        weights (int): What the models hold and the step leaves as it is.
        trained (int): The adapters, or the unfrozen layers.
        reference (int): Other arrays that stay, as the start of the adapters.
        optimizer (int): The optimizer's state, and accumulated gradients.
        activations (int): The rest at the worst moment: activations, gradients,
            the head, and new values beside old ones.

    Example:
        >>> MemoryEstimate(4, 3, 0, 2, 1).total
        10
    """

    weights: int
    trained: int
    reference: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """
        The peak.

        Returns:
            int: Bytes.

        Example:
            >>> MemoryEstimate(1, 1, 1, 1, 1).total
            5
        """
        parts = (self.weights, self.trained, self.reference)
        return sum(parts) + self.optimizer + self.activations


def predict_peak(
    fn: Callable, args: tuple, state: Any, compiled: bool = True
) -> MemoryEstimate:
    """
    Predict the peak memory of a step without computing anything.

    The step is traced with its real shapes; its operations are fused and
    ordered as MLX does it, and its buffers are followed through the allocator.

    Args:
        fn (Callable): The step, not compiled; called with ``args``. It may
            change the arrays in ``state``, which are put back afterwards.
        args (tuple): A batch, as the step takes it; only shapes matter.
        state (list): All that the step reads and changes besides: models,
            the optimizer's state, the reference's. Weights may be lazy.
        compiled (bool): Whether the step will be compiled. Default: ``True``.

    Returns:
        MemoryEstimate: Of a step in the middle of the run.

    Raises:
        ValueError: If the step holds an operation that can't be traced.

    Example:
        >>> import mlx.nn as nn
        >>> model = nn.Linear(1000, 1000)
        >>> estimate = predict_peak(lambda x: model(x), (mx.zeros((8, 1000)),), [model])
        >>> estimate.weights, estimate.activations
        (4004000, 64000)
    """
    slots = list(array_places(state))
    tape = trace_step(fn, args, state)
    fixed = {i for i, o in zip(tape.inputs[: len(slots)], tape.outputs) if i == o}
    twins: dict[str, str] = {}
    first: dict[int, str] = {}
    sizes: Counter = Counter()
    for name, (tree, key, in_model) in zip(tape.inputs, slots):
        # An array that two places share is one, as long as neither is changed.
        if name in fixed and first.setdefault(id(tree[key]), name) != name:
            twins[name] = first[id(tree[key])]
        else:
            sizes[in_model, name in fixed] += tape.nbytes(name)
    kept = fixed.union(tape.inputs[len(slots) :]) - twins.keys()
    tape.inputs = [name for name in tape.inputs if name not in twins]
    tape.tie(twins)
    if compiled:
        fuse(tape)
    peak = Replay(tape, kept).run()
    return MemoryEstimate(
        weights=sizes[True, True],
        trained=sizes[True, False],
        reference=sizes[False, True],
        optimizer=sizes[False, False],
        activations=peak - sizes.total(),
    )


def device_memory() -> int | None:
    """
    The memory that a run may use on the default device.

    Returns:
        int: Bytes: what Metal recommends, a CUDA card's total, or what the
        system can still give to the CPU; no more than ``mx.set_memory_limit``
        allows. None if the system does not tell.

    Example:
        >>> device_memory() > 0
        True
    """
    # The limit can't be read without setting it.
    limit = mx.set_memory_limit(1 << 62)
    mx.set_memory_limit(limit)
    if mx.default_device() == mx.gpu:
        info = mx.device_info(mx.gpu)
        keys = ("max_recommended_working_set_size", "total_memory", "memory_size")
        total = next((int(info[key]) for key in keys if key in info), None)
    else:
        total = _system_memory()
    known = [x for x in (total, limit) if x]
    return min(known) if known else None


def cache_limit(threshold: int | None) -> int:
    """
    How much the allocator's cache may hold between steps.

    Emptying it after every step costs a GPU a third of a step.

    Args:
        threshold (int, optional): The user's wish in bytes. Default: an eighth of
            the device's memory, of a CUDA card three quarters.

    Returns:
        int: Bytes.

    Example:
        >>> cache_limit(0), cache_limit(None) > 0
        (0, True)
    """
    if threshold is not None:
        return threshold
    memory = device_memory() or 0
    if mx.default_device() == mx.gpu and mx.cuda.is_available():
        # Nothing else lives there, and its allocator takes back what it lacks.
        return memory * 3 // 4
    return memory // 8


def trim_cache(limit: int) -> None:
    """
    Empty the allocator's cache if it holds too much.

    Args:
        limit (int): Bytes that may stay, see ``cache_limit``.

    Example:
        >>> trim_cache(0)
        >>> mx.get_cache_memory()
        0
    """
    if mx.get_cache_memory() > limit:
        mx.clear_cache()


def _system_memory():
    """What is free on Linux and what MLX holds already; else all there is."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(x for x in lines if x.startswith("MemAvailable"))
        held = mx.get_active_memory() + mx.get_cache_memory()
        return int(free.split()[1]) * 1024 + held
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def smaller_settings(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Changes that lower a run's memory, the mildest of each kind first.

    Args:
        settings (dict): ``batch_size``, ``max_seq_length``, ``grad_checkpoint``
            and ``num_layers`` (-1: all), as far as they apply.

    Returns:
        list: Changed settings, one a dict; the last has all the strongest ones.

    Example:
        >>> smaller_settings({"batch_size": 4, "grad_checkpoint": False})
        [{'grad_checkpoint': True}, {'batch_size': 2}, {'batch_size': 1}, \
{'grad_checkpoint': True, 'batch_size': 1}]
    """
    changes: list[dict] = []
    if settings.get("grad_checkpoint") is False:
        changes.append({"grad_checkpoint": True})
    for key, least in (("batch_size", 1), ("max_seq_length", 256), ("num_layers", 4)):
        value = settings.get(key) or 0
        while value // 2 >= least:
            value //= 2
            changes.append({key: value})
    strongest = {k: v for change in changes for k, v in change.items()}
    return changes + [strongest] * (len(strongest) > 1)


def check_fits(
    estimate: MemoryEstimate,
    limit: int | None,
    changes: Iterable[dict[str, Any]] = (),
    predict: Callable[[dict[str, Any]], MemoryEstimate] | None = None,
    weight_bits: int = 4,
) -> None:
    """
    Refuse a run that needs more memory than there is, and say what would fit.

    Args:
        estimate (MemoryEstimate): The run's.
        limit (int, optional): Bytes there are, see ``device_memory``.
        changes (Iterable): Settings to try, see ``smaller_settings``.
        predict (Callable, optional): The estimate with some settings changed.
        weight_bits (int): Bits of a weight, to tell what a 4-bit model would
            save. Default: ``4``.

    Raises:
        ValueError: If the estimate is above the limit.

    Example:
        >>> estimate = MemoryEstimate(int(9e9), 0, 0, 0, int(1e9))
        >>> check_fits(estimate, int(16e9))
        >>> check_fits(estimate, int(8e9), weight_bits=16)
        Traceback (most recent call last):
        ...
        ValueError: The run needs about 10.0 GB (weights 9.0, activations 1.0), but \
the device has 8.0 GB. It would fit with a 4-bit model.
    """
    if limit is None or estimate.total <= limit:
        return
    fitting: dict[tuple, str] = {}
    for change in changes:
        combined = len(change) > 1 and bool(fitting)
        if predict and tuple(change) not in fitting and not combined:
            if predict(change).total <= limit:
                fitting[tuple(change)] = " with ".join(
                    f"{key}: {str(value).lower()}" for key, value in change.items()
                )
    # 4 bits, and a 16-bit scale and bias for every 64 weights.
    saved = estimate.weights * (1 - 4.5 / weight_bits)
    if estimate.total - saved <= limit:
        fitting["model",] = "a 4-bit model"
    parts = ", ".join(
        f"{name} {size / 1e9:.1f}"
        for name, size in vars(estimate).items()
        if size >= 5e7
    )
    advice = "No smaller setting that was tried would fit: take a smaller model."
    if fitting:
        advice = f"It would fit with {' or '.join(fitting.values())}."
    raise ValueError(
        f"The run needs about {estimate.total / 1e9:.1f} GB ({parts}), but the device "
        f"has {limit / 1e9:.1f} GB. {advice}"
    )
