# Copyright © 2026 MLX Contributors

"""Another model as the reference, or a quantized copy of the start."""

from typing import Any

import mlx.nn as nn

from ..errors import InputError
from ..terminal import rprint
from .model import check_token_ids, load_model

# Small groups round less.
GROUP_SIZE = 32


def check_same_tokens(policy_tokenizer: Any, reference_tokenizer: Any) -> None:
    """Check that two models read token ids in the same way."""
    ours, theirs = policy_tokenizer.get_vocab(), reference_tokenizer.get_vocab()
    if ours == theirs:
        return
    token = min(
        (t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)),
        key=lambda t: ours.get(t, theirs.get(t)),
    )
    raise InputError(
        "The reference model's tokenizer differs from the policy's: token "
        f"{token!r} has id {theirs.get(token)} instead of {ours.get(token)}. "
        "Use a reference_model with the same tokenizer."
    )


def load_reference_model(
    path: str | None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    start: str | None = None,
    bits: int | None = None,
) -> nn.Module | None:
    """Load the separate reference model, if one is named, and quantize it if asked."""
    if path is None:
        return None
    rprint(f"Loading reference model {path}")
    model, reference_tokenizer = load_model(path, trust_remote_code)
    if tokenizer is not None:
        check_same_tokens(tokenizer, reference_tokenizer)
        check_token_ids(model, max(tokenizer.get_vocab().values()))
    if start is not None:
        model.load_weights(start, strict=False)
    if bits is not None:
        _quantize(model, bits)
    model.freeze()
    return model.eval()


def _quantize(model, bits):
    own = getattr(model, "quant_predicate", None)

    def wanted(path, module):
        fits = hasattr(module, "to_quantized")
        if not fits or module.weight.shape[-1] % GROUP_SIZE:
            return False
        return own(path, module) if own else True

    before = sum("scales" in module for module in model.modules())
    nn.quantize(model, GROUP_SIZE, bits, class_predicate=wanted)
    if before or not any("scales" in module for module in model.modules()):
        why = "is quantized already" if before else "has no layer that can be quantized"
        raise InputError(f"reference_bits: the reference {why}. Leave it out.")
