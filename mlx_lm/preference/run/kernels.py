# Copyright © 2026 MLX Contributors

"""What a GPU compiles in a run, for later runs to find."""

import time
from typing import Any

from ..device import NewKernels
from ..features import Feature
from ..terminal import rprint


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
