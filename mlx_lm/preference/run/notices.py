# Copyright © 2026 MLX Contributors

"""What slows a run down on this machine, said once."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..features import Feature
from ..terminal import rprint

INSTALL = "apt-get install libopenblas0-pthread"
PATTERNS = (
    "/usr/lib/*/openblas-pthread/libblas.so.3",
    "/usr/lib/*/openblas-openmp/libblas.so.3",
    "/usr/lib64/libopenblasp.so.0",
    "/usr/lib64/libopenblas.so.0",
    "/usr/lib/libopenblas.so",
)


def find_openblas() -> Path | None:
    """Find an OpenBLAS on Linux that can be put before the reference BLAS."""
    if platform.system() != "Linux":
        return None
    found = (p for name in PATTERNS for p in sorted(Path("/").glob(name[1:])))
    return next(found, None)


def slow_blas_notice(maps: str | None = None) -> str | None:
    """Say in one line how to get a fast BLAS, if this process has none."""
    if platform.system() != "Linux" or mx.default_device() != mx.cpu:
        return None
    if maps is None:
        maps = Path("/proc/self/maps").read_text()
    fast = ("/openblas-", "/libopenblas", "/libmkl_rt", "/libblis")
    if any(name in maps for name in fast):
        return None
    if (path := find_openblas()) is not None:
        return f"MLX runs on a slow BLAS: start with LD_PRELOAD={path}"
    return (
        f"MLX runs on a slow BLAS: {INSTALL}, then set LD_PRELOAD to its libblas.so.3"
    )


def slow_dtype_notice(model: nn.Module) -> str | None:
    """Say in one line that 16-bit weights do badly on MLX's CPU backend."""
    dtypes = {p.dtype for _, p in tree_flatten(model.parameters())}
    if mx.default_device() != mx.cpu or not dtypes & {mx.bfloat16, mx.float16}:
        return None
    return (
        "The CPU computes 16-bit models slowly and inexactly: use "
        "mlx_lm.convert --dtype float32 first."
    )


class _Notices(Feature):
    @contextmanager
    def around_command(self, args: Any) -> Iterator[None]:
        if (notice := slow_blas_notice()) is not None:
            rprint(f"[WARNING] {notice}")
        yield

    def after_loading(self, job: Any) -> None:
        if (notice := slow_dtype_notice(job.model)) is not None:
            rprint(f"[WARNING] {notice}")


FEATURE = _Notices()
