# Copyright © 2026 MLX Contributors

"""Kernels built by CUDA's compiler from their own text alone.

``mx.fast.cuda_kernel`` puts MLX's and CUDA's headers before a text and keeps nothing of
what it builds: more than a second a kernel, in every process. Without a header it is a
tenth of that.
"""

import ctypes
import os
from contextlib import suppress
from functools import lru_cache

import mlx.core as mx

# The first cards with an instruction that rounds to bfloat16.
OLDEST = 80


@lru_cache
def _compiler() -> ctypes.CDLL | None:
    # The one that MLX has loaded, and no newer one, which the driver may not know.
    for version in (13, 12):
        with suppress(OSError, AttributeError):
            return ctypes.CDLL(f"libnvrtc.so.{version}", mode=os.RTLD_NOLOAD)
    return None


def card() -> int | None:
    """The kind of the default GPU, such as 90, if kernels can be built for it."""
    name = str(mx.device_info(mx.gpu).get("architecture", "")).removeprefix("sm_")
    kind = int(name) if name.isdigit() else 0
    return kind if kind >= OLDEST else None


def build(text: str, kind: int) -> bytes | None:
    """Machine code of a text for a kind of card, or None if that fails."""
    compiler = _compiler()
    if compiler is None:
        return None
    at, program, size = ctypes.byref, ctypes.c_void_p(), ctypes.c_size_t()
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture=sm_{kind}".encode())
    if compiler.nvrtcCreateProgram(at(program), text.encode(), None, 0, None, None):
        return None
    try:
        if compiler.nvrtcCompileProgram(program, 1, options):
            return None
        compiler.nvrtcGetCUBINSize(program, at(size))
        code = ctypes.create_string_buffer(size.value)
        compiler.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        compiler.nvrtcDestroyProgram(at(program))
