# Copyright © 2026 MLX Contributors

"""What a GPU compiles in a run, for later runs to find."""

import os
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..features import Feature
from ..terminal import rprint


class NewKernels:
    """The kernels that MLX builds from now on, for later processes to find."""

    def __init__(self) -> None:
        folder = os.environ.get("MLX_PTX_CACHE_DIR")
        self.folder = Path(folder) if folder and mx.cuda.is_available() else None
        self._before = self._count()

    def _count(self):
        found = self.folder.rglob("*.ptx") if self.folder else ()
        return sum(1 for _ in found)

    def notice(self, seconds: float) -> str | None:
        """Say once how many were built, in at most so many seconds."""
        built = self._count() - self._before
        folder, self.folder = self.folder, None
        if not folder or not built:
            return None
        return (
            f"Built {built:,} GPU kernels within the first {seconds:.0f} s: later runs "
            f"find them in {folder}."
        )


class KernelsNotice:
    """Says once how many kernels were built."""

    def __init__(self) -> None:
        self._kernels, self._began = NewKernels(), time.perf_counter()

    def after_report(self, run: Any, it: int, metrics: dict[str, float]) -> None:
        """Say it with a run's first report."""
        built = self._kernels.notice(time.perf_counter() - self._began)
        if built and run.rank == 0:
            rprint(built)


class _Kernels(Feature):
    def parts(self, run: Any) -> dict[str, Any]:
        return {"kernels": KernelsNotice()}


FEATURE = _Kernels()
