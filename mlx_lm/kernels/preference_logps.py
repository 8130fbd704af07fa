# Copyright © 2026 MLX Contributors

"""Log-probs of tokens under two models and their exact KL, in one pass.

The bodies, ``preference_logps_forward.h`` and ``_backward.h``, are written once
in Metal's words. Metal takes them as they are, CUDA behind a prelude.
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Callable

import mlx.core as mx

from . import nvrtc

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
INPUTS = ["policy_logits", "reference_logits", "targets", "mask"]
# Threads of a threadgroup, and logits that a thread reads at once. Any Metal
# pipeline takes 256 threads; how many more it takes depends on its registers.
LAYOUTS = {"metal": (256, 4), "cuda": (256, 8)}
# What CUDA calls the types, and the arrays that the two bodies differ in.
TYPES = {mx.float32: "float", mx.bfloat16: "bfloat16", mx.float16: "float16"}
CUDA_ARRAYS = {
    "forward": "float* scores, float* statistics",
    "backward": "const float* statistics, const float* cotangents, T* gradient",
}


def kernel_text(part: str) -> str:
    """Read a part of the kernels' text."""
    path = Path(__file__).with_name(f"preference_logps_{part}.h")
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line.partition("//")[0].rstrip() for line in lines) + "\n"


def preference_backend() -> str | None:
    """The backend that runs the kernels on the default device, at this moment."""
    if mx.default_device() != mx.gpu:
        return None
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else None


@lru_cache
def _build(backend: str, part: str) -> Callable[..., list[mx.array]]:
    header, source = kernel_text(backend), kernel_text(part)
    # CUDA keeps what it has compiled under its name alone.
    digest = hashlib.sha256((header + source).encode()).hexdigest()[:12]
    backward = part == "backward"
    # CUDA's factory raises where there is no CUDA, so none is called at import.
    return getattr(mx.fast, f"{backend}_kernel")(
        name=f"preference_logps_{part}_{digest}",
        input_names=INPUTS + (["statistics", "cotangents"] if backward else []),
        output_names=["gradient"] if backward else ["scores", "statistics"],
        header=header,
        source=source,
    )


def cuda_text(part: str, template: tuple[tuple, ...]) -> tuple[str, str]:
    """The name and the whole text of a kernel, for one choice of its template."""
    given = dict(template)
    lines = [f"using {k} = {TYPES[given.pop(k)]};" for k in ("T", "R")]
    lines += [f"constexpr int {k} = {int(value)};" for k, value in given.items()]
    before = "\n".join([kernel_text("types"), *lines, kernel_text("cuda")])
    body = kernel_text(part)
    digest = hashlib.sha256((before + body).encode()).hexdigest()[:12]
    name = f"preference_logps_{part}_{digest}"
    arrays = [
        "const T* policy_logits, const R* reference_logits",
        f"const int* targets, const bool* mask, {CUDA_ARRAYS[part]}",
    ]
    start = f'extern "C" __global__ void {name}({", ".join(arrays)}, int N, int V) {{'
    shape = "const int policy_logits_shape[] = {N, V};"
    return name, "\n".join([before, start, shape, body, "}"])


@lru_cache
def _built(part: str, template: tuple[tuple, ...]) -> tuple[str, bytes] | None:
    """A kernel that CUDA's compiler has built, where it can."""
    kind = nvrtc.card()
    if kind is None:
        return None
    name, text = cuda_text(part, template)
    code = nvrtc.build(text, kind)
    return (name, code) if code else None


def _run(backend, part, arrays, shapes, dtypes, layout):
    policy_logits, reference_logits, targets, mask, *rest = arrays
    dual = reference_logits is not None
    other = reference_logits if dual else policy_logits  # else never read
    threads, block = layout or LAYOUTS[backend]
    template = {"T": policy_logits.dtype, "R": other.dtype, "DUAL": dual}
    template |= {"THREADS": threads, "BLOCK": block}
    inputs = [policy_logits, other, targets, mask, *rest]
    options = {
        "grid": (policy_logits.shape[0] * threads, 1, 1),
        "threadgroup": (threads, 1, 1),
        "output_shapes": shapes,
        "output_dtypes": dtypes,
    }
    built = backend == "cuda" and _built(part, tuple(template.items()))
    if not built:
        build, chosen = _build(backend, part), list(template.items())
        return build(inputs=inputs, template=chosen, **options)
    return mx.fast.precompiled_cuda_kernel(
        name=built[0],
        compiled_source=built[1],
        inputs=inputs,
        scalars=list(policy_logits.shape),
        ensure_row_contiguous=True,
        **options,
    )


def preference_logps(
    policy_logits: mx.array,
    reference_logits: mx.array | None,
    targets: mx.array,
    mask: mx.array,
    *,
    backend: str,
    layout: tuple[int, int] | None = None,
) -> tuple[mx.array, mx.array]:
    """Score every token in one read of each logit."""
    arrays = [policy_logits, reference_logits, targets, mask]
    parts, N = 1 if reference_logits is None else 3, policy_logits.shape[0]
    shapes, dtypes = [(parts, N), (parts + 1, N)], [mx.float32, mx.float32]
    scores, statistics = _run(backend, "forward", arrays, shapes, dtypes, layout)
    return scores, statistics


def preference_logps_vjp(
    policy_logits: mx.array,
    reference_logits: mx.array | None,
    targets: mx.array,
    mask: mx.array,
    statistics: mx.array,
    cotangents: mx.array,
    *,
    backend: str,
    layout: tuple[int, int] | None = None,
) -> mx.array:
    """The gradient of ``preference_logps`` with respect to the policy's logits."""
    arrays = [policy_logits, reference_logits, targets, mask, statistics, cotangents]
    shapes, dtypes = [policy_logits.shape], [policy_logits.dtype]
    return _run(backend, "backward", arrays, shapes, dtypes, layout)[0]
