# Copyright © 2026 MLX Contributors

"""Find a BLAS with which MLX's CPU products on Linux are 35 times faster."""

import platform
from pathlib import Path

import mlx.core as mx

INSTALL = "apt-get install libopenblas0-pthread"
PATTERNS = (
    "/usr/lib/*/openblas-pthread/libblas.so.3",
    "/usr/lib/*/openblas-openmp/libblas.so.3",
    "/usr/lib64/libopenblasp.so.0",
    "/usr/lib64/libopenblas.so.0",
    "/usr/lib/libopenblas.so",
)


def find_openblas() -> Path | None:
    """
    Find an OpenBLAS on Linux that can be put before the reference BLAS.

    Returns:
        Path: The library for ``LD_PRELOAD``, or None if there is none.

    Example:
        >>> path = find_openblas()
        >>> path is None or path.exists()
        True
    """
    if platform.system() != "Linux":
        return None
    for pattern in PATTERNS:
        if found := sorted(Path("/").glob(pattern.lstrip("/"))):
            return found[0]
    return None


def slow_blas_notice(maps: str | None = None) -> str | None:
    """
    Say in one line how to get a fast BLAS, if this process has none.

    Args:
        maps (str, optional): What the process has loaded, as Linux lists it.
            Default: this process.

    Returns:
        str: The line, or None if nothing needs to be done.

    Example:
        >>> slow_blas_notice("/usr/lib/x/openblas-pthread/libblas.so.3") is None
        True
    """
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
