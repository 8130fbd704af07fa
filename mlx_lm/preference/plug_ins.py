# Copyright © 2026 MLX Contributors

"""Tables that modules fill: who looks something up never names who put it there."""

from collections.abc import Iterable
from importlib import import_module


def load(package: str, names: Iterable[str]) -> None:
    """Import a package's modules that fill its tables."""
    for name in names:
        import_module(f"{package}.{name}")
