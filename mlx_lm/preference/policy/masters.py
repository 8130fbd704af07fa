# Copyright © 2026 MLX Contributors

"""Optimizers that keep the trained weights in float32, or as one array."""

from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ...tuner.lora import LoRALinear
from ..device import compiles
from ..features import Feature


class MasterWeights:
    """An optimizer that updates float32 copies and rounds them into the model."""

    # A step of 1e-6 on a bfloat16 weight of 0.02 is lost in rounding.
    masters = True  # A step hands it float32 gradients.

    def __init__(self, optimizer: optim.Optimizer, model: nn.Module):
        self._optimizer = optimizer
        weights = tree_map(as_float32, model.trainable_parameters())
        optimizer.init(weights)
        self.state: dict = {"optimizer": optimizer.state, "weights": weights}

    @property
    def learning_rate(self) -> mx.array:
        """The rate of the last update."""
        return self._optimizer.learning_rate

    def update(self, model: nn.Module, gradients: dict) -> None:
        """Apply the gradients to the copies and round them into the model."""
        weights = self._optimizer.apply_gradients(
            tree_map(as_float32, gradients), self.state["weights"]
        )
        self.state["weights"] = weights
        parameters = model.trainable_parameters()
        model.update(tree_map(lambda w, p: w.astype(p.dtype), weights, parameters))


def as_float32(x: mx.array) -> mx.array:
    """The same numbers, with room for small changes."""
    return x.astype(mx.float32)


class JoinedWeights:
    """An optimizer that updates all trained weights as one array."""

    # An adapter has hundreds of small arrays, and starting ten kernels for each takes
    # a GPU as long as the model's own work on a small batch.
    masters = True

    def __init__(self, optimizer: optim.Optimizer, model: nn.Module):
        self._optimizer = optimizer
        parameters = model.trainable_parameters()
        self._shapes = [(k, x.shape, x.size) for k, x in tree_flatten(parameters)]
        self._rounded = _products(model) if _computes_in_bfloat16(model) else set()
        weights = self.join(parameters)
        optimizer.init(weights)
        self.state: dict = {"optimizer": optimizer.state, "weights": weights}

    @property
    def learning_rate(self) -> mx.array:
        """The rate of the last update."""
        return self._optimizer.learning_rate

    def join(self, tree: dict) -> dict[str, mx.array]:
        """The arrays of a tree such as the trained weights' one after another."""
        arrays = [x for _, x in tree_flatten(tree)]
        if len({x.dtype for x in arrays}) > 1:
            arrays = [as_float32(x) for x in arrays]
        parts = []
        for x in arrays:
            parts.append(x.reshape(-1))
            if gap := -x.size % _ALIGNED:
                parts.append(mx.zeros((gap,), dtype=x.dtype))
        return {"joined": as_float32(mx.concatenate(parts))}

    def update(self, model: nn.Module, gradients: dict[str, mx.array]) -> None:
        """Apply joined gradients, and write the weights into the model."""
        weights = self.state["weights"]
        self.state["weights"] = self._optimizer.apply_gradients(gradients, weights)
        self.write(model)

    def write(self, model: nn.Module) -> None:
        """Give the model its weights: views of the joined array."""
        model.update(tree_unflatten(self._views()))

    def round(self, model: nn.Module) -> None:
        """Give the model what its products take: in 16 bits where it computes so."""
        # Otherwise every adapter casts its inputs, a thousand times its own size.
        model.update(tree_unflatten(self._views(self._rounded)))

    def _views(self, rounded=frozenset()):
        exact, start, found = self.state["weights"]["joined"], 0, []
        low = exact.astype(mx.bfloat16) if rounded else exact
        for name, shape, size in self._shapes:
            joined = low if name in rounded else exact
            found.append((name, joined[start : start + size].reshape(shape)))
            start += size + -size % _ALIGNED
        return found


def _products(model):
    """The names of what adapters multiply their inputs by."""
    found = (n for n, m in model.named_modules() if type(m) is LoRALinear)
    return {f"{name}.{part}" for name in found for part in ("lora_a", "lora_b")}


def _computes_in_bfloat16(model):
    # float16 has no range for gradients.
    sizes: Counter = Counter()
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    for name, x in tree_flatten(model.parameters()):
        if name not in trained and mx.issubdtype(x.dtype, mx.floating):
            sizes[x.dtype] += x.size
    return bool(sizes) and sizes.most_common(1)[0][0] == mx.bfloat16


# Matrix products want their arrays to begin at a multiple of 256 bytes, in 16 bits too.
_ALIGNED = 128
# The joined gradient of more weights than adapters have would be felt in the memory.
_MOST_JOINED = 2**26
# They treat every number alike, whatever array it is in.
_ELEMENTWISE = (optim.Adam, optim.AdamW, optim.SGD)


def with_master_weights(
    optimizer: optim.Optimizer, model: nn.Module, join: bool = False
) -> optim.Optimizer | MasterWeights | JoinedWeights:
    """Wrap the optimizer if any trained weight has fewer than 32 bits, or to join."""
    trained = [p for _, p in tree_flatten(model.trainable_parameters())]
    if not {p.dtype for p in trained} <= {mx.float32}:
        return MasterWeights(optimizer, model)
    is_small = sum(p.size for p in trained) <= _MOST_JOINED and len(trained) > 1
    if join and is_small and type(optimizer) in _ELEMENTWISE:
        return JoinedWeights(optimizer, model)
    return optimizer


class _Masters(Feature):
    def optimizer(self, optimizer: Any, model: Any, args: Any) -> Any:
        # Few launches matter there, where nobody looks at single gradients.
        joins = compiles(args.compile) and not args.debug_gradients
        return with_master_weights(optimizer, model, joins)


FEATURE = _Masters()
