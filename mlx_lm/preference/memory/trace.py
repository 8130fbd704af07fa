# Copyright © 2026 MLX Contributors

"""The operations of a training step, found without computing any of them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from .tape import Op, Tape


def array_places(tree: Any, in_model: bool = False) -> Iterator[tuple[Any, Any, bool]]:
    """Every place of a tree that holds an array."""
    in_model = in_model or isinstance(tree, nn.Module)
    items: Iterable = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    for key, value in items:
        if isinstance(value, mx.array):
            if not isinstance(tree, tuple):
                yield tree, key, in_model
        else:
            yield from array_places(value, in_model)


def _arrays(tree):
    return [x for _, x in tree_flatten(tree) if isinstance(x, mx.array)]


def _is_float(x):
    return mx.issubdtype(x.dtype, mx.inexact)


def _floats(tree):
    return [x for x in _arrays(tree) if _is_float(x)]


def _refill(tree, arrays):
    """The tree with other arrays in the places of its arrays."""
    arrays = iter(arrays)
    put = lambda x: next(arrays) if isinstance(x, mx.array) else x
    return tree_map(put, tree)


def _stand_in(x):
    """A placeholder that the tracer can't confuse with any other."""
    # Constants with a dimension are never merged.
    one = mx.array([0]).astype(x.dtype)
    return mx.broadcast_to(one, x.shape) if x.shape else one.squeeze()


class _Segments:
    """Lets functions with a gradient of their own be traced: MLX can't export them."""

    # Each call is cut out of the function that is differentiated: its results, and its
    # arguments' gradients, are placeholders, which are replaced in the tape afterwards.

    def __init__(self):
        self.calls: list[tuple[list, list]] = []
        self.ties: list[tuple[mx.array, mx.array]] = []
        # Calls outside of any gradient that was seen, and such gradients.
        self.strays = self.gradients = 0
        self._handle: Callable | None = None
        self._value_and_grad = mx.value_and_grad

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """All that tracing replaces for the whole process, while a step is traced."""
        stand_ins = {
            (mx, "checkpoint"): lambda fun: partial(self.call, fun, _recompute),
            (mx, "custom_function"): partial(_CustomFunction, self),
            (mx, "value_and_grad"): self.value_and_grad,
            # Messages to other ranks can't be exported, and take no memory here.
            (mx.distributed, "all_sum"): lambda x, **_: x,
            (mx.distributed, "all_gather"): _own_copies,
            (mx.fast, "scaled_dot_product_attention"): _attention,
        }
        real = {place: getattr(*place) for place in stand_ins}
        try:
            for place, stand_in in stand_ins.items():
                setattr(*place, stand_in)
            yield
        finally:
            for place, function in real.items():
                setattr(*place, function)

    @contextmanager
    def _handled_by(self, handle):
        before, self._handle = self._handle, handle
        try:
            yield
        finally:
            self._handle = before

    def call(self, fun, backward, /, *args, **kwargs):
        """Call a function with a gradient of its own."""
        handle = self._handle
        self.strays += handle is None
        if handle is None:
            return fun(*args, **kwargs)
        with self._handled_by(_plainly):
            return handle(fun, backward, (args, kwargs))

    def value_and_grad(self, fun, argnums=None, argnames=()):
        if argnums not in (None, 0) or argnames:
            return self._value_and_grad(fun, argnums, argnames)

        def run(tree, *args, **kwargs):
            call = lambda arrays: fun(_refill(tree, arrays), *args, **kwargs)
            value, gradients = self._differentiate(call, _arrays(tree))
            return value, _refill(tree, gradients)

        return run

    def _differentiate(self, call, primals):
        """A function's value and gradients, with its segments cut out."""
        found, cuts, value = [], [], None
        self.gradients += 1

        def look(fun, backward, args):
            out = _plainly(fun, backward, args)
            found.append((_arrays(args), out))
            return out

        with self._handled_by(look):
            call(primals)
        leaves = [[_stand_in(x) for x in _arrays(out)] for _, out in found]
        given = [[_stand_in(x) for x in _floats(args)] for args, _ in found]

        def flat(*arrays):
            nonlocal value
            rest = iter(arrays[len(primals) :])

            def cut(fun, backward, args):
                out = _plainly(fun, backward, args)
                cuts.append((fun, backward, args, out))
                return _refill(out, rest)

            with self._handled_by(cut):
                value = call(arrays[: len(primals)])
            loss, *others = _arrays(value)
            passed = [x for _, _, args, _ in cuts for x in _floats(args)]
            # An array that is returned twice would lose a gradient.
            again = {id(x): i for i, x in enumerate(passed)}
            passed = [x if again[id(x)] == i else x * 1 for i, x in enumerate(passed)]
            return [loss, *passed, *(mx.stop_gradient(x) for x in others)]

        inputs = [*primals, *(x for xs in leaves for x in xs)]
        cotangents = [mx.array(1.0), *(x for xs in given for x in xs)]
        outputs, gradients = mx.vjp(flat, inputs, cotangents)
        incoming = iter(gradients[len(primals) :])
        for (fun, backward, args, out), leaf, gap in zip(cuts, leaves, given):
            with self._handled_by(_plainly):
                inner = backward(fun, args, out, [next(incoming) for _ in leaf])
            self.calls.append((_arrays(args) + _arrays(out), leaf))
            self.ties += zip(gap, inner)
        value = _refill(value, [outputs[0], *outputs[len(cotangents) :]])
        return value, gradients[: len(primals)]


