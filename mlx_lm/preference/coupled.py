# Copyright © 2026 MLX Contributors

"""Losses of pairs that depend on each other, also on those of other ranks."""

from dataclasses import replace

import mlx.core as mx

from .objective.objective import Objective, pair_losses
from .objective.pairs import PairLogps, kl_baseline
from .ranks import ends
from .step import COUPLED


def coupled_loss(
    pairs: PairLogps, objective: Objective, values: dict[str, mx.array]
) -> tuple[mx.array, mx.array]:
    """The loss of pairs that depend on those of all ranks."""
    arrays = {k: v for k, v in vars(pairs).items() if isinstance(v, mx.array)}
    gathered, own = gather_pairs(arrays)
    everyone = replace(pairs, **gathered)
    losses = pair_losses(everyone, objective)
    if objective.data == "labels":
        values["baseline"] = objective.beta * kl_baseline(everyone)
    mine = (losses[own] * pairs.weights).sum()
    # This rank's pairs also change the losses of others: a gradient, no value.
    others = (losses * everyone.weights).sum() - mine
    return mine + others - mx.stop_gradient(others), losses[own]


def _with_own_rows(own, gathered, mine):
    """All ranks' rows, of which this rank's carry a gradient."""

    @mx.custom_function
    def put(own, gathered):
        return mx.concatenate([gathered[: mine.start], own, gathered[mine.stop :]])

    @put.vjp
    def put_vjp(primals, cotangent, output):
        # The gradients' message waits for this one, whatever they depend on.
        (gradient,) = mx.depends([cotangent[mine]], [primals[1]])
        return gradient, mx.zeros_like(primals[1])

    return put(own, mx.stop_gradient(gathered))


def gather_pairs(arrays: dict[str, mx.array]) -> tuple[dict[str, mx.array], slice]:
    """Put all ranks' pairs behind each other, for a loss that looks at all of them."""
    world = mx.distributed.init()
    pairs = next(iter(arrays.values())).shape[0]
    start = world.rank() * pairs
    own = slice(start, start + pairs)
    if world.size() == 1:
        return arrays, own
    names = sorted(arrays)
    rows = [arrays[k].astype(mx.float32).reshape(pairs, -1) for k in names]
    message = mx.concatenate(rows, axis=1)
    gathered = mx.distributed.all_gather(mx.stop_gradient(message), group=world)
    whole = _with_own_rows(message, gathered, own)
    columns = mx.split(whole, ends([row.shape[1] for row in rows]), axis=1)
    shaped = [x.reshape(-1, *arrays[k].shape[1:]) for k, x in zip(names, columns)]
    return dict(zip(names, shaped)), own


COUPLED.append(coupled_loss)
