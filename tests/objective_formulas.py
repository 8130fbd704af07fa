# Copyright © 2026 MLX Contributors

"""The formula of every preference loss in float64, and the cases to compare it on."""

import mlx.core as mx
import numpy as np

from mlx_lm.preference.objective.losses import LOSSES
from mlx_lm.preference.objective.objective import Objective

sigmoid = lambda x: 1 / (1 + np.exp(-np.asarray(x, np.float64)))
logsig = lambda x: -np.logaddexp(0, -np.asarray(x, np.float64))
smoothed = lambda x, e: -(1 - e) * logsig(x) - e * logsig(-x)


class Case:
    """Four log-probs a pair, lengths and settings, in float64."""

    FIELDS = ("pc", "pr", "rc", "rr", "lc", "lr", "m", "labels", "w")

    def __init__(self, seed=0, pairs=5, scale=3.0):
        rng = np.random.default_rng(seed)
        self.pc, self.pr, self.rc, self.rr = rng.normal(-20, scale, (4, pairs))
        self.lc, self.lr = rng.integers(1, 9, (2, pairs)).astype(np.float64)
        self.m = rng.normal(size=pairs)
        self.labels, self.w = np.arange(pairs) % 2.0, np.ones(pairs)
        self.e, self.beta = 0.2, 0.3

    @property
    def c(self):
        return self.pc - self.rc

    @property
    def r(self):
        return self.pr - self.rr

    @property
    def h(self):
        return self.c - self.r

    def batch(self, margins=False, **more):
        n = len(self.pc)
        ends = np.concatenate([self.lc, self.lr]).astype(np.int32) + 3
        lengths = np.stack([np.full(2 * n, 3), ends], axis=-1)
        batch = {"lengths": mx.array(lengths), "weights": mx.array(self.w)} | more
        if margins:
            batch["margins"] = mx.array(self.m)
        return batch

    def logps(self):
        both = ([self.pc, self.pr], [self.rc, self.rr])
        return [mx.array(np.concatenate(x).astype(np.float32)) for x in both]


class Seen(Case):
    """A case whose log-ratios a divergence sees as other scores."""

    def __init__(self, k, f):
        vars(self).update(vars(k))
        self.f = f

    @property
    def c(self):
        return self.f(super().c)

    @property
    def r(self):
        return self.f(super().r)


def token_mean(k):
    return -(k.w * k.pc).sum() / (k.w * k.lc).sum()


def log_odds(x):
    return x - np.log1p(-np.exp(x))


def rankings(k, group=2):
    """Rankings of four answers in two pairs each, places best first."""
    scores = k.beta * np.stack([k.c, k.r], axis=-1).reshape(-1, 2 * group)
    losses = [
        sum(np.logaddexp.reduce(row[i:]) - row[i] for i in range(len(row)))
        for row in scores
    ]
    return np.repeat(losses, group)


def kto(k):
    z = max(0.0, k.r.mean())
    good, bad = sigmoid(-k.beta * (k.c - z)), 1.5 * sigmoid(k.beta * (k.c - z))
    return np.where(k.labels > 0, good, bad)


def alpha_reward(x, alpha=0.3):
    return (1 - np.exp(x) ** -alpha) / alpha


def discopop(k):
    s = k.beta * k.h - k.m
    m = sigmoid(s / 0.05)
    return -(1 - m) * logsig(s) + m * np.exp(-s)


