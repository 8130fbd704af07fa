# Copyright © 2026 MLX Contributors

"""The losses beside DPO's own: with other shapes, of whole batches, without a reference.

Letters mean what they mean in ``losses``.
"""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .losses import SMOOTHED, loss, scaled, smoothed
from .pairs import kl_baseline

FAR = 1e30
# Beyond it, no log-prob a token makes alphapo's reward larger.
MOST_SHAPED = 60.0
_SORTED: dict[str, Any] = {"couples": True, "least_batch": 2, "smoothing": "may"}


def _mean_for_all(values, counts, pairs):
    """A number of the whole batch, given to each of its pairs."""
    total = counts.sum()
    mean = (values * counts).sum() / mx.where(total > 0, total, 1)
    return mx.broadcast_to(mean, pairs.chosen.shape)


@loss(
    "robust",
    "(-(1 - e) log sigmoid(s) + e log sigmoid(-s)) / (1 - 2e)",
    "2403.00409",
    **SMOOTHED,
)
def _robust(pairs, o):
    s, e = scaled(pairs, o), o.label_smoothing
    losses = -(1 - e) * nn.log_sigmoid(s) + e * nn.log_sigmoid(-s)
    return losses / (1 - 2 * e)


@loss(
    "exo_pair",
    "KL(sigmoid(s), sigmoid(-s) || 1 - e, e)",
    "2402.00856",
    smoothing="must",
    by_difference=True,
)
def _exo_pair(pairs, o):
    """Eq. 16 for two answers."""
    s, e = scaled(pairs, o), o.label_smoothing
    chosen = mx.sigmoid(s) * (nn.log_sigmoid(s) - math.log1p(-e))
    return chosen + mx.sigmoid(-s) * (nn.log_sigmoid(-s) - math.log(e))


@loss(
    "nca_pair",
    "-log sigmoid(beta c) - log sigmoid(-beta c) / 2 - log sigmoid(-beta r) / 2",
    "2402.05369",
)
def _nca_pair(pairs, o):
    chosen, rejected = (o.beta * x for x in pairs.logratios)
    both = nn.log_sigmoid(-chosen) + nn.log_sigmoid(-rejected)
    return -nn.log_sigmoid(chosen) - 0.5 * both


@loss("bco_pair", "-log sigmoid(beta c) - log sigmoid(-beta r)", "2404.04656")
def _bco_pair(pairs, o):
    """Without the running mean of rewards that the paper subtracts."""
    chosen, rejected = (o.beta * x for x in pairs.logratios)
    return -nn.log_sigmoid(chosen) - nn.log_sigmoid(-rejected)


@loss("sppo_hard", "(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2", "2405.00675")
def _sppo_hard(pairs, o):
    """Eq. 4.7 with probabilities of 1 and 0."""
    chosen, rejected = pairs.logratios
    return (chosen - 0.5 / o.beta) ** 2 + (rejected + 0.5 / o.beta) ** 2


def _sorted(x, pairs):
    # Filling goes to the end; a sort by indices has a plain gradient.
    x = mx.where(pairs.weights > 0, x, FAR)
    return x[mx.argsort(mx.stop_gradient(x))]


def _transported(ahead, behind, pairs, o):
    """The smoothed loss of two distributions, each sorted by itself."""
    real = mx.arange(ahead.size) < (pairs.weights > 0).sum()
    gap = mx.where(real, _sorted(ahead, pairs) - _sorted(behind, pairs), 0)
    losses = smoothed(o.beta * gap, o.label_smoothing)
    return _mean_for_all(losses, real.astype(mx.float32), pairs)


@loss(
    "aot",
    "sigmoid's loss of sorted(policy's h) - sorted(reference's h)",
    "2406.05882",
    **_SORTED,
)
def _aot(pairs, o):
    policy = pairs.chosen - pairs.rejected
    reference = pairs.reference_chosen - pairs.reference_rejected
    return _transported(policy, reference, pairs, o)