class _CustomFunction:
    """Stands for ``mx.custom_function`` while a step is traced."""

    def __init__(self, segments, fun):
        self._segments, self._fun, self._vjp = segments, fun, None

    def vjp(self, vjp):
        self._vjp = vjp
        return self

    def __call__(self, *args, **kwargs):
        if self._vjp is None:
            return self._fun(*args, **kwargs)
        return self._segments.call(self._fun, self._backward, *args, **kwargs)

    def _backward(self, _, args, out, cotangents):
        primals = args[0] if len(args[0]) > 1 else args[0][0]
        gradients = self._vjp(primals, _refill(out, cotangents), out)
        pairs = zip(_arrays(args), _arrays([gradients]))
        return [gradient for x, gradient in pairs if _is_float(x)]


def _plainly(fun, _, args):
    return fun(*args[0], **args[1])


def _own_copies(x, group=None, **_):
    return mx.concatenate([x] * (group or mx.distributed.init()).size())


def _has_fused_gradient(q, v):
    """Whether MLX computes attention's gradient as one operation, on CUDA alone."""
    if mx.default_device() == mx.cpu or not mx.cuda.is_available():
        return False
    return q.dtype.size == 2 and q.shape[2] % 128 == 0 and q.shape[3] == v.shape[3]


def _attention(q, k, v, **options):
    """Attention as MLX computes it, or what can be exported and needs as much memory."""
    if not _has_fused_gradient(q, v):
        return _REAL_ATTENTION(q, k, v, **options)
    # As there, nothing of queries times keys is kept: q, k, v and the result are.
    B, heads, L, D = q.shape
    grouped = q.reshape(B, k.shape[1], -1, L, D)
    of_all = [mx.square(x).mean(axis=2)[:, :, None, None] for x in (k, v)]
    return mx.exp(grouped * of_all[0] + of_all[1]).reshape(q.shape)


_REAL_ATTENTION = mx.fast.scaled_dot_product_attention


def _recompute(fun, args, out, cotangents):
    """What ``mx.checkpoint`` does backward: run again, and differentiate."""
    results = _arrays(out)
    again = mx.depends(_arrays(args), results)

    def flat(*floats):
        rest = iter(floats)
        arrays = [next(rest) if _is_float(x) else x for x in again]
        positional, named = _refill(args, arrays)
        return _floats(fun(*positional, **named))

    cotangents = [x for x, y in zip(cotangents, results) if _is_float(y)]
    return mx.vjp(flat, [x for x in again if _is_float(x)], cotangents)[1]


def _containers(tree):
    """Every dict and list of a tree, and what is in it now."""
    if isinstance(tree, (dict, list)):
        yield tree, tree.copy() if isinstance(tree, list) else dict(tree)
    if isinstance(tree, (dict, list, tuple)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _containers(value)


def _put_back(containers):
    for tree, before in containers:
        if isinstance(tree, list):
            tree[:] = before
        else:
            # A model's own update is another function.
            dict.clear(tree)
            dict.update(tree, before)


def _trace(fn, args, state, gradient):
    """The tape of a step, tied up; its outputs are the state's, then ``fn``'s."""
    tape, segments, sizes = Tape(), _Segments(), []
    places = list(array_places(state))
    before = list(_containers(state))

    def step(*arrays):
        for (tree, key, _), x in zip(places, arrays):
            tree[key] = x
        results = _arrays(fn(*_refill(list(args), arrays[len(places) :])))
        groups = [[tree[key] for tree, key, _ in array_places(state)]]
        if len(groups[0]) != len(places):
            raise ValueError(
                "The state grew during the step: initialize the optimizer first."
            )
        groups[0] += results
        groups += [group for call in segments.calls for group in call]
        groups += zip(*segments.ties)
        sizes.extend(len(group) for group in groups)
        return [x for group in groups for x in group]

    inputs = [tree[key] for tree, key, _ in places]
    try:
        with segments.replacing():
            mx.export_function(tape.record, step, *inputs, *_arrays(args))
    finally:
        _put_back(before)
    if gradient and segments.strays and not segments.gradients:
        raise ValueError(
            "The step's gradient function was made before it was traced: call "
            "nn.value_and_grad inside the step."
        )
    names = iter(tape.outputs)
    groups = [list(islice(names, size)) for size in sizes]
    tape.outputs = groups.pop(0)
    ties = dict(zip(*groups[2 * len(segments.calls) :]))
    calls = list(zip(*[iter(groups[: 2 * len(segments.calls)])] * 2))
    # What stood for the results becomes what MLX has here: a view of them.
    made = {name for _, results in calls for name in results}
    tape.ops = [op for op in tape.ops if made.isdisjoint(op.outputs)]
    tape.ops += [Op("CustomTransforms", [], *call) for call in calls]
    tape.tie(ties)
    return tape


def trace_step(fn: Callable, args: tuple, state: Any, gradient: bool = True) -> Tape:
    """The operations of a step, as the default device runs them."""
    try:
        return _trace(fn, args, state, gradient)
    except (RuntimeError, ValueError) as e:
        on_cpu = mx.default_device() == mx.cpu
        if on_cpu or not str(e).startswith("[export_function]"):
            raise
    # Kernels that a family brings can't be exported: what the CPU runs needs no less.
    with mx.stream(mx.cpu):
        return _trace(fn, args, state, gradient)
