# Copyright © 2026 MLX Contributors

"""The reference policy: the frozen start of the policy, or another model."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..errors import InputError
from ..plug_ins import load
from .parts import calls_replaced

# What runs once the layers that policy and reference have in common, if anything.
COMMON: list[Callable[[Any, Any], Any]] = []


class FrozenStart:
    """
    The policy as it started, without a second copy of the model.

    Keeps the trainable parameters (an adapter, or the unfrozen layers) of the
    moment it is made and swaps them in for a forward pass, without dropout.
    Exact for LoRA, DoRA and full fine-tuning, also from an SFT adapter. A new
    adapter, which adds nothing yet, does not run.

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
        start = policy.trainable_parameters()
        #: The adapters that add nothing, by their names.
        self.idle: dict = _idle_adapters(policy)
        #: What runs: all of the start but the adapters that add nothing.
        self.state: dict = _without(start, self.idle)
        #: All of it before it is rounded to the model's precision, which a reference
        #: that moves a little needs: else it would be rounded back each time.
        self.exact: dict = tree_map(lambda x: x, start)
        self._dtypes = tree_map(lambda x: x.dtype, start)

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
        # In place: compiled functions hold on to the dict, and are made anew where it
        # grows by adapters that were idle.
        self.idle = {}
        rounded = tree_map(lambda x, dtype: x.astype(dtype), self.exact, self._dtypes)
        self.state.update(rounded)
        mx.eval(self.state, self.exact)


def adds_nothing(adapter: Any) -> bool:
    """Whether an adapter's own product is zero, as a new one's is."""
    return not any(b.any().item() for _, b in tree_flatten({"b": adapter.lora_b}))


def _idle_adapters(policy):
    """The adapters that return what their inner layers do, by their names."""
    # mlx_lm.tuner begins with this module.
    from ...tuner.lora import LoRALinear, LoRASwitchLinear

    kinds = LoRALinear, LoRASwitchLinear
    found = ((n, m) for n, m in policy.named_modules() if type(m) in kinds)
    return {name: adapter for name, adapter in found if adds_nothing(adapter)}


def _without(parameters, idle):
    """A tree of parameters without those of some modules."""
    kept = [
        (name, x)
        for name, x in tree_flatten(parameters)
        if name.rpartition(".")[0] not in idle
    ]
    return tree_unflatten(kept) if kept else {}


def _run_inner(adapter, _, *args, **kwargs):
    return adapter.linear(*args, **kwargs)


def _run_apart(adapter, call, x):
    # Compiling would find what is made of the weights alone to be the same as in the
    # policy's pass, and keep it until then for every layer.
    inner = adapter.linear
    weights = inner.parameters()
    inner.update(tree_map(lambda w: mx.depends(w, adapter.lora_a), weights))
    result = call(x)
    inner.update(weights)
    return result


def _adapter_calls(start):
    """What runs in the place of a start's adapters."""
    from ...tuner.dora import DoRALinear

    yield from ((x, partial(_run_inner, x)) for x in start.idle.values())
    for module in start.policy.modules():
        if type(module) is DoRALinear:
            yield module, partial(_run_apart, module)


@contextmanager
def running(reference_model: Any) -> Iterator[Any]:
    """A model, or a frozen start's policy as it was then, in evaluation mode."""
    model, current, modes = reference_model, {}, []
    calls: Iterable = ()
    if isinstance(reference_model, FrozenStart):
        model, calls = reference_model.policy, _adapter_calls(reference_model)
        current = model.trainable_parameters()
        model.update(reference_model.state)
    if isinstance(model, nn.Module):
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
    try:
        with calls_replaced(calls):
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
        and parameter_ids(reference_model.exact)
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
