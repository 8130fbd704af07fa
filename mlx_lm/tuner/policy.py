# Copyright © 2026 MLX Contributors

"""The trained part of the model: made, taken over from an adapter, loaded."""

import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..cli_ui import rprint
from .utils import linear_to_lora_layers

ADAPTER_KEYS = ("fine_tune_type", "num_layers", "lora_parameters")
TRAINED_WITH = "mlx_lm.dpo"


def adapter_config(path: str | Path) -> dict | None:
    """
    Read the configuration that lies beside an adapter file.

    Args:
        path (str or Path): ``adapters.safetensors``, a numbered checkpoint, or
            their folder.

    Returns:
        dict: The configuration, or None if there is none.

    Example:
        >>> adapter_config("nowhere") is None
        True
    """
    path = Path(path)
    path = (path if path.is_dir() else path.parent) / "adapter_config.json"
    return json.loads(path.read_text()) if path.exists() else None


def adopt_adapter_config(args: SimpleNamespace) -> None:
    """
    Take rank, keys and layers from the adapter that the run starts from.

    Args:
        args (SimpleNamespace): The settings; ``resume_adapter_file`` is the
            adapter, a file or a folder.

    Raises:
        ValueError: If the adapter contradicts a setting that was given, or was
            written by a DPO run and ``new_reference`` is not set.

    Example:
        >>> from mlx_lm.dpo import resolve_args
        >>> args = resolve_args(["--train"])
        >>> adopt_adapter_config(args)  # nothing to start from
        >>> args.fine_tune_type
        'lora'
    """
    if args.resume_adapter_file is None:
        return
    path = Path(args.resume_adapter_file)
    path = path / "adapters.safetensors" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"resume_adapter_file {path} does not exist.")
    args.resume_adapter_file = str(path)
    config = adapter_config(path)
    if config is None:
        return
    if config.get("trained_with") == TRAINED_WITH and not args.new_reference:
        raise ValueError(
            f"{path} was written by a DPO run, whose reference is not this adapter. "
            "Continue that run with --resume, or set new_reference: true to start a "
            "new one whose reference is this adapter."
        )
    for key in ADAPTER_KEYS:
        theirs, ours = config.get(key), getattr(args, key)
        if theirs is None:
            continue
        if key in args.explicit and ours != theirs:
            raise ValueError(
                f"{key} is {ours} but the adapter {path} was trained with {theirs}. "
                f"Leave {key} out, the adapter decides it."
            )
        setattr(args, key, theirs)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """
    Load trained weights into a prepared model, and drop none of them.

    Args:
        model (nn.Module): The policy, its trainable parameters set up.
        path (str or Path): An adapter file.

    Raises:
        ValueError: If a tensor is missing in the model or has another shape.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        ...     mx.save_safetensors(file.name, {"other": mx.zeros((1,))})
        ...     load_weights(nn.Linear(1, 1), file.name)
        Traceback (most recent call last):
        ...
        ValueError: ... tensor 'other' is not trained here...
    """
    trainable = dict(tree_flatten(model.trainable_parameters()))
    weights = mx.load(str(path))
    for name, w in weights.items():
        if name not in trainable:
            raise ValueError(
                f"{path} does not fit: tensor {name!r} is not trained here. Check "
                "fine_tune_type, num_layers and lora_parameters.keys."
            )
        if w.shape != trainable[name].shape:
            raise ValueError(
                f"{path} does not fit: tensor {name!r} has shape {w.shape}, the "
                f"model's is {trainable[name].shape}. Check lora_parameters.rank."
            )
    model.load_weights(list(weights.items()), strict=False)


def prepare_policy(args: SimpleNamespace, model: nn.Module) -> None:
    """
    Make the trained part of the model: adapters, or unfrozen layers.

    Args:
        args (SimpleNamespace): For ``fine_tune_type``, ``num_layers``,
            ``lora_parameters`` and ``resume_adapter_file``.
        model (nn.Module): The policy; changed in place.

    Raises:
        ValueError: If the adapter to start from does not fit.

    Example:
        >>> from mlx_lm.dpo import resolve_args
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = [nn.Linear(4, 4)]
        >>> model = Model()
        >>> args = resolve_args(["--fine-tune-type", "full", "--num-layers", "1"])
        >>> prepare_policy(args, model)
        >>> sorted(name for name, _ in tree_flatten(model.trainable_parameters()))
        ['layers.0.bias', 'layers.0.weight']
    """
    mx.random.seed(args.seed)
    model.freeze()
    if args.fine_tune_type == "full":
        first = 0 if args.num_layers == -1 else len(model.layers) - args.num_layers
        for layer in model.layers[first:]:
            layer.unfreeze()
        args.lora_parameters = None
    else:
        linear_to_lora_layers(
            model,
            args.num_layers,
            args.lora_parameters,
            use_dora=(args.fine_tune_type == "dora"),
        )
    if args.resume_adapter_file is not None:
        rprint(f"Starting from the weights in {args.resume_adapter_file}")
        load_weights(model, args.resume_adapter_file)
