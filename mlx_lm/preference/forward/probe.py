# Copyright © 2026 MLX Contributors

"""Whether a model may share prompts or pack rows, found out on the model itself.

A table of families would be wrong for the next one. So before a run a few tokens
go through the model in every way that training could take, and a way whose
log-probs differ from the plain forward's is not taken.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...models.cache import make_prompt_cache
from ..batch.collate import collate_pairs
from ..batch.shape import BatchShape
from ..errors import InputError
from .frozen import running
from .head import completion_logps
from .parts import RUN_WHOLE, calls_replaced, find_trunk
from .states import completion_states
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
_WIDTH, _WIDER = 25, 36
# A GPU multiplies float32 with 10 bits behind the point (TF32), a CPU with all.
_ROUNDING = {mx.float32: 2**-16, mx.bfloat16: 2**-8, mx.float16: 2**-11}


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


class _Expected(NamedTuple):
    """What each answer token must come to, and how far off it may be."""

    logps: np.ndarray
    rows: np.ndarray
    rounding: np.ndarray
    far: np.ndarray


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Let a model compute in float32, with its weights as they are."""
    # All that follows an embedding is promoted, one weight at a time.
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    promote = lambda call, x: call(x).astype(mx.float32)
    found = [m for m in model.modules() if isinstance(m, kinds)]
    with calls_replaced((m, promote) for m in found):
        yield


def _logps(model, shape, pairs, **more):
    """The log-prob of each answer token in batches of some shape, or None."""
    batch = collate_pairs(pairs, shape=shape) | more
    try:
        states = completion_states(model, batch)
        logps = completion_logps(model, states, batch["targets"])
        mx.eval(logps)
    # A family may refuse a kind of mask or offset with any error.
    except Exception:
        return None
    return np.array(logps)


def _expected(model, pairs, width=_WIDTH):
    """What generation computes: the model as it is, with its own caches."""
    batch = collate_pairs(pairs, shape=BatchShape(0, width))
    logits = model(batch["inputs"], cache=make_prompt_cache(model))
    logits = logits.reshape(-1, logits.shape[-1])[batch["positions"]]
    logps = token_logps(logits[None], batch["targets"][None])[0]
    rounding = _ROUNDING[logits.dtype]
    if mx.default_device() == mx.gpu:
        rounding = max(rounding, 2**-11)
    # A token that can't be written has a logit of -inf.
    logits = mx.where(mx.isfinite(logits), logits, 0).astype(mx.float32)
    # Every layer rounds by as much on its own, and their errors add up in squares.
    depth = max(len(getattr(model, "layers", None) or ()), 1)
    size = mx.square(logits).mean(axis=-1) ** 0.5
    bound = 4 * rounding * depth**0.5 * size + 1e-6
    far = mx.var(logits, axis=-1) ** 0.5 / 4 + 1e-6
    return _Expected(*map(np.array, (logps, batch["rows"], bound, far)))


def _agree(ours, expected, bound):
    """Whether the tokens of every row are off by no more than a bound."""
    if ours is None or not np.isfinite(ours).all():
        return False
    off = ((ours - expected.logps) / bound) ** 2
    rows = [expected.rows == i for i in range(2 * len(_LENGTHS))]
    return all(off[row].mean() <= 1 for row in rows)


class _Probe:
    """Pairs that a model has scored as a whole, to be scored in other ways."""

    def __init__(self, model):
        self.model = model
        logits = model(mx.zeros((1, 1), dtype=mx.int32))
        self.pairs = _probe_pairs(logits.shape[-1])
        # Rounding to 16 bits can hide a fault, or choose another expert and look like
        # one: float32 decides, and the model's own numbers must not be far off.
        self.own = _expected(model, self.pairs) if logits.dtype != mx.float32 else None
        with _in_float32(model):
            self.exact = _expected(model, self.pairs)

    def agrees(self, shape, **more):
        """Whether batches of a shape give the same numbers."""
        given = (self.model, shape, self.pairs)
        own = self.own
        if own is not None and not _agree(_logps(*given, **more), own, own.far):
            return False
        with _in_float32(self.model):
            ours = _logps(*given, **more)
        return _agree(ours, self.exact, self.exact.rounding)


def check_sharing(model: nn.Module) -> Sharing:
    """Find the best way to share prompts that leaves the numbers as they are."""
    with running(model):
        probe = _Probe(model)
        if not probe.agrees(BatchShape(0, _WIDTH)):
            setattr(model, RUN_WHOLE, True)
        grades = (g for g in _SHAPES if _may_try(model, g))
        grade = next((g for g in grades if probe.agrees(_SHAPES[g])), "plain")
        warning = _padding_warning(probe)
    notice = ""
    if getattr(model, RUN_WHOLE, False):
        notice = (
            "[WARNING] This model computes other numbers in parts than as a whole: it "
            "runs whole, which takes more memory."
        )
    elif grade == "plain":
        notice = "This model can't share prompts: each answer runs with its own."
    return Sharing(grade, notice, warning)


def _padding_warning(probe):
    """Say so if answers get other log-probs in wider batches."""
    with _in_float32(probe.model):
        wider = _expected(probe.model, probe.pairs, _WIDER).logps
    if _agree(wider, probe.exact, probe.exact.rounding):
        return ""
    off, rows = np.abs(wider - probe.exact.logps), probe.exact.rows
    most = max(off[rows == i].sum() for i in range(2 * len(_LENGTHS)))
    return (
        "[WARNING] This model's log-probs depend on how far a batch is padded, here by "
        f"up to {most:.2g} nats an answer: its losses and metrics are no more exact "
        "than that."
    )


def check_packing(model: nn.Module, longest: int = 2048) -> Sharing:
    """Make sure that rows of several sequences leave the numbers as they are."""
    offsets = (0, max(longest - _PACKED.width, 0))
    with running(model):
        probe = _Probe(model)
        agree = all(probe.agrees(_PACKED, offset=offset) for offset in offsets)
    if not agree:
        raise InputError(
            "This model can't pack several sequences into a row: set pack: false."
        )
    return Sharing("packed", "")


def _may_try(model, grade):
    if grade != "ragged":
        return True
    trunk = find_trunk(model) or model
    tables = [m for m in trunk.children().values() if isinstance(m, nn.Embedding)]
    # Padding behind a ragged prompt would read beyond a table of positions.
    return len(tables) < 2
