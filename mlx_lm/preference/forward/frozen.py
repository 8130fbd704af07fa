# Copyright © 2026 MLX Contributors

"""The reference policy: the frozen start of the policy, or another model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..errors import InputError
from ..plug_ins import load

# What runs once the layers that policy and reference have in common, if anything.
COMMON: list[Callable[[Any, Any], Any]] = []


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
        #: The same before it is rounded to the model's precision, which a reference
        #: that moves a little needs: else it would be rounded back each time.
        self.exact: dict = tree_map(lambda x: x, self.state)

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
            return mixed + mixing * now.astype(mx.float32)

        policy = self.policy.trainable_parameters()
        self.exact.update(tree_map(mix, self.exact, policy))
        self.round()

    def round(self) -> None:
        """
        Make ``state``, which runs, of ``exact``.

        Example:
            >>> reference = FrozenStart(nn.Linear(1, 1))
            >>> reference.exact["bias"] = mx.array([2.0])
            >>> reference.round()
            >>> reference.state["bias"].item()
            2.0
        """
        # In place: compiled functions hold on to the dict.
        rounded = tree_map(lambda x, s: x.astype(s.dtype), self.exact, self.state)
        self.state.update(rounded)
        mx.eval(self.state, self.exact)


@contextmanager
def running(reference_model: Any) -> Iterator[Any]:
    """A model, or a frozen start's policy as it was then, in evaluation mode."""
    model, current, modes = reference_model, {}, []
    if isinstance(reference_model, FrozenStart):
        model = reference_model.policy
        current = model.trainable_parameters()
        model.update(reference_model.state)
    if isinstance(model, nn.Module):
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
    try:
        yield model
    finally:
        if current:
            model.update(current)
        for module, mode in modes:
            module._set_training_mode(mode)


def is_start(reference_model: Any, policy: Any) -> bool:
    """Whether a reference is the policy itself, which has not moved yet."""
    return (
        isinstance(reference_model, FrozenStart)
        and reference_model.policy is policy
        and parameter_ids(reference_model.state)
        == parameter_ids(policy.trainable_parameters())
    )


def parameter_ids(parameters: Any) -> set[int]:
    """The arrays of a tree, to be found again in another one."""
    return {id(x) for _, x in tree_flatten(parameters)}


class Apart:
    """Policy and reference that run whole, each by itself."""

    recording = replaying = staticmethod(nullcontext)


def common_layers(policy: Any, reference: Any) -> Any:
    """What records the reference's pass, and replays its part of the policy's."""
    return COMMON[-1](policy, reference) if COMMON else Apart()


# It adds to the list.
PLUG_INS = ("common",)
load(__package__, PLUG_INS)