@loss(
    "aot_unpaired", "sigmoid's loss of sorted(c) - sorted(r)", "2406.05882", **_SORTED
)
def _aot_unpaired(pairs, o):
    return _transported(*pairs.logratios, pairs, o)


@loss("apo_zero", "1 - sigmoid(beta c) + sigmoid(beta r)", "2408.06266")
def _apo_zero(pairs, o):
    """Eq. 7: for chosen answers that are better than the model's."""
    chosen, rejected = (o.beta * x for x in pairs.logratios)
    return mx.sigmoid(-chosen) + mx.sigmoid(rejected)


@loss("apo_down", "sigmoid(beta c) + 1 - sigmoid(beta h)", "2408.06266")
def _apo_down(pairs, o):
    """Eq. 8: for a model that is better than the chosen answers."""
    chosen, rejected = (o.beta * x for x in pairs.logratios)
    return mx.sigmoid(chosen) + mx.sigmoid(rejected - chosen)


@loss(
    "discopop",
    "-(1 - m) log sigmoid(s) + m exp(-s), m = sigmoid(s / discopop_tau)",
    "2406.08414",
    by_difference=True,
    options=("discopop_tau",),
)
def _discopop(pairs, o):
    """Eq. 5."""
    s = scaled(pairs, o)
    share = mx.sigmoid(s / o.discopop_tau)
    # Far below zero the share is 0, and the exponential must not be infinite.
    exponential = mx.exp(-mx.maximum(s, -80))
    return -(1 - share) * nn.log_sigmoid(s) + share * exponential


@loss(
    "sigmoid_norm",
    "-(1 - e) log sigmoid(s) - e log sigmoid(-s), s of c / |chosen| - r / |rejected|",
    "2411.15124",
    **SMOOTHED,
    per_token=True,
)
def _sigmoid_norm(pairs, o):
    """DPO on means over tokens, as Tulu 3 uses it."""
    s = o.beta * pairs.difference_per_token - pairs.margins
    return smoothed(s, o.label_smoothing)


@loss(
    "dpop",
    "-log sigmoid(beta (h - dpop_lambda max(0, -c)) - margin)",
    "2402.13228",
    margins=True,
    options=("dpop_lambda",),
)
def _dpop(pairs, o):
    """Eq. 3: the penalty is inside the sigmoid."""
    penalty = mx.maximum(-pairs.logratios[0], 0)
    s = scaled(pairs, o) - o.beta * o.dpop_lambda * penalty
    return -nn.log_sigmoid(s)


@loss(
    "sft",
    "-log p of the chosen answers, the mean over all tokens of the batch",
    "2404.19733",
    reference=False,
    per_token=True,
    couples=True,
)
def _sft(pairs, o):
    counts = pairs.weights * pairs.chosen_lengths
    return _mean_for_all(-pairs.chosen / pairs.chosen_lengths, counts, pairs)


@loss(
    "simpo",
    "sigmoid's loss of beta (log p / |chosen| - log p / |rejected|) - gamma",
    "2405.14734",
    reference=False,
    smoothing="may",
    margins=True,
    per_token=True,
    mean_rewards=True,
    options=("gamma",),
)
def _simpo(pairs, o):
    """Eq. 6."""
    s = o.beta * pairs.difference_per_token - pairs.margins - o.gamma
    return smoothed(s, o.label_smoothing)


def _alpha_reward(x, o):
    """``(1 - p^-alpha) / alpha`` of ``p = exp(x)``, which is ``x`` where alpha is 0."""
    a = o.alphapo_alpha
    if abs(a) < 1e-6:
        return x
    return -mx.expm1(mx.minimum(-a * x, MOST_SHAPED)) / a


