# Copyright © 2026 MLX Contributors

"""A name for the function that a model computes."""

from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..._version import __version__
from ...models.afm7 import FusedLoRALinear
from ...tuner.dora import DoRAEmbedding, DoRALinear
from ...tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from ..digest import digest
from ..forward.dropout import KeyedDropout
from ..forward.frozen import adds_nothing

# Changes when fingerprints are made in another way.
FORMAT = "mlx_lm.model_fingerprint.3"
DORA = (DoRALinear, DoRAEmbedding)
ADAPTERS = (LoRALinear, LoRASwitchLinear, LoRAEmbedding, FusedLoRALinear, *DORA)
DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d, KeyedDropout)


def _without_effect(adapter):
    """Whether an adapter computes what its inner layer does."""
    if not adds_nothing(adapter):
        return False
    if not isinstance(adapter, DORA):
        return True
    is_linear = isinstance(adapter, DoRALinear)
    weight = adapter._dequantized_weight() if is_linear else adapter.embedding.weight
    # In the precision in which the adapter computes the norm it divides by.
    weight = weight + mx.zeros((1, 1), dtype=adapter.lora_b.dtype)
    return mx.array_equal(adapter.m, mx.linalg.norm(weight, axis=1)).item()


@cache
def _code(cls):
    """The content of the file that a module's class comes from."""
    # Not of its call, which may be replaced for a while.
    made = getattr(cls.__init__, "__code__", None)
    file = Path(made.co_filename if made else "")
    return file.read_bytes() if file.is_file() else b""


def _tree(value):
    """All that decides what a module computes: settings, arrays, modules."""
    # The reference runs in evaluation mode.
    if isinstance(value, DROPOUTS):
        return None
    if isinstance(value, nn.Module):
        if isinstance(value, ADAPTERS) and _without_effect(value):
            value = value.linear if "linear" in value else value.embedding
        kept = vars(value).keys() - {"_no_grad", "_training"}
        settings = {key: vars(value)[key] for key in kept}
        # Not the module's path: code that comes with a model may lie anywhere.
        code = _code(type(value))
        return [type(value).__name__, code, settings, _tree(dict(value))]
    if isinstance(value, dict):
        return {key: _tree(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(_tree, value))
    return value


def model_fingerprint(model: nn.Module) -> str:
    """Name the function that a model computes: weights, settings, code and device."""
    device = "metal" if mx.metal.is_available() else "cuda"
    device = "cpu" if mx.default_device() == mx.cpu else device
    # What the patch adds to the version is no part of a model.
    versions = [mx.__version__, __version__.partition("+")[0]]
    return digest(FORMAT, device, versions, _tree(model), size=32)


def variant_fingerprint(fingerprint: str, variant: str = "") -> str:
    """Name what is computed from a model in another way than usual."""
    return digest(fingerprint, variant, size=32) if variant else fingerprint
