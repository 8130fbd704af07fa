# Copyright © 2026 MLX Contributors

"""The reference policy: the frozen start of the policy, or another model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from ..errors import InputError
from .parts import calls_replaced, find_trunk
from .shared import leaves


@contextmanager
def _swapped_in(model: nn.Module, parameters: dict) -> Iterator[None]:
    """Run the model with other trainable parameters, in evaluation mode."""
    current = model.trainable_parameters()
    training = model.training
    model.update(parameters)
    model.eval()
    try:
        yield
    finally:
        model.update(current)
        model.train(training)


class FrozenStart:
    """
    The policy as it started, without a second copy of the model.

    Keeps the trainable parameters (an adapter, or the unfrozen layers) of the
    moment it is made and swaps them in for a forward pass, without dropout.
    Exact for LoRA, DoRA and full fine-tuning, also from an SFT adapter.

    Args:
        policy (nn.Module): The model that will be trained. Its trainable
            parameters must be set up, see ``nn.Module.freeze``.

    Example:
        >>> policy = nn.Linear(2, 1)
        >>> reference, x = FrozenStart(policy), mx.ones((1, 2))
        >>> start = policy(x)
        >>> policy.weight = policy.weight + 1
        >>> mx.array_equal(reference(x), start).item()
        True
        >>> mx.array_equal(policy(x), start).item()
        False
    """

    def __init__(self, policy: nn.Module):
        self.policy = policy
        # Updates replace arrays and never write into them: no copy is needed.
        self.state: dict = policy.trainable_parameters()

    def __call__(self, tokens: mx.array) -> mx.array:
        with running(self) as policy:
            return policy(tokens)

    def sync(self, mixing: float) -> None:
        """
        Move the reference towards the policy as it is now.

        TR-DPO, https://arxiv.org/abs/2404.09656: ``mixing * policy +
        (1 - mixing) * reference``, in float32, for all that is trained. Compiled
        functions that got ``state`` as an input see it. Log-probs that were
        remembered are those of another model from then on.

        Args:
            mixing (float): Above 0 and at most 1, which makes the policy the
                reference.

        Raises:
            ValueError: If ``mixing`` is out of range.

        Example:
            >>> policy = nn.Linear(1, 1)
            >>> policy.bias = mx.array([1.0])
            >>> reference = FrozenStart(policy)
            >>> policy.bias = mx.array([3.0])
            >>> reference.sync(0.25)
            >>> reference.state["bias"].item()
            1.5
        """
        if not 0 < mixing <= 1:
            raise InputError(
                f"The reference's mixing must be above 0 and at most 1, got {mixing}."
            )

        def mix(start, now):
            mixed = (1 - mixing) * start.astype(mx.float32)
            return (mixed + mixing * now.astype(mx.float32)).astype(start.dtype)

        policy = self.policy.trainable_parameters()
        # In place: compiled functions hold on to the dict.
        self.state.update(tree_map(mix, self.state, policy))
        mx.eval(self.state)

    def arrays(self) -> dict[str, mx.array]:
        """
        The reference's parameters by name, for a checkpoint of a run that syncs.

        Returns:
            dict: What ``restore`` takes.

        Example:
            >>> sorted(FrozenStart(nn.Linear(1, 1)).arrays())
            ['bias', 'weight']
        """
        return dict(tree_flatten(self.state))

    def restore(self, arrays: dict[str, mx.array]) -> None:
        """
        Go back to the reference of a checkpoint, in place.

        Args:
            arrays (dict): What ``arrays`` returned; others are left alone.

        Raises:
            ValueError: If the checkpoint is of another policy.

        Example:
            >>> reference = FrozenStart(nn.Linear(1, 1))
            >>> reference.restore(reference.arrays() | {"bias": mx.array([7.0])})
            >>> reference.state["bias"].item()
            7.0
        """

        def saved(name, x):
            found = arrays.get(name)
            if found is None or found.shape != x.shape or found.dtype != x.dtype:
                raise InputError(
                    f"The checkpoint's reference has no {name} of shape {x.shape} "
                    f"and {x.dtype}: it is of another run."
                )
            return found

        self.state.update(tree_map_with_path(saved, self.state))


@contextmanager
def running(reference_model: Any) -> Iterator[Any]:
    """The reference, ready for forward passes in evaluation mode."""
    if isinstance(reference_model, FrozenStart):
        with _swapped_in(reference_model.policy, reference_model.state):
            yield reference_model.policy
        return
    training = getattr(reference_model, "training", False)
    if training:
        reference_model.eval()
    try:
        yield reference_model
    finally:
        if training:
            reference_model.train()


def frozen_layers(model: Any) -> list[nn.Module]:
    """The layers that come before everything that is trained."""
    trunk = find_trunk(model)
    if trunk is None:
        return []
    layers = model.layers
    result: list[nn.Module] = []
    trained = {id(x) for _, x in tree_flatten(model.trainable_parameters())}
    in_layers = {id(x) for l in layers for _, x in tree_flatten(l.parameters())}
    in_trunk = {id(x) for _, x in tree_flatten(trunk.parameters())}
    if trained & (in_trunk - in_layers):
        return []
    for layer in layers:
        if any(id(x) in trained for _, x in tree_flatten(layer.parameters())):
            return result
        result.append(layer)
    return result


class FrozenLayers:
    """What the frozen layers of a model returned, to be returned again."""

    def __init__(self, model: Any):
        self._layers = frozen_layers(model)
        self._outputs: list[list] = [[] for _ in self._layers]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the frozen layers return, call by call."""

        def record(outputs):
            def call(original, *args, **kwargs):
                result = original(*args, **kwargs)
                arrays = [cache.arrays for cache in leaves([args, kwargs])]
                outputs.append((result, arrays))
                return result

            return call

        calls = [(l, record(o)) for l, o in zip(self._layers, self._outputs)]
        with calls_replaced(calls):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Return what was kept, in the same order of calls."""

        def replay(outputs):
            kept = iter(outputs)

            def call(original, *args, **kwargs):
                result, arrays = next(kept)
                # Layers above may share this one's keys and values.
                for cache, values in zip(leaves([args, kwargs]), arrays):
                    cache.arrays = values
                return result

            return call

        calls = [(l, replay(o)) for l, o in zip(self._layers, self._outputs)]
        with calls_replaced(calls):
            yield