@loss(
    "alphapo",
    "sigmoid's loss of beta (u(chosen) - u(rejected)) - gamma, u(y) = (1 - p(y)^(-a / "
    "|y|)) / a",
    "2501.03884",
    reference=False,
    smoothing="may",
    margins=True,
    per_token=True,
    mean_rewards=True,
    reward=_alpha_reward,
    options=("alphapo_alpha", "gamma"),
)
def _alphapo(pairs, o):
    """SimPO with its reward in another shape, ``a`` is ``alphapo_alpha``."""
    chosen = _alpha_reward(pairs.chosen / pairs.chosen_lengths, o)
    rejected = _alpha_reward(pairs.rejected / pairs.rejected_lengths, o)
    s = o.beta * (chosen - rejected) - pairs.margins - o.gamma
    return smoothed(s, o.label_smoothing)


@loss(
    "orpo",
    "sft - beta log sigmoid(log of the odds ratio of the mean token probabilities)",
    "2403.07691",
    reference=False,
    per_token=True,
    mean_rewards=True,
    couples=True,
)
def _orpo(pairs, o):
    """Eq. 6 and 7, with beta as the paper's lambda."""
    chosen = pairs.chosen / pairs.chosen_lengths
    rejected = pairs.rejected / pairs.rejected_lengths
    # log odds of p: log p - log(1 - p). A certain token has no finite odds.
    log_odds = lambda x: x - mx.log(-mx.expm1(mx.minimum(x, -1e-6)))
    ratio = log_odds(chosen) - log_odds(rejected)
    return _sft(pairs, o) - o.beta * nn.log_sigmoid(ratio)


@loss(
    "cpo",
    "sigmoid's loss of beta (log p(chosen) - log p(rejected)) + cpo_alpha sft",
    "2401.08417",
    reference=False,
    smoothing="may",
    margins=True,
    couples=True,
    per_token=True,
    options=("cpo_alpha",),
)
def _cpo(pairs, o):
    """Contrastive Preference Optimization, Eq. 5, its likelihood a mean over tokens."""
    losses = smoothed(scaled(pairs, o), o.label_smoothing)
    return losses + o.cpo_alpha * _sft(pairs, o)


def _by_label(ahead, pairs, o):
    """An answer's loss by its label, from how far it is ahead of what it is held to."""
    good = o.desirable_weight * mx.sigmoid(-ahead)
    return mx.where(pairs.labels > 0, good, o.undesirable_weight * mx.sigmoid(ahead))


@loss(
    "kto",
    "1 - sigmoid(beta (c - z)) if desirable, else 1 - sigmoid(beta (z - c)), weighted",
    "2402.01306",
    couples=True,
    least_batch=2,
    data="labels",
    options=("desirable_weight", "undesirable_weight"),
)
def _kto(pairs, o):
    """Eq. 7 and 8."""
    return _by_label(o.beta * (pairs.logratios[0] - kl_baseline(pairs)), pairs, o)


@loss(
    "apo_zero_unpaired",
    "1 - sigmoid(beta c) if desirable, else sigmoid(beta c), weighted",
    "2408.06266",
    data="labels",
    options=("desirable_weight", "undesirable_weight"),
)
def _apo_zero_unpaired(pairs, o):
    """Eq. 7, each of its two terms of an answer alone: KTO without a baseline."""
    return _by_label(o.beta * pairs.logratios[0], pairs, o)


@loss(
    "plackett_luce",
    "-sum over places k of log softmax(beta c of the answers from k on) at k",
    "2305.18290",
    data="rankings",
)
def _plackett_luce(pairs, o):
    """Appendix A.3, Eq. 20, of a ranking whose pairs follow each other."""
    scores = o.beta * mx.concatenate(pairs.logratios)
    places = pairs.places
    # The best answer opens a ranking.
    first = mx.split(places, 2)[0] == 0
    ranking = mx.cumsum(first.astype(mx.int32))
    row = mx.concatenate([ranking, ranking])
    counted = places >= 0
    rest = mx.logical_and(places[:, None] <= places[None], counted[None])
    rest = mx.logical_and(rest, row[:, None] == row[None])
    others = mx.logsumexp(mx.where(rest, scores[None], -FAR), axis=-1)
    losses = mx.where(counted, others - scores, 0)
    same = (ranking[:, None] == row[None]).astype(mx.float32)
    return same @ losses
