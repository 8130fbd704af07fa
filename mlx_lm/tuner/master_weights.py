# Copyright © 2026 MLX Contributors

"""Float32 master copies of trained weights that are stored in 16 bits."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map


class MasterWeights:
    """
    An optimizer that updates float32 copies and rounds them into the model.

    A step of 1e-6 on a bfloat16 weight of 0.02 is lost in rounding; on a
    float32 copy it adds up. Has the parts of an ``Optimizer`` that a training
    loop uses.

    Args:
        optimizer (optim.Optimizer): Does the updates, in float32.
        model (nn.Module): Its trainable parameters are copied.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> layer.weight = mx.array([[0.02]], dtype=mx.bfloat16)
        >>> optimizer = MasterWeights(optim.SGD(1e-6), layer)
        >>> for _ in range(100):
        ...     optimizer.update(layer, {"weight": mx.array([[1.0]])})
        >>> round(optimizer.state["weights"]["weight"].item(), 4)
        0.0199
        >>> layer.weight.dtype == mx.bfloat16
        True
    """

    def __init__(self, optimizer: optim.Optimizer, model: nn.Module):
        self._optimizer = optimizer
        weights = tree_map(_as_float32, model.trainable_parameters())
        optimizer.init(weights)
        self.state: dict = {"optimizer": optimizer.state, "weights": weights}

    @property
    def learning_rate(self) -> mx.array:
        """
        The rate of the last update.

        Returns:
            mx.array: A scalar.

        Example:
            >>> MasterWeights(optim.SGD(0.5), nn.Linear(1, 1)).learning_rate.item()
            0.5
        """
        return self._optimizer.learning_rate

    def update(self, model: nn.Module, gradients: dict) -> None:
        """
        Apply the gradients to the copies and round them into the model.

        Args:
            model (nn.Module): The model that was given at the start.
            gradients (dict): A tree of gradients of its trainable parameters.

        Example:
            >>> layer = nn.Linear(1, 1)
            >>> optimizer = MasterWeights(optim.SGD(0.5), layer)
            >>> optimizer.update(layer, tree_map(mx.ones_like, layer.parameters()))
        """
        weights = self._optimizer.apply_gradients(
            tree_map(_as_float32, gradients), self.state["weights"]
        )
        self.state["weights"] = weights
        parameters = model.trainable_parameters()
        model.update(tree_map(lambda w, p: w.astype(p.dtype), weights, parameters))


def _as_float32(x):
    return x.astype(mx.float32)


def with_master_weights(
    optimizer: optim.Optimizer, model: nn.Module
) -> optim.Optimizer | MasterWeights:
    """
    Wrap the optimizer if any trained weight has fewer than 32 bits.

    Args:
        optimizer (optim.Optimizer): The run's optimizer.
        model (nn.Module): The model, with its trainable parameters set up.

    Returns:
        The optimizer itself, or a ``MasterWeights`` around it.

    Example:
        >>> optimizer = optim.SGD(0.1)
        >>> with_master_weights(optimizer, nn.Linear(1, 1)) is optimizer
        True
    """
    dtypes = {p.dtype for _, p in tree_flatten(model.trainable_parameters())}
    return optimizer if dtypes <= {mx.float32} else MasterWeights(optimizer, model)
