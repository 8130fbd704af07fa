# Copyright © 2026 MLX Contributors

"""Whether a model may share prompts or pack rows, found out on the model itself.

A table of families would be wrong for the next one. So before a run a few tokens
go through the model in every way that training could take, and a way whose
log-probs differ from the plain forward's is not taken.
"""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...models.cache import make_prompt_cache
from ..batch.collate import collate_pairs
from ..batch.shape import BatchShape
from ..errors import InputError
from .answers import sequence_logps, sum_by_row
from .frozen import running
from .parts import RUN_WHOLE, find_trunk
from .tokens import token_logps


class Sharing(NamedTuple):
    """How a model shares prompts, and what makes its numbers uncertain."""

    grade: str
    notice: str
    warning: str = ""


# Two rows of two.
_PACKED = BatchShape(0, 37, packed=2)
_SHAPES = {"ragged": BatchShape(20, 6, ragged=True), "equal": BatchShape(4, 21)}
# Few tokens: a check must not be felt, and their padding shows all the same.
_LENGTHS = ((21, 5, 3), (6, 4, 6))
_WIDER = 36


def _probe_pairs(vocabulary):
    rng = np.random.default_rng(0)
    pairs = []
    for prompt, chosen, rejected in _LENGTHS:
        # Answers that repeat the prompt depend on all of it.
        tokens = rng.integers(0, vocabulary, prompt).tolist()
        answers = [(tokens * 3)[i : i + n] for i, n in ((1, chosen), (2, rejected))]
        lengths = (prompt, prompt + chosen, prompt + rejected)
        pairs.append((tokens, *answers, lengths))
    return pairs


def _logps(model, shape, pairs, **more):
    try:
        logps = sequence_logps(model, collate_pairs(pairs, shape=shape) | more)
        mx.eval(logps)
    # A family may refuse a kind of mask or offset with any error.
    except Exception:
        return None
    return np.array(logps)


def _whole_logps(model, pairs, width):
    """What generation computes: the model as it is, with its own caches."""
    batch = collate_pairs(pairs, shape=BatchShape(0, width))
    logits = model(batch["inputs"], cache=make_prompt_cache(model))
    logits = logits.reshape(-1, logits.shape[-1])[batch["positions"]]
    logps = token_logps(logits[None], batch["targets"][None])[0]
    return np.array(sum_by_row(logps, batch))


def _agree(ours, plain, noise):
    if ours is None or not np.isfinite(ours).all():
        return False
    return bool((np.abs(ours - plain) <= 1e-4 * np.abs(plain) + 5 * noise).all())


def check_sharing(model: nn.Module) -> Sharing:
    """Find the best way to share prompts that leaves the numbers as they are."""
    with running(model):
        pairs, plain, noise = _expected(model)
        agree = lambda shape: _agree(_logps(model, shape, pairs), plain, noise)
        if not agree(BatchShape(0, 25)):
            setattr(model, RUN_WHOLE, True)
        grades = (g for g in _SHAPES if _may_try(model, g) and agree(_SHAPES[g]))
        grade = next(grades, "plain")
        warning = _padding_warning(model, pairs, plain)
    notice = ""
    if getattr(model, RUN_WHOLE, False):
        notice = (
            "[WARNING] This model computes other numbers in parts than as a whole: it "
            "runs whole, which takes more memory."
        )
    elif grade == "plain":
        notice = "This model can't share prompts: each answer runs with its own."
    return Sharing(grade, notice, warning)


def _padding_warning(model, pairs, plain):
    """Say so if answers get other log-probs in wider batches."""
    wider = _whole_logps(model, pairs, _WIDER)
    if _agree(wider, plain, _rounding(model, plain)):
        return ""
    return (
        "[WARNING] This model's log-probs depend on how far a batch is padded, here by "
        f"up to {np.abs(wider - plain).max():.2g} nats an answer: its losses and metrics "
        "are no more exact than that."
    )


def _rounding(model, plain):
    """What the model's precision may change of a log-prob."""
    dtype = model(mx.zeros((1, 1), dtype=mx.int32)).dtype
    return mx.finfo(dtype).eps ** 0.5 / 3 * np.abs(plain).max()


def check_packing(model: nn.Module, longest: int = 2048) -> Sharing:
    """Make sure that rows of several sequences leave the numbers as they are."""
    with running(model):
        pairs, plain, noise = _expected(model)
        offsets = (0, max(longest - _PACKED.width, 0))
        tried = [_logps(model, _PACKED, pairs, offset=offset) for offset in offsets]
    if not all(_agree(ours, plain, noise) for ours in tried):
        raise InputError(
            "This model can't pack several sequences into a row: set pack: false."
        )
    return Sharing("packed", "")


def _expected(model):
    """Pairs to try, their log-probs and how much padding changes those."""
    logits = model(mx.zeros((1, 1), dtype=mx.int32))
    pairs = _probe_pairs(logits.shape[-1])
    plain, wider = _whole_logps(model, pairs, 25), _whole_logps(model, pairs, _WIDER)
    # What a family computes otherwise when padded is no noise, but a difference.
    return pairs, plain, min(np.abs(wider - plain).max(), _rounding(model, plain))


def _may_try(model, grade):
    if grade != "ragged":
        return True
    trunk = find_trunk(model) or model
    tables = [m for m in trunk.children().values() if isinstance(m, nn.Embedding)]
    # Padding behind a ragged prompt would read beyond a table of positions.
    return len(tables) < 2
