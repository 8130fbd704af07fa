# Copyright © 2026 MLX Contributors

"""The memory that a training step will need, before anything is allocated."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .replay import Replay
from .tape import fuse
from .trace import array_places, trace_step


@dataclass(frozen=True)
class MemoryEstimate:
    """The predicted peak of a step, and what it is made of, in bytes."""

    weights: int
    trained: int
    reference: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(vars(self).values())


def predict_peak(
    fn: Callable,
    args: tuple,
    state: Any,
    compiled: bool = True,
    gradient: bool = True,
) -> MemoryEstimate:
    """Predict the peak memory of a step without computing anything."""
    slots = list(array_places(state))
    tape = trace_step(fn, args, state, gradient)
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
    activations = Replay(tape, kept).run() - sizes.total()
    return MemoryEstimate(
        weights=sizes[True, True],
        trained=sizes[True, False],
        reference=sizes[False, True],
        optimizer=sizes[False, False],
        activations=activations,
    )


def smaller_settings(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Changes that lower a run's memory, the mildest of each kind first."""
    changes: list[dict] = []
    if settings.get("grad_checkpoint") is False:
        changes.append({"grad_checkpoint": True})
    for key, least in (("batch_size", 1), ("max_seq_length", 256)):
        value = settings.get(key, 0)
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
    others: Iterable[tuple[str, Callable[[], float]]] = (),
) -> None:
    """Refuse a run that needs more memory than there is, and say what would fit."""
    # Others are no settings: their names, and what the run would need with them.
    if limit is None or estimate.total <= limit:
        return
    fitting: dict[tuple, str] = {}
    for change in changes:
        combined = len(change) > 1 and bool(fitting)
        if predict and tuple(change) not in fitting and not combined:
            if predict(change).total <= limit:
                settings = [f"{k}: {str(v).lower()}" for k, v in change.items()]
                fitting[tuple(change)] = " with ".join(settings)
    fitting |= {(name,): name for name, total in others if total() <= limit}
    large = {name: size for name, size in vars(estimate).items() if size >= 5e7}
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in large.items())
    advice = "No smaller setting that was tried would fit: take a smaller model."
    if fitting:
        advice = f"It would fit with {' or '.join(fitting.values())}."
    raise InputError(
        f"The run needs about {estimate.total / 1e9:.1f} GB ({parts}), but the device "
        f"has {limit / 1e9:.1f} GB. {advice}"
    )
