# Copyright © 2026 MLX Contributors

"""Log-probs of answer tokens without the logits in memory.

Only answers are scored, and the gradient of a token's log-prob with respect to
its hidden state needs nothing but this token's logits. So the head walks over
chunks of tokens: logits, log-prob, gradient, and the logits are gone. The
backward pass multiplies by what the loss asks of each token.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .parts import calls_replaced, find_trunk, head_logits
from .tokens import score_tokens, token_logps

# Bounds of a chunk's float32 logits, of which three times as much is alive at
# once. Small chunks read the head's weights more often.
SMALLEST_CHUNK, LARGEST_CHUNK = 64 * 2**20, 256 * 2**20


def default_chunk_bytes() -> int:
    """The size of a chunk's float32 logits that fits the device."""
    info = mx.device_info()
    memory = info.get("memory_size", info.get("total_memory", 0))
    return min(max(int(memory) // 128, SMALLEST_CHUNK), LARGEST_CHUNK)


def chunk_sizes(tokens: int, vocabulary: int, chunk_bytes: int | None = None) -> list:
    """Cut a number of tokens into chunks of nearly equal size."""
    count = -(-tokens * vocabulary * 4 // (chunk_bytes or default_chunk_bytes()))
    count = max(1, min(count, tokens))
    return [tokens // count + (i < tokens % count) for i in range(count)]


def trained_outside_layers(model: Any) -> dict[str, mx.array]:
    """The head's trainable parameters: those that are not in the layers."""
    if not isinstance(model, nn.Module):
        return {}
    layers = getattr(model, "layers", None) or []
    inside = {id(x) for l in layers for _, x in tree_flatten(l.parameters())}
    trained = tree_flatten(model.trainable_parameters())
    return {name: x for name, x in trained if id(x) not in inside}


def _dropouts(model: Any) -> list[nn.Dropout]:
    """The head's dropouts, as far as they drop: those that are not in the layers."""
    if not isinstance(model, nn.Module):
        return []
    inside = {id(m) for l in getattr(model, "layers", None) or [] for m in l.modules()}
    drops = lambda m: isinstance(m, nn.Dropout) and m.training and m._p_1 < 1
    return [m for m in model.modules() if id(m) not in inside and drops(m)]


def _drop(module, key, original, x):
    mask = mx.random.bernoulli(module._p_1, x.shape, key=key)
    return (mask * x) * (1 / module._p_1)


def _in_order(x, after):
    # Without it all chunks' logits could be alive at once.
    return mx.depends([x], after)[0] if after else x


def _chunks(sizes, *arrays):
    start = 0
    for size in sizes:
        yield [x[start : start + size] for x in arrays]
        start += size


def _first_weighs(weights, parts):
    # The others carry no gradient.
    return [weights] + [mx.zeros_like(weights)] * (parts - 1)


def _with_gradient(score: Callable, parts: int, sizes: list, names: list) -> Callable:
    """``score`` chunk by chunk, its gradient for the states computed with it."""

    @mx.custom_function
    def scores(states, targets, keys, *values):
        results: list[tuple] = []
        for (x, t), key in zip(_chunks(sizes, states, targets), keys):
            x = _in_order(x, results[-1] if results else None)
            one = lambda x, t=t, k=key: score(x, t, dict(zip(names, values)), k)
            weights = _first_weighs(mx.ones(x.shape[:1]), parts)
            y, (dx,) = mx.vjp(one, [x], weights)
            results.append((*y, dx))
        return tuple(mx.concatenate(part) for part in zip(*results))

    @scores.vjp
    def scores_vjp(primals, cotangents, outputs):
        states, targets, keys, *values = primals
        weights, dx = cotangents[0], outputs[-1]
        # A rounded weight would be wrong for all of a pair.
        dx = (dx.astype(mx.float32) * weights[:, None]).astype(dx.dtype)
        totals = [mx.zeros(v.shape, mx.float32) for v in values]
        if values:
            # A trained head: its logits are computed once more, chunk by chunk.
            chunks = _chunks(sizes, states, targets, weights)
            for (x, t, w), key in zip(chunks, keys):
                x = _in_order(x, totals)
                one = lambda *v, x=x, t=t, k=key: score(x, t, dict(zip(names, v)), k)
                _, grads = mx.vjp(one, values, _first_weighs(w, parts))
                totals = [a + g.astype(mx.float32) for a, g in zip(totals, grads)]
        totals = [t.astype(v.dtype) for t, v in zip(totals, values)]
        return dx, mx.zeros_like(targets), mx.zeros_like(keys), *totals

    return lambda *arrays: scores(*arrays)[:-1]


def completion_scores(
    model: Any,
    states: mx.array,
    targets: mx.array,
    functions: tuple[Callable, ...],
    *,
    gradient: bool = False,
    chunk_bytes: int | None = None,
) -> tuple[mx.array, ...]:
    """Functions of logits and targets, the first differentiable, chunk by chunk."""
    width = head_logits(model, states[:1]).shape[-1]
    sizes = chunk_sizes(states.shape[0], width, chunk_bytes)
    dropouts = _dropouts(model) if gradient else []

    def score(x, t, values, key=None):
        if values:
            model.update(tree_unflatten(list(values.items())))
        keys = [] if key is None else mx.random.split(key, max(len(dropouts), 1))
        calls = [(m, partial(_drop, m, k)) for m, k in zip(dropouts, keys)]
        with calls_replaced(calls):
            logits = head_logits(model, x)[None]
        return [function(logits, t[None])[0] for function in functions]

    # Logits that are there already keep their own, plain gradient.
    if gradient and find_trunk(model) is not None:
        trained = trained_outside_layers(model)
        run = _with_gradient(score, len(functions), sizes, list(trained))
        keys = mx.zeros((len(sizes), 2), dtype=mx.uint32)
        if dropouts:
            # Drawn here, so that the backward pass drops the same again.
            keys = mx.random.randint(0, 2**31 - 1, keys.shape).astype(mx.uint32)
        scores = run(states, targets, keys, *trained.values())
        model.update(tree_unflatten(list(trained.items())))
        return scores
    results: list[list[mx.array]] = []
    for x, t in _chunks(sizes, states, targets):
        results.append(score(_in_order(x, results[-1] if results else None), t, {}))
    return tuple(mx.concatenate(part) for part in zip(*results))


def completion_logps(
    model: Any, states: mx.array, targets: mx.array, **options: Any
) -> mx.array:
    """Log-prob of every target, the head applied chunk by chunk."""
    return completion_scores(model, states, targets, (token_logps,), **options)[0]


def paired_completion_logps(
    policy_logits: Callable[[mx.array], mx.array],
    reference_logits: Callable[[mx.array], mx.array],
    policy_states: mx.array,
    reference_states: mx.array,
    targets: mx.array,
    *,
    chunk_bytes: int | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Both models' log-prob of every target and the exact KL, chunk by chunk."""
    width = policy_logits(policy_states[:1]).shape[-1]
    sizes = chunk_sizes(targets.shape[0], 2 * width, chunk_bytes)
    results: list[tuple] = []
    for x, y, t in _chunks(sizes, policy_states, reference_states, targets):
        x, y = (_in_order(s, results[-1] if results else None) for s in (x, y))
        logits = policy_logits(x)[None], reference_logits(y)[None]
        results.append(tuple(s[0] for s in score_tokens(*logits, t[None])))
    policy, reference, kl = (mx.concatenate(parts) for parts in zip(*results))
    return policy, reference, kl
