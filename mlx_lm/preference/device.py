# Copyright © 2026 MLX Contributors

import os
import tempfile
from contextlib import suppress
from pathlib import Path, PurePosixPath

import mlx.core as mx


def device_memory() -> int | None:
    """The memory that a run may use on the default device."""
    # The limit can't be read without setting it.
    limit = mx.set_memory_limit(1 << 62)
    mx.set_memory_limit(limit)
    if mx.default_device() == mx.gpu:
        info = mx.device_info(mx.gpu)
        keys = ("max_recommended_working_set_size", "total_memory", "memory_size")
        total = next((int(info[key]) for key in keys if key in info), None)
    else:
        total = system_memory()
    known = [x for x in (total, limit) if x]
    return min(known) if known else None


def cache_limit(threshold: int | None) -> int:
    """How much the allocator's cache may hold between steps."""
    # Emptying it after every step costs a GPU a third of a step.
    if threshold is not None:
        return threshold
    memory = device_memory() or 0
    if mx.default_device() == mx.gpu and mx.cuda.is_available():
        # Nothing else lives there, and its allocator takes back what it lacks.
        return memory * 3 // 4
    return memory // 8


def trim_cache(limit: int) -> None:
    """Empty the allocator's cache if it holds too much."""
    if mx.get_cache_memory() > limit:
        mx.clear_cache()


def system_memory(root: Path = Path("/")) -> int | None:
    """What is free on Linux and what MLX holds already; else all there is."""
    with suppress(OSError, StopIteration, ValueError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(x for x in lines if x.startswith("MemAvailable"))
        left = *_left_by_groups(root), *_left_by_limits(root)
        free = min([int(free.split()[1]) * 1024, *left])
        return max(free, 0) + mx.get_active_memory() + mx.get_cache_memory()
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


# Linux' control groups: in whose place they lie, limit, use, and files in memory.
CGROUPS = {
    "": ("", "memory.max", "memory.current", ""),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


def _left_by_groups(root):
    """What each control group around this process, such as a container's, leaves."""
    groups = []
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        groups = [line.split(":", 2)[1:] for line in lines]
    for controllers, path in groups:
        key = "memory" if "memory" in controllers.split(",") else controllers
        mount, limit, usage, prefix = CGROUPS.get(key, CGROUPS[""])
        # A container may read the host's path here, where it has but the root.
        for folder in (PurePosixPath(path), *PurePosixPath(path).parents):
            folder = root / "sys/fs/cgroup" / mount / str(folder).lstrip("/")
            # Without a limit there is no file, or "max" in it.
            with suppress(OSError, ValueError):
                left = int((folder / limit).read_text())
                left -= int((folder / usage).read_text())
                stat = (folder / "memory.stat").read_text().splitlines()
                sizes = dict(line.split() for line in stat)
                # Files that were read make room when memory gets short.
                for name in ("active_file", "inactive_file"):
                    left += int(sizes.get(prefix + name, 0))
                yield left


def _left_by_limits(root):
    """What ulimit leaves of this process's address space and of its data."""
    names = ("Max address space", "VmSize:"), ("Max data size", "VmData:")
    with suppress(OSError):
        limits = (root / "proc/self/limits").read_text().splitlines()
        status = (root / "proc/self/status").read_text().splitlines()
        for limit, used in names:
            most = next((x for x in limits if x.startswith(limit)), limit)
            now = next((x for x in status if x.startswith(used)), used)
            # Without a limit it says "unlimited".
            with suppress(ValueError, IndexError):
                soft = int(most.removeprefix(limit).split()[0])
                yield soft - int(now.split()[1]) * 1024


def prepare_backend(kernels: Path) -> None:
    """Set what MLX's backend reads from the environment, where the user has not."""
    # Each is read once, when the first array is computed.
    settings = {
        # MLX on CUDA counts what its caches missed in a whole process and ends it
        # when many lengths, tests and answers have added up.
        "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
        # A graph is built anew for nearly every batch of another shape. Without them
        # the operations alone bound what one task holds on to: ten are a tenth slower,
        # thirty take a sixth more memory.
        "MLX_USE_CUDA_GRAPHS": "0",
        "MLX_MAX_OPS_PER_BUFFER": "20",
        # Built kernels outlast the temporary folder.
        "MLX_PTX_CACHE_DIR": str(kernels),
    }
    if not mx.cuda.is_available():
        # Metal reads the limit too, and has its own by the chip.
        del settings["MLX_MAX_OPS_PER_BUFFER"]
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    # MLX builds its kernels there, and ends where the variable leads nowhere.
    with suppress(OSError):
        os.environ["TMPDIR"] = tempfile.gettempdir()


def compiles(wanted: bool | None = None) -> bool:
    """Tell whether a run's steps are compiled."""
    return mx.default_device() == mx.gpu if wanted is None else wanted
