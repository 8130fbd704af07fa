# Copyright © 2026 MLX Contributors

"""A name for the function that a model computes."""

import hashlib
from dataclasses import is_dataclass
from functools import cache
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ...models.afm7 import FusedLoRALinear
from ...tuner.dora import DoRAEmbedding, DoRALinear
from ...tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from ..forward.recompute import KeyedDropout

# Changes when fingerprints are made in another way.
FORMAT = "mlx_lm.model_fingerprint.1"
ROW_WORDS = 2**16
DORA = (DoRALinear, DoRAEmbedding)
ADAPTERS = (LoRALinear, LoRASwitchLinear, LoRAEmbedding, FusedLoRALinear, *DORA)
# The reference runs in evaluation mode.
DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d, KeyedDropout)


@cache
def _multipliers():
    """Two rows of random odd numbers; PCG64's stream is the same everywhere."""
    numbers = np.random.PCG64(0).random_raw(2 * ROW_WORDS) | np.uint64(1)
    return mx.array(numbers).reshape(2, ROW_WORDS)


def _row_sums(words):
    """Two weighted sums modulo 2^64 of each row, as bytes."""
    first, second = _multipliers()[:, : words.shape[1]]
    # The top bits of a word weigh little in the first sum: the second has them low.
    mixed = words ^ (words >> mx.array(32, dtype=mx.uint64))
    sums = [(words * first).sum(axis=1), (mixed * second).sum(axis=1)]
    return np.array(mx.stack(sums, axis=1)).tobytes()


def _checksums(tensor):
    """Yield checksums of a tensor's bits, computed where the tensor is."""
    flat = tensor.reshape(-1)
    # What fits into the caches of a CPU keeps a GPU waiting for the host.
    rows = 8 if mx.default_device() == mx.cpu else 64
    step = rows * ROW_WORDS * 8 // tensor.itemsize
    for start in range(0, flat.size, step):
        part = flat[start : start + step]
        words = -(-part.nbytes // 8)
        # A slice may begin between two words; its copy, made longer, does not.
        room = (8 * (words + 1) - part.nbytes) // tensor.itemsize
        part = mx.concatenate([part, mx.zeros((room,), dtype=tensor.dtype)])
        part = part.view(mx.uint64)[:words]
        full = words // ROW_WORDS * ROW_WORDS
        if full:
            yield _row_sums(part[:full].reshape(-1, ROW_WORDS))
        if full < words:
            yield _row_sums(part[full:].reshape(1, -1))


def _without_effect(adapter):
    """Whether an adapter computes what its inner layer does."""
    if any(b.any().item() for _, b in tree_flatten({"b": adapter.lora_b})):
        return False
    if not isinstance(adapter, DORA):
        return True
    is_linear = isinstance(adapter, DoRALinear)
    weight = adapter._dequantized_weight() if is_linear else adapter.embedding.weight
    # In the precision in which the adapter computes the norm it divides by.
    weight = weight + mx.zeros((1, 1), dtype=adapter.lora_b.dtype)
    return mx.array_equal(adapter.m, mx.linalg.norm(weight, axis=1)).item()


def _plain(value):
    """A setting as text that is the same in every process."""
    if isinstance(value, dict):
        items = sorted((str(k), _plain(v)) for k, v in value.items())
        return "{" + ", ".join(f"{k}: {v}" for k, v in items) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, (set, frozenset)):
        return _plain(sorted(map(_plain, value)))
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return repr(value)
    if isinstance(value, mx.Dtype):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, SimpleNamespace) or is_dataclass(value):
        return name + _plain(vars(value))
    return name


def _describe(name, value):
    """Yield (name, setting or array) of all that decides what a module computes."""
    if isinstance(value, DROPOUTS):
        return
    if isinstance(value, mx.array):
        yield name, value
        return
    if isinstance(value, nn.Module):
        if isinstance(value, ADAPTERS) and _without_effect(value):
            value = value.linear if "linear" in value else value.embedding
        settings = dict(vars(value))
        for key in ("_no_grad", "_training"):
            settings.pop(key, None)
        # Not the module's path: code that comes with a model may lie anywhere.
        yield name, type(value).__name__ + _plain(settings)
    if isinstance(value, dict):
        named = [(str(key), child) for key, child in value.items()]
        children = sorted(named, key=lambda item: item[0])
    elif isinstance(value, (list, tuple)):
        children = [(str(i), child) for i, child in enumerate(value)]
    else:
        yield name, _plain(value)
        return
    for key, child in children:
        yield from _describe(f"{name}.{key}", child)


def model_fingerprint(model: nn.Module) -> str:
    """Name the function that a model computes: its weights, settings and device."""
    device = "metal" if mx.metal.is_available() else "cuda"
    device = "cpu" if mx.default_device() == mx.cpu else device
    digest = hashlib.sha256(f"{FORMAT} {device} {mx.__version__}".encode())
    for name, value in _describe("", model):
        is_array = isinstance(value, mx.array)
        text = f"{value.dtype} {value.shape}" if is_array else value
        digest.update(f"\n{name} {text}\n".encode())
        for checksum in _checksums(value) if is_array else ():
            digest.update(checksum)
    return digest.hexdigest()


def variant_fingerprint(fingerprint: str, variant: str = "") -> str:
    """Name what is computed from a model in another way than usual."""
    if not variant:
        return fingerprint
    return hashlib.sha256(f"{fingerprint} {variant}".encode()).hexdigest()
