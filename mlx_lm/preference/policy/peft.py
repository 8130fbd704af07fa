# Copyright © 2026 MLX Contributors

"""Adapters of PEFT, the library of transformers: read as a start, and written."""

import math
import re
import stat
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import InputError
from ..features import Feature
from ..files import check_plain, replace_file, write_json, writing
from ..setting import Setting
from ..terminal import rprint
from .adapter import (
    ADAPTER,
    CONFIG,
    OTHERS,
    PEFT_ADAPTER,
    adapter_config,
    read_tensors,
)

PEFT_FOLDER = "peft"
PREFIX = "base_model.model."
# Our name of a tensor, and PEFT's.
_LEAVES = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "m": "lora_magnitude_vector",
}
_MERGE = "Merge it into its model with PEFT's merge_and_unload, and start from that."
# What else a LoraConfig says that has no part in what the adapter computes.
_SILENT = """
task_type peft_type auto_mapping peft_version base_model_name_or_path revision
inference_mode runtime_config megatron_core qalora_group_size ensure_weight_tying
fan_in_fan_out eva_config corda_config lora_ga_config loftq_config
""".split()
# These are read, or follow from the tensors' names.
_READ = """
r lora_alpha lora_dropout use_rslora use_dora init_lora_weights bias
target_modules exclude_modules layers_to_transform layers_pattern
""".split()
# Where both have the same names: routers are no linear layers for transformers.
_SAME_NAMES = re.compile(r"model\.layers\.\d+\.(?!.*\b(gate|router)\b)|lm_head\.")
# Other ways to begin take their part out of the model's own weights.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


def own_shape(path: Path, config: dict[str, Any] | None) -> dict[str, Any]:
    """The settings of mlx_lm.dpo that make the layers of a PEFT adapter."""
    if config is None:
        raise InputError(
            f"{path} has no adapter_config.json beside it, which holds its lora_alpha: "
            "copy the whole folder."
        )
    _check_config(path, config)
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    modules = _modules(own_tensors(read_tensors(path), path))
    listed = not isinstance(config.get("target_modules"), str)
    listed |= config.get("target_modules") == "all-linear"
    chosen = ("exclude_modules", "layers_to_transform")
    if listed and not any(config.get(key) not in (None, []) for key in chosen):
        # The same in every layer: the layers' own names, as mlx-lm has them.
        modules = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in modules})
    dropout = config.get("lora_dropout", 0.0)
    return {
        "fine_tune_type": "dora" if config.get("use_dora") else "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": float(dropout),
            "keys": modules,
        },
    }


def _modules(tensors):
    return sorted({name.rpartition(".")[0] for name in tensors})


def _check_config(path, config):
    where = path.parent / CONFIG
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{where}: only PEFT's LORA can be a start, this is "
            f"{config.get('peft_type')!r}. {_MERGE}"
        )
    given = {k: v for k, v in config.items() if k not in (*_SILENT, *_READ)}
    if config.get("bias", "none") != "none":
        given["bias"] = config["bias"]
    if config.get("init_lora_weights") not in _BEGINNINGS:
        given["init_lora_weights"] = config["init_lora_weights"]
    for key, value in given.items():
        if value:
            raise InputError(
                f"{where}: mlx-lm's adapters have nothing for {key} {value!r}. {_MERGE}"
            )
    kinds = {"r": int, "lora_alpha": (int, float), "lora_dropout": (int, float)}
    for key, kind in kinds.items():
        value = config.get(key, 1)
        good = isinstance(value, kind) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or (key == "r" and value < 1):
            raise InputError(f"{where}: {key} is {value!r}. Copy it again.")


