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

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
INPUTS = ["policy_logits", "reference_logits", "targets", "mask"]
# Threads of a threadgroup, and logits that a thread reads at once. Any Metal
# pipeline takes 256 threads; how many more it takes depends on its registers.
LAYOUTS = {"metal": (256, 4), "cuda": (256, 8)}


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
    # CUDA keeps compiled kernels on disk under their name alone.
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


def _run(backend, part, arrays, shapes, dtypes, layout):
    policy_logits, reference_logits, targets, mask, *rest = arrays
    dual = reference_logits is not None
    other = reference_logits if dual else policy_logits  # else never read
    threads, block = layout or LAYOUTS[backend]
    template = {"T": policy_logits.dtype, "R": other.dtype, "DUAL": dual}
    template |= {"THREADS": threads, "BLOCK": block}
    return _build(backend, part)(
        inputs=[policy_logits, other, targets, mask, *rest],
        template=list(template.items()),
        grid=(policy_logits.shape[0] * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
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
