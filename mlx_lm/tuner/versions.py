# Copyright © 2026 MLX Contributors

"""What a run was made with."""

import platform
from importlib import metadata

import mlx.core as mx

PACKAGES = ("mlx-lm", "mlx", "transformers", "tokenizers", "numpy")


def run_versions() -> dict[str, str]:
    """
    The versions of packages and Python, and the machine.

    Returns:
        dict: Versions by name; ``platform`` and ``device`` are words.

    Example:
        >>> sorted(run_versions())[:3]
        ['device', 'mlx', 'mlx-lm']
    """
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = mx.device_info().get("device_name") if mx.metal.is_available() else None
    return versions | {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": str(device or mx.default_device()),
    }