def own_tensors(tensors: dict[str, mx.array], path: str | Path) -> dict[str, mx.array]:
    """PEFT's tensors, named and turned as mlx-lm's layers have them."""
    ours = {theirs: leaf for leaf, theirs in _LEAVES.items()}
    ours["lora_magnitude_vector.weight"] = "m"
    ends = "|".join(map(re.escape, ours))
    found = {}
    for name, w in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.({ends})", name)
        if match is None or w.ndim != (1 if ours[match[2]] == "m" else 2):
            raise InputError(
                f"{path}: tensor {name!r} is no part of a LoRA on a linear layer. "
                f"{_MERGE}"
            )
        leaf = ours[match[2]]
        found[f"{match[1]}.{leaf}"] = w if leaf == "m" else w.T
    return found


def fitted_names(
    tensors: dict[str, mx.array], known: Collection[str]
) -> dict[str, mx.array]:
    """Tensors under a model's own names, which differ before the number of a layer."""
    in_layer = lambda name: re.sub(r"^.*?\.(?=\d+\.)", "", name)
    places = {in_layer(name): name for name in known}
    fitted = {}
    for name, w in tensors.items():
        name = name if name in known else places.get(in_layer(name), name)
        if name in fitted:
            raise InputError(f"Two tensors of the adapter are for {name!r}.")
        fitted[name] = w
    return fitted


def save_peft(
    adapter_path: str | Path, folder: str | Path, base_model: str | None = None
) -> None:
    """
    Write an adapter of mlx-lm as a folder that transformers and PEFT load.

    PEFT computes ``x W^T + lora_alpha / r * x A^T B^T`` where mlx-lm has
    ``x W^T + scale * x a b``: ``A = a^T``, ``B = b^T`` and ``lora_alpha = scale * r``,
    with DoRA's magnitude as it is.

    Paper: https://arxiv.org/abs/2106.09685 (LoRA), https://arxiv.org/abs/2402.09353
    (DoRA).

    Args:
        adapter_path (str): A folder with ``adapters.safetensors`` and
            ``adapter_config.json``, as ``mlx_lm.dpo`` and ``mlx_lm.lora`` write it.
        folder (str): Where ``adapter_model.safetensors`` and PEFT's
            ``adapter_config.json`` are written.
        base_model (str, optional): The model's name for transformers. Default: the
            one that the adapter was trained on.

    Raises:
        mlx_lm.preference.errors.InputError: If the adapter is no LoRA or DoRA of
            linear layers, transformers names the layers otherwise, or the folder
            can't be written.

    Example:
        >>> save_peft("nowhere", "peft")
        Traceback (most recent call last):
        ...
        mlx_lm.preference.errors.InputError: nowhere has no adapter_config.json: name an adapter's folder.
    """
    adapter_path, folder = Path(adapter_path), Path(folder)
    if folder.resolve() == adapter_path.resolve():
        raise InputError(f"{folder} holds the adapter itself: name another folder.")
    config = adapter_config(adapter_path)
    if config is None:
        raise InputError(f"{adapter_path} has no {CONFIG}: name an adapter's folder.")
    if (kind := config.get("fine_tune_type", "lora")) not in ("lora", "dora"):
        raise InputError(
            f"PEFT has adapters only, and {adapter_path} holds whole layers "
            f"(fine_tune_type {kind}): use mlx_lm.fuse."
        )
    tensors = read_tensors(adapter_path / ADAPTER)
    theirs = {_their_name(name, w, adapter_path): w for name, w in tensors.items()}
    theirs = {k: mx.contiguous(w.T) for k, w in theirs.items()}
    shape = config["lora_parameters"]
    alpha = shape["scale"] * shape["rank"]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    file = folder / PEFT_ADAPTER
    with writing(file):
        replace_file(
            file, lambda name: mx.save_safetensors(name, theirs, {"format": "pt"})
        )
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model or config.get("model"),
            "r": shape["rank"],
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": shape["dropout"],
            "use_dora": kind == "dora",
            "bias": "none",
            "inference_mode": True,
            **_their_targets(tensors, config),
        },
        indent=2,
    )


