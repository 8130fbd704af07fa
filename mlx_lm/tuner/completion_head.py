# Copyright © 2026 MLX Contributors

"""Log-probs of answer tokens without the logits in memory.

Only answers are scored, and the gradient of a token's log-prob with respect to
its hidden state needs nothing but this token's logits. So the head walks over
chunks of tokens: logits, log-prob, gradient, and the logits are gone. The
backward pass multiplies by what the loss asks of each token.

    completion_logps(model, states, targets)   log-probs
    completion_scores(...)                     and how sure the model is
      _with_gradient(score, sizes, ...)        the gradient in the forward pass
    paired_completion_logps(...)               both models and their exact KL
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .model_parts import find_trunk, head_logits
from .token_scores import score_tokens, token_log_sum_squares, token_logps

# Bounds of a chunk's float32 logits, of which three times as much is alive at
# once. Small chunks read the head's weights more often.
SMALLEST_CHUNK, LARGEST_CHUNK = 64 * 2**20, 256 * 2**20


def default_chunk_bytes() -> int:
    """
    The size of a chunk's float32 logits that fits the device.

    Returns:
        int: A 128th of its memory in bytes, within 64 and 256 MiB.

    Example:
        >>> SMALLEST_CHUNK <= default_chunk_bytes() <= LARGEST_CHUNK
        True
    """
    info = mx.device_info()
    memory = info.get("memory_size", info.get("total_memory", 0))
    return min(max(int(memory) // 128, SMALLEST_CHUNK), LARGEST_CHUNK)


def chunk_sizes(tokens: int, vocabulary: int, chunk_bytes: int | None = None) -> list:
    """
    Cut a number of tokens into chunks of nearly equal size.

    Args:
        tokens (int): How many tokens the head scores.
        vocabulary (int): Logits a token.
        chunk_bytes (int, optional): Bytes of a chunk's float32 logits. Default:
            ``default_chunk_bytes()``.

    Returns:
        list: The sizes, which differ by one at most.

    Example:
        >>> chunk_sizes(10, 8, chunk_bytes=4 * 8 * 4)
        [4, 3, 3]
    """
    chunk_bytes = chunk_bytes or default_chunk_bytes()
    count = max(1, -(-tokens * vocabulary * 4 // chunk_bytes))
    count = min(count, max(tokens, 1))
    return [tokens // count + (i < tokens % count) for i in range(count)]


def trained_outside_layers(model: Any) -> dict[str, mx.array]:
    """
    The trainable parameters that are not in the model's layers: those of the head.

    Args:
        model (nn.Module): The policy.

    Returns:
        dict: Arrays by name; empty for what is no module.

    Example:
        >>> list(trained_outside_layers(nn.Linear(1, 1, bias=False)))
        ['weight']
    """
    if not isinstance(model, nn.Module):
        return {}
    layers = getattr(model, "layers", None) or []
    inside = {id(x) for l in layers for _, x in tree_flatten(l.parameters())}
    trained = tree_flatten(model.trainable_parameters())
    return {name: x for name, x in trained if id(x) not in inside}


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


def _with_gradient(
    score: Callable, parts: int, sizes: list, parameters: dict
) -> Callable:
    """``score`` chunk by chunk, its gradient for the states computed with it.

    Of the arrays that it returns, so many as ``parts``, the first is differentiated.
    """
    names = list(parameters)

    @mx.custom_function
    def scores(states, targets, *values):
        results: list[tuple] = []
        for x, t in _chunks(sizes, states, targets):
            x = _in_order(x, results[-1] if results else None)
            one = lambda x, t=t: score(x, t, dict(zip(names, values)))
            weights = _first_weighs(mx.ones(x.shape[:1]), parts)
            y, (dx,) = mx.vjp(one, [x], weights)
            results.append((*y, dx))
        return tuple(mx.concatenate(part) for part in zip(*results))

    @scores.vjp
    def scores_vjp(primals, cotangents, outputs):
        states, targets, *values = primals
        weights, dx = cotangents[0], outputs[-1]
        dx = dx * weights[:, None].astype(dx.dtype)
        totals = [mx.zeros(v.shape, mx.float32) for v in values]
        if values:
            # A trained head: its logits are computed once more, chunk by chunk.
            for x, t, w in _chunks(sizes, states, targets, weights):
                x = _in_order(x, totals)
                one = lambda *v, x=x, t=t: score(x, t, dict(zip(names, v)))
                _, grads = mx.vjp(one, values, _first_weighs(w, parts))
                totals = [a + g.astype(mx.float32) for a, g in zip(totals, grads)]
        totals = [t.astype(v.dtype) for t, v in zip(totals, values)]
        return dx, mx.zeros_like(targets), *totals

    return lambda *arrays: scores(*arrays)[:-1]


def _scores(model, states, targets, functions, gradient, chunk_bytes):
    """Functions of logits and targets, the first differentiable, chunk by chunk."""
    width = head_logits(model, states[:1]).shape[-1]
    sizes = chunk_sizes(states.shape[0], width, chunk_bytes)
    whole = find_trunk(model) is None
    # Logits that are there already keep their own, plain gradient.
    parameters = {} if whole or not gradient else trained_outside_layers(model)

    def score(x, t, values):
        if values:
            model.update(tree_unflatten(list(values.items())))
        logits = head_logits(model, x)[None]
        return [function(logits, t[None])[0] for function in functions]

    if gradient and not whole:
        run = _with_gradient(score, len(functions), sizes, parameters)
        scores = run(states, targets, *parameters.values())
        if parameters:
            model.update(tree_unflatten(list(parameters.items())))
        return scores
    results: list[list[mx.array]] = []
    for x, t in _chunks(sizes, states, targets):
        results.append(score(_in_order(x, results[-1] if results else None), t, {}))
    return tuple(mx.concatenate(part) for part in zip(*results))


def completion_logps(
    model: Any,
    states: mx.array,
    targets: mx.array,
    *,
    gradient: bool = False,
    chunk_bytes: int | None = None,
) -> mx.array:
    """
    Log-prob of every target, the head applied chunk by chunk.

    Args:
        model: The model whose head it is, see ``head_logits``.
        states (mx.array): Hidden states. Shape: ``(N, D)``.
        targets (mx.array): Token ids. Shape: ``(N,)``.
        gradient (bool): Prepare the gradient for the states, and for what is
            trained of the head, in the forward pass. Default: ``False``.
        chunk_bytes (int, optional): Bytes of a chunk's float32 logits.

    Returns:
        mx.array: float32 log-probs in nats. Shape: ``(N,)``.

    Example:
        >>> identity = lambda logits: logits
        >>> logits, targets = mx.zeros((3, 4)), mx.array([0, 1, 2])
        >>> completion_logps(identity, logits, targets, chunk_bytes=16).tolist()
        [-1.3862943649291992, -1.3862943649291992, -1.3862943649291992]
    """
    functions = (token_logps,)
    return _scores(model, states, targets, functions, gradient, chunk_bytes)[0]


def completion_scores(
    model: Any,
    states: mx.array,
    targets: mx.array,
    *,
    gradient: bool = False,
    chunk_bytes: int | None = None,
) -> tuple[mx.array, mx.array]:
    """
    Log-prob of every target, and ``log sum_v p(v)^2`` where it stands.

    Both come from the same logits, which are computed once.

    Args:
        model: The model whose head it is, see ``head_logits``.
        states (mx.array): Hidden states. Shape: ``(N, D)``.
        targets (mx.array): Token ids. Shape: ``(N,)``.
        gradient (bool): As for ``completion_logps``. Default: ``False``.
        chunk_bytes (int, optional): Bytes of a chunk's float32 logits.

    Returns:
        tuple: float32 log-probs, and the others, which carry no gradient, in
        nats. Shape: ``(N,)`` each.

    Example:
        >>> logits, targets = mx.zeros((2, 4)), mx.array([0, 1])
        >>> completion_scores(lambda x: x, logits, targets)[1].tolist()
        [-1.3862943649291992, -1.3862943649291992]
    """
    functions = (token_logps, lambda logits, _: token_log_sum_squares(logits))
    logps, squares = _scores(model, states, targets, functions, gradient, chunk_bytes)
    return logps, mx.stop_gradient(squares)


def paired_completion_logps(
    policy_logits: Callable[[mx.array], mx.array],
    reference_logits: Callable[[mx.array], mx.array],
    policy_states: mx.array,
    reference_states: mx.array,
    targets: mx.array,
    *,
    chunk_bytes: int | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """
    Both models' log-prob of every target and the exact KL, chunk by chunk.

    Args:
        policy_logits (Callable): The policy's head, ``(N, D)`` to ``(N, V)``.
        reference_logits (Callable): The reference's head.
        policy_states (mx.array): The policy's hidden states. Shape: ``(N, D)``.
        reference_states (mx.array): The reference's, of its own width.
        targets (mx.array): Token ids. Shape: ``(N,)``.
        chunk_bytes (int, optional): Bytes of a chunk's float32 logits.

    Returns:
        tuple: policy log-probs, reference log-probs and KL(policy || reference)
        of every token, float32 in nats. Shape: ``(N,)`` each.

    Example:
        >>> same, x, t = lambda x: x, mx.zeros((2, 4)), mx.array([0, 1])
        >>> paired_completion_logps(same, same, x, x, t)[2].tolist()
        [0.0, 0.0]
    """
    width = policy_logits(policy_states[:1]).shape[-1]
    sizes = chunk_sizes(targets.shape[0], 2 * width, chunk_bytes)
    results: list[tuple] = []
    for x, y, t in _chunks(sizes, policy_states, reference_states, targets):
        x = _in_order(x, results[-1] if results else None)
        y = _in_order(y, results[-1] if results else None)
        scores = score_tokens(
            policy_logits(x)[None], reference_logits(y)[None], t[None]
        )
        results.append(tuple(s[0] for s in scores))
    policy, reference, kl = (mx.concatenate(parts) for parts in zip(*results))
    return policy, reference, kl