# Name: (settings beside beta, formula, whether pairs bring margins).
FORMULAS = {
    "sigmoid": ({}, lambda k: smoothed(k.beta * k.h - k.m, k.e), True),
    "hinge": ({}, lambda k: np.maximum(0, 1 - (k.beta * k.h - k.m)), True),
    "ipo": (
        {},
        lambda k: (k.c / k.lc - k.r / k.lr - (0.5 + k.m) / k.beta) ** 2,
        True,
    ),
    "robust": (
        {},
        lambda k: (
            -(1 - k.e) * logsig(k.beta * k.h - k.m)
            + k.e * logsig(-(k.beta * k.h - k.m))
        )
        / (1 - 2 * k.e),
        True,
    ),
    "exo_pair": (
        {},
        lambda k: sum(
            q * (np.log(q) - np.log(p))
            for q, p in (
                (sigmoid(k.beta * k.h - k.m), 1 - k.e),
                (sigmoid(-(k.beta * k.h - k.m)), k.e),
            )
        ),
        True,
    ),
    "nca_pair": (
        {},
        lambda k: -logsig(k.beta * k.c)
        - logsig(-k.beta * k.c) / 2
        - logsig(-k.beta * k.r) / 2,
        False,
    ),
    "bco_pair": ({}, lambda k: -logsig(k.beta * k.c) - logsig(-k.beta * k.r), False),
    "sppo_hard": (
        {},
        lambda k: (k.c - 0.5 / k.beta) ** 2 + (k.r + 0.5 / k.beta) ** 2,
        False,
    ),
    "aot": (
        {},
        lambda k: np.full(
            len(k.c),
            smoothed(
                k.beta * (np.sort(k.pc - k.pr) - np.sort(k.rc - k.rr)), k.e
            ).mean(),
        ),
        False,
    ),
    "aot_unpaired": (
        {},
        lambda k: np.full(
            len(k.c), smoothed(k.beta * (np.sort(k.c) - np.sort(k.r)), k.e).mean()
        ),
        False,
    ),
    "apo_zero": (
        {},
        lambda k: 1 - sigmoid(k.beta * k.c) + sigmoid(k.beta * k.r),
        False,
    ),
    "apo_down": (
        {},
        lambda k: sigmoid(k.beta * k.c) + 1 - sigmoid(k.beta * k.h),
        False,
    ),
    "discopop": ({}, discopop, True),
    "sigmoid_norm": (
        {},
        lambda k: smoothed(k.beta * (k.c / k.lc - k.r / k.lr) - k.m, k.e),
        True,
    ),
    "dpop": (
        {"dpop_lambda": 5.0},
        lambda k: -logsig(k.beta * (k.h - 5 * np.maximum(0, -k.c)) - k.m),
        True,
    ),
    "sft": ({}, lambda k: np.full(len(k.c), token_mean(k)), False),
    "simpo": (
        {"gamma": 0.7},
        lambda k: smoothed(k.beta * (k.pc / k.lc - k.pr / k.lr) - k.m - 0.7, k.e),
        True,
    ),
    "alphapo": (
        {"gamma": 0.7, "alphapo_alpha": 0.3},
        lambda k: smoothed(
            k.beta * (alpha_reward(k.pc / k.lc) - alpha_reward(k.pr / k.lr))
            - k.m
            - 0.7,
            k.e,
        ),
        True,
    ),
    "orpo": (
        {},
        lambda k: token_mean(k)
        - k.beta * logsig(log_odds(k.pc / k.lc) - log_odds(k.pr / k.lr)),
        False,
    ),
    "cpo": (
        {"cpo_alpha": 0.5},
        lambda k: smoothed(k.beta * (k.pc - k.pr) - k.m, k.e) + 0.5 * token_mean(k),
        True,
    ),
    "kto": ({"undesirable_weight": 1.5}, kto, False),
    "apo_zero_unpaired": (
        {"undesirable_weight": 1.5},
        lambda k: np.where(
            k.labels > 0, 1 - sigmoid(k.beta * k.c), 1.5 * sigmoid(k.beta * k.c)
        ),
        False,
    ),
    "plackett_luce": ({}, rankings, False),
}
# Losses of a policy that is its own reference, by hand, beta 0.1.
AT_START = {
    "sigmoid": np.log(2),
    "hinge": 1.0,
    "ipo": 25.0,
    "robust": np.log(2),
    "nca_pair": 2 * np.log(2),
    "bco_pair": 2 * np.log(2),
    "sppo_hard": 50.0,
    "aot": np.log(2),
    "aot_unpaired": np.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": (np.log(2) + 1) / 2,
    "sigmoid_norm": np.log(2),
    "dpop": np.log(2),
    "kto": 0.5,
    "apo_zero_unpaired": 0.5,
    "plackett_luce": np.log(24),
    # KL((1/2, 1/2) || (0.8, 0.2))
    "exo_pair": -0.5 * np.log(4 * 0.8 * 0.2),
}


def make(name, k, **more):
    settings, _, _ = FORMULAS[name]
    smooth = LOSSES[name].smoothing != "no"
    return Objective(
        k.beta, name, label_smoothing=k.e if smooth else 0.0, **settings, **more
    )


def batch_for(name, k):
    batch = k.batch(FORMULAS[name][2])
    if LOSSES[name].data == "labels":
        batch["labels"] = mx.array(k.labels)
    if LOSSES[name].data == "rankings":
        n = len(k.pc)
        places = [[2 * (i % 2) for i in range(n)], [2 * (i % 2) + 1 for i in range(n)]]
        batch["places"] = mx.array(places, dtype=mx.float32).reshape(-1)
    return batch


def case_for(name, seed=0):
    return Case(seed, 4 if name == "plackett_luce" else 5)