def _their_name(name, w, where):
    """PEFT's name of a tensor, for layers that transformers names as mlx-lm does."""
    module, _, leaf = name.rpartition(".")
    if (
        not _SAME_NAMES.match(name)
        or w.ndim != (1 if leaf == "m" else 2)
        or leaf not in _LEAVES
    ):
        raise InputError(
            f"{where} can't be written for PEFT, which has no place, or another name, "
            f"for {name!r}: name linear layers in lora_parameters.keys, or use "
            "mlx_lm.fuse."
        )
    return f"{PREFIX}{module}.{_LEAVES[leaf]}"


def _their_targets(tensors, config):
    """Which layers a LoraConfig names: by their ends, if all of them have the same."""
    modules, layers = _modules(tensors), {}
    for name in modules:
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
            layers.setdefault(int(match[1]), []).append(match[2])
    same = next(iter(layers.values()), [])
    count = sum(names == same for names in layers.values()) * len(same)
    if count < len(modules):
        return {"target_modules": modules}
    # mlx-lm counts from the last layer: the first is only there where all are.
    keys = config["lora_parameters"].get("keys") or []
    if min(layers) == 0 and not set(keys) & set(modules):
        return {"target_modules": same}
    return {"target_modules": same, "layers_to_transform": sorted(layers)}


class PeftAdapters:
    """PEFT's adapters, among those that a run may start from."""

    def shape(self, path: Path, config: dict | None) -> dict[str, Any] | None:
        """The settings that make the layers of its adapter, if this is one."""
        is_one = path.name == PEFT_ADAPTER or "peft_type" in (config or {})
        return own_shape(path, config) if is_one else None

    def weights(
        self, tensors: dict[str, mx.array], path: str | Path, known: Collection[str]
    ) -> dict[str, mx.array] | None:
        """Its tensors under a model's own names, if these are such."""
        is_one = any(name.startswith(PREFIX) for name in tensors)
        return fitted_names(own_tensors(tensors, path), known) if is_one else None


OTHERS.append(PeftAdapters())


class _Peft(Feature):
    def settings(self) -> dict[str, Iterable[Setting]]:
        what = (
            "Write the adapter for transformers and PEFT too, as adapter_path/peft; "
            "alone: that of a finished run."
        )
        return {
            "What to do": [Setting("peft", False, what, resume="free", per_rank=True)]
        }

    def check(self, args: Any) -> None:
        if args.peft and (not args.adapter_path or args.fine_tune_type == "full"):
            raise InputError(
                "peft writes a LoRA or DoRA of adapter_path: there is none."
            )

    def takes_over(self, args: Any) -> bool:
        alone = not (args.train or args.test or args.inspect or args.resume)
        if args.peft and alone:
            _export(args.adapter_path)
        return bool(args.peft and alone)

    def before_weights(self, job: Any) -> None:
        if job.args.peft:
            for name, w in tree_flatten(job.model.trainable_parameters()):
                _their_name(name, w, "This adapter")

    def before_folder(self, job: Any) -> None:
        _check_folder(job.args.adapter_path)

    def clear_folder(self, job: Any) -> None:
        # An earlier run's would be taken for this one's.
        if job.state is None:
            for name in (PEFT_ADAPTER, CONFIG):
                folder = Path(job.args.adapter_path) / PEFT_FOLDER
                (folder / name).unlink(missing_ok=True)

    def finish(self, job: Any) -> None:
        if job.args.peft:
            _export(job.args.adapter_path)


def _check_folder(adapter_path):
    folder = Path(adapter_path) / PEFT_FOLDER
    check_plain(folder, stat.S_ISDIR)
    return folder


def _export(adapter_path):
    """Write a run's adapter for transformers, inside its folder."""
    if not isinstance(adapter_path, str) or not adapter_path:
        raise InputError("peft writes the adapter of one folder: name it.")
    if mx.distributed.init().rank() > 0:
        return
    folder = _check_folder(adapter_path)
    save_peft(adapter_path, folder)
    rprint(f"Saved the adapter for transformers and PEFT to {folder}")


FEATURE = _Peft()
