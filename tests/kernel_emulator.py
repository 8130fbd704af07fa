# Copyright © 2026 MLX Contributors

"""Compiles the kernels' text for the CPU and runs it over whole threadgroups."""

import ctypes
import functools
import itertools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_lm.kernels.preference_logps import kernel_text

COMPILER = shutil.which("g++") if sys.platform == "linux" else None
FIBERS = Path(__file__).parent / "fixtures" / "kernel_emulator.cpp"
DTYPES = {"float32": "float", "bfloat16": "bfloat16_t", "float16": "float16_t"}
# Threads of a threadgroup and logits that a thread reads at once.
LAYOUTS = ((64, 4), (256, 8), (1024, 4))
PARTS = ("forward", "backward")
VARIANTS = list(itertools.product(PARTS, DTYPES, (True, False), LAYOUTS))
PARAMETERS = {
    "policy_logits": "const T*",
    "reference_logits": "const R*",
    "targets": "const int*",
    "mask": "const bool*",
}
FORWARD = PARAMETERS | {"scores": "float*", "statistics": "float*"}
BACKWARD = PARAMETERS | {
    "statistics": "const float*",
    "cotangents": "const float*",
    "gradient": "T*",
}


class Deadlock(Exception):
    """Lanes wait at a barrier or in a SIMD operation that others never reach."""


def bfloat16_bits(x):
    """Round float32 to bfloat16, kept as 16-bit integers."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def stored(x, dtype):
    """Return the array as the kernel gets it."""
    if dtype == "bfloat16":
        return bfloat16_bits(x)
    return np.ascontiguousarray(x, dtype=dtype)


def loaded(x):
    """Return float32 values of an array as ``stored`` makes it."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32)


def _function(index, part, dtype, dual, layout, body):
    parameters = FORWARD if part == "forward" else BACKWARD
    pointers = "".join(
        f"[[maybe_unused]] auto {name} = ({kind})arguments[{i}];\n"
        for i, (name, kind) in enumerate(parameters.items())
    )
    return (
        f"static void body_{index}() {{\n"
        f"using T = {DTYPES[dtype]}; using R = T;\n"
        f"constexpr bool DUAL = {str(dual).lower()};\n"
        f"constexpr int THREADS = {layout[0]}, BLOCK = {layout[1]};\n"
        f"{pointers}{body}}}\n"
    )


def _source(dialect, bodies, variants):
    prelude = kernel_text(dialect)
    if dialect == "cuda":
        instruction = 'asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"('
        prelude = prelude.replace(instruction, "y = exp2f((")
    functions = [
        _function(VARIANTS.index(v), *v, bodies.get(v[0]) or kernel_text(v[0]))
        for v in variants
    ]
    table = ", ".join(
        f"{{{VARIANTS.index(v)}, {{body_{VARIANTS.index(v)}, {v[3][0]}}}}}"
        for v in variants
    )
    functions.append(
        "#include <map>\nstatic Kernel select_kernel(int which) {\n"
        f"static const std::map<int, Kernel> kernels = {{{table}}};\n"
        "return kernels.at(which);\n}\n"
    )
    return "\n".join([FIBERS.read_text(), prelude, *functions])


class Emulator:
    """
    The kernels of one dialect, Metal's or CUDA's, compiled for the CPU.

    Args:
        dialect (str): Whose prelude is compiled, ``"metal"`` or ``"cuda"``.
        variants (list): Those of ``VARIANTS`` to compile.
        **bodies (str): Text that replaces a part's, to test the tests.
    """

    def __init__(self, dialect, variants=VARIANTS, **bodies):
        command = [COMPILER, "-O1", "-shared", "-fPIC", "-std=c++17", "-w"]
        command += ["-fno-strict-aliasing", "-ffp-contract=off"]
        command += ["-DCUDA"] if dialect == "cuda" else []
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
            source.write_text(_source(dialect, bodies, variants))
            command += [str(source), "-o", str(library)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                message = f"The {dialect} text does not compile:"
                raise RuntimeError(f"{message} {result.stderr[:2000]}")
            self.library = ctypes.CDLL(str(library))

    def _run(self, variant, shape, order, *arrays):
        pointers = (ctypes.c_void_p * len(arrays))(
            *(None if a is None else a.ctypes.data for a in arrays)
        )
        which = VARIANTS.index(variant)
        if self.library.run(which, pointers, (ctypes.c_int * 2)(*shape), order):
            raise Deadlock(f"{variant} of shape {shape}, order {order}")

    def forward(self, x, y, targets, mask, *, dtype, layout=LAYOUTS[0], order=0):
        """Return scores and statistics; ``y`` is None without a reference."""
        dual = y is not None
        scores = np.full((3 if dual else 1, len(x)), np.nan, np.float32)
        statistics = np.full((4 if dual else 2, len(x)), np.nan, np.float32)
        variant = ("forward", dtype, dual, layout)
        self._run(variant, x.shape, order, x, y, targets, mask, scores, statistics)
        return scores, statistics

    def backward(
        self, x, y, targets, mask, statistics, cotangents, *, dtype, layout=LAYOUTS[0]
    ):
        """Return the gradient, stored in ``dtype``."""
        gradient = np.full_like(x, 1)
        variant = ("backward", dtype, y is not None, layout)
        arrays = (x, y, targets, mask, statistics, cotangents, gradient)
        self._run(variant, x.shape, 0, *arrays)
        return gradient


@functools.cache
def emulator(dialect):
    """Compile a dialect once a process."""
    return Emulator(dialect)


def _to_numpy(x):
    if x is None:
        return None
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def emulated_logps(dialect, calls):
    """
    Functions that take the place of ``preference_logps`` and its vjp.

    Each call appends its part and whether it had a reference to ``calls``.
    """

    def run(part, arrays, backend=None, layout=None):
        name = str(arrays[0].dtype).rpartition(".")[2]
        calls.append((part, arrays[1] is not None))
        method = getattr(emulator(dialect), part)
        return method(*map(_to_numpy, arrays), dtype=name, layout=layout or LAYOUTS[0])

    def logps(*arrays, **kwargs):
        return tuple(map(mx.array, run("forward", arrays, **kwargs)))

    def logps_vjp(*arrays, **kwargs):
        gradient = mx.array(run("backward", arrays, **kwargs))
        return gradient.view(arrays[0].dtype)

    return logps, logps_vjp
