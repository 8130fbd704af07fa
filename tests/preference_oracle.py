# Copyright © 2026 MLX Contributors

"""What the preference kernels must compute, in float64, and hard cases for it."""

from typing import NamedTuple

import numpy as np

# Relative to max(1, |value|), on top of what the stored dtype's rounding allows.
LOGP_TOL = 1e-5
KL_TOL = 1e-6, 1e-5  # nats, and relative
GRADIENT_TOL = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11}
SIZES = (1, 31, 32, 33, 1000, 49152, 50257, 151936)


class Case(NamedTuple):
    """Logits of both models, targets, mask and cotangents of one call."""

    name: str
    x: np.ndarray
    y: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    cotangents: np.ndarray


class Expected(NamedTuple):
    """Scores ``(K, N)``, the size of what they subtract, and the gradient."""

    scores: np.ndarray
    reach: np.ndarray
    gradient: np.ndarray


def _log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def oracle(x, y, targets, mask, cotangents, dual=True):
    """
    Scores and gradient in float64, masked rows 0, unknown targets NaN.

    ``reach`` is |x_target - max|, which bounds what float32 can resolve.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    N, V = x.shape
    rows = np.arange(N)
    known = (targets >= 0) & (targets < V)
    safe = np.where(known, targets, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p, log_q = _log_softmax(x), _log_softmax(y)
        p = np.exp(log_p)
        gap = np.where(p > 0, log_p - log_q, 0.0)
        kl = (p * gap).sum(axis=-1)
        logps = [np.where(known, a[rows, safe], np.nan) for a in (log_p, log_q)]
        reach = np.stack([a.max(-1) - a[rows, safe] for a in (x, y)] + [kl])
    g = np.where(known, cotangents[0], np.nan)[:, None]
    gradient = g * ((np.arange(V) == targets[:, None]) - p)
    if dual:
        gradient = gradient + cotangents[2][:, None] * p * (gap - kl[:, None])
    scores = np.where(mask, np.stack([*logps, kl]), 0.0)
    gradient = np.where(mask[:, None], gradient, 0.0)
    K = 3 if dual else 1
    return Expected(scores[:K], reach[:K], gradient)


def check_scores(scores, expected):
    """Return what is off; the oracle saw the same rounded logits."""
    found = []
    with np.errstate(invalid="ignore"):
        error = np.abs(scores - expected.scores)
        same = (scores == expected.scores) | (
            np.isnan(scores) & np.isnan(expected.scores)
        )
        bound = LOGP_TOL * np.maximum(1, np.abs(expected.reach))
        if len(scores) == 3:
            bound[2] = KL_TOL[0] + KL_TOL[1] * np.abs(expected.scores[2])
    for name, bad, e in zip(
        ("logp", "reference", "kl"), ~(same | (error <= bound)), error
    ):
        if bad.any():
            found.append(
                f"{name} off by {e[bad].max():.2g} in rows {np.nonzero(bad)[0]}"
            )
    return found


def check_gradient(gradient, expected, mask, dtype):
    """Return findings; masked rows must be exactly 0."""
    found = []
    wanted = expected.gradient
    with np.errstate(invalid="ignore"):
        error = np.abs(gradient - wanted)
        bound = GRADIENT_TOL[dtype] * np.abs(wanted) + 1e-6
        bad = ~((error <= bound) | (np.isnan(gradient) & np.isnan(wanted)))
    if bad.any():
        found.append(f"gradient off by {error[bad].max():.2g} at {np.argwhere(bad)[0]}")
    if gradient[~mask].any():
        found.append("gradient of a masked row is not 0")
    return found


def make_case(rng, name, N, V, scale=3.0, distance=0.3, offset=0.0, keep=0.7):
    """Draw a case; at least one row counts unless ``keep`` is 0."""
    x = rng.normal(size=(N, V)).astype(np.float32) * np.float32(scale)
    y = x + rng.normal(size=(N, V)).astype(np.float32) * np.float32(distance)
    y = (y + np.float32(offset)).astype(np.float32)
    mask = rng.random(N) < keep
    mask[rng.integers(N)] |= keep > 0
    targets = rng.integers(0, V, N).astype(np.int32)
    cotangents = rng.normal(size=(3, N)).astype(np.float32)
    return Case(name, x, y, targets, mask, cotangents)


def _cases():
    rng = np.random.default_rng(7)
    cases = [
        make_case(rng, f"{N} x {V}", N, V)
        for N, V in zip((7, 6, 5, 4, 3, 2, 2, 1), SIZES)
    ]
    cases.append(make_case(rng, "all masked", 3, 1000, keep=0.0))
    cases.append(make_case(rng, "logits of 1e4", 4, 1000, scale=1e4, distance=1e-2))
    cases.append(make_case(rng, "far apart", 4, 1000, distance=20.0))
    cases.append(make_case(rng, "shifted by 5000", 4, 1000, offset=5000.0))
    same = make_case(rng, "equal models", 4, 1000, distance=0.0)
    cases.append(same)
    for where in ("both", "policy", "reference tail"):
        case = make_case(rng, f"-inf in {where}", 4, 1000)
        unlikely = case.x < np.quantile(case.x, 0.3)
        unlikely[np.arange(4), case.targets] = False
        if where != "reference tail":
            case.x[unlikely] = -np.inf
        if where == "both":
            case.y[unlikely] = -np.inf
        if where == "reference tail":  # where the policy has no mass either
            case.x[unlikely] = -3e4
            case.y[unlikely] = -np.inf
        cases.append(case)
    case = make_case(rng, "targets outside", 5, 1000, keep=1.0)
    case.targets[:] = -1, 1000, 2**31 - 1, -(2**31), 999
    cases.append(case)
    case = make_case(rng, "no KL cotangent", 4, 1000)
    case.cotangents[2] = 0
    cases.append(case)
    return cases


CASES = _cases()
