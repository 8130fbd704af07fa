# Copyright © 2026 MLX Contributors

"""The preference losses: one small function each, and what each of them needs.

A loss gets ``PairLogps`` and the settings of an ``Objective`` and returns one
number for each pair, in nats. To add one, write a function under ``@loss`` here or in
a module that ``PLUG_INS`` names; flags, checks and the reference of settings follow.

In formulas: ``c`` and ``r`` are the log-ratios of policy to reference of the
chosen and the rejected answer, ``h = c - r``, ``s = beta * h - margin``, ``e`` is
``label_smoothing``, and ``|y|`` an answer's length in tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..plug_ins import load
from .pairs import PairLogps

SMOOTHED: dict[str, Any] = {"by_difference": True, "smoothing": "may"}


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss and what it needs."""

    function: Callable[[PairLogps, Any], mx.array]
    formula: str
    paper: str  # an arXiv number
    reference: bool = True  # reads the reference
    smoothing: str = "no"  # "no", "may" or "must" have label smoothing
    # It depends on h alone: margins, divergences and no reference make sense.
    by_difference: bool = False
    margins: bool = False  # margins make sense without that
    per_token: bool = False  # divides by lengths or counts tokens
    mean_rewards: bool = False  # rewards are means over tokens
    # What a mean log-prob counts as reward, but for beta.
    reward: Callable[[mx.array, Any], mx.array] | None = None
    couples: bool = False  # a pair's loss depends on its batch, of all ranks then
    least_batch: int = 1  # the fewest pairs a batch that make sense
    data: str = "pairs"  # or "labels", "rankings"
    options: tuple[str, ...] = ()  # the settings that are its own


LOSSES: dict[str, PreferenceLoss] = {}


def loss(name: str, formula: str, paper: str, **needs: Any) -> Callable:
    """Register a function as a loss, with what it needs."""

    def register(function):
        LOSSES[name] = PreferenceLoss(function, formula, paper, **needs)
        return function

    return register


def smoothed(scores: mx.array, e: float) -> mx.array:
    """``-log sigmoid``, with a label that is wrong with probability ``e``."""
    losses = -nn.log_sigmoid(scores)
    if e > 0:
        losses = (1 - e) * losses - e * nn.log_sigmoid(-scores)
    return losses


def scaled(pairs: PairLogps, o: Any) -> mx.array:
    """``s``, in nats."""
    return o.beta * pairs.difference - pairs.margins


@loss(
    "sigmoid", "-(1 - e) log sigmoid(s) - e log sigmoid(-s)", "2305.18290", **SMOOTHED
)
def _sigmoid(pairs, o):
    """Eq. 7; with label smoothing conservative DPO."""
    return smoothed(scaled(pairs, o), o.label_smoothing)


@loss("hinge", "max(0, 1 - s)", "2309.06657", by_difference=True)
def _hinge(pairs, o):
    return mx.maximum(1 - scaled(pairs, o), 0)


@loss(
    "ipo",
    "(c / |chosen| - r / |rejected| - 1 / (2 beta))^2",
    "2310.12036",
    by_difference=True,
    per_token=True,
)
def _ipo(pairs, o):
    """Eq. 17, of means over tokens as its authors use it."""
    target = (1 + 2 * pairs.margins) / (2 * o.beta)
    return (pairs.difference_per_token - target) ** 2


# Each fills the table.
PLUG_INS = ("more_losses",)
load(__package__, PLUG_INS)
