# Copyright © 2026 MLX Contributors

"""The reference policy: the frozen start of the policy, or another model."""

from contextlib import contextmanager
from typing import Any, Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_map_with_path


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
            raise ValueError(
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
                raise ValueError(
                    f"The checkpoint's reference has no {name} of shape {x.shape} "
                    f"and {x.dtype}: it is of another run."
                )
            return found

        self.state.update(tree_map_with_path(saved, self.state))


@contextmanager
def running(reference_model: Any) -> Iterator[Any]:
    """
    The reference, ready for forward passes in evaluation mode.

    Args:
        reference_model (Callable): A ``FrozenStart``, another model, or any
            function of tokens.

    Yields:
        Callable: The model to call: the policy itself, with the parameters that
        it started with, or what was given.

    Example:
        >>> policy = nn.Linear(1, 1)
        >>> with running(FrozenStart(policy)) as model:
        ...     model is policy, model.training
        (True, False)
        >>> policy.training
        True
    """
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


def check_same_tokens(policy_tokenizer: Any, reference_tokenizer: Any) -> None:
    """
    Check that two models read token ids in the same way.

    Args:
        policy_tokenizer: The policy's tokenizer, with ``get_vocab()``.
        reference_tokenizer: The reference model's tokenizer.

    Raises:
        ValueError: If a token is missing or has another id; the message names
            the first one.

    Example:
        >>> from types import SimpleNamespace
        >>> a = SimpleNamespace(get_vocab=lambda: {"x": 0, "y": 1})
        >>> b = SimpleNamespace(get_vocab=lambda: {"x": 0, "y": 2})
        >>> check_same_tokens(a, b)
        Traceback (most recent call last):
        ...
        ValueError: The reference model's tokenizer differs from the policy's: \
token 'y' has id 2 instead of 1. Use a reference_model with the same tokenizer.
    """
    ours, theirs = policy_tokenizer.get_vocab(), reference_tokenizer.get_vocab()
    if ours == theirs:
        return
    token = min(
        (t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)),
        key=lambda t: ours.get(t, theirs.get(t)),
    )
    raise ValueError(
        "The reference model's tokenizer differs from the policy's: token "
        f"{token!r} has id {theirs.get(token)} instead of {ours.get(token)}. "
        "Use a reference_model with the same tokenizer."
    )


def check_token_ids(model: Any, largest: int) -> None:
    """
    Check that a model has a logit for every token id in use.

    Args:
        model (nn.Module): The policy or the reference model.
        largest (int): The largest token id.

    Raises:
        ValueError: If the model's vocabulary ends before it.

    Example:
        >>> model = lambda tokens: mx.zeros((*tokens.shape, 8))
        >>> check_token_ids(model, 8)
        Traceback (most recent call last):
        ...
        ValueError: Token id 8 is outside of the model's vocabulary of 8 tokens: \
its tokenizer belongs to another model.
    """
    width = model(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]
    if largest >= width:
        raise ValueError(
            f"Token id {largest} is outside of the model's vocabulary of {width} "
            "tokens: its tokenizer belongs to another model."
        )
