# Copyright © 2026 MLX Contributors

"""The trained part of the model: made, taken over from an adapter, loaded."""

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..cli_ui import rprint
from ..utils import load
from .model_files import explain_failure
from .objective import Objective
from .utils import linear_to_lora_layers

ADAPTER_KEYS = ("fine_tune_type", "num_layers", "lora_parameters", "train_head")
# What else decides the numbers of a finished run's test.
TEST_KEYS = (
    "model",
    "reference_model",
    "resume_adapter_file",
    *(field.name for field in fields(Objective)),
    "max_seq_length",
    "prompt_feature",
    "chosen_feature",
    "rejected_feature",
    "weight_feature",
    "margin_feature",
    "criteria",
    "wrap_text",
    "transcripts",
)
TRAINED_WITH = "mlx_lm.dpo"


def load_model(path: str, args: SimpleNamespace) -> tuple[nn.Module, Any]:
    """
    Load a model and its tokenizer, with one clear line if that fails.

    Args:
        path (str): A local folder or a Hugging Face repo.
        args (SimpleNamespace): For ``trust_remote_code``.

    Returns:
        tuple: model and tokenizer.

    Raises:
        ValueError: If there are no safetensors, the path does not exist, or the
            weights do not fit the architecture.

    Example:
        >>> load_model("/nowhere/model", SimpleNamespace(trust_remote_code=False))
        Traceback (most recent call last):
        ...
        ValueError: The model folder /nowhere/model does not exist.
    """
    if not Path(path).exists() and (path.startswith(("/", ".", "~"))):
        raise ValueError(f"The model folder {path} does not exist.")
    try:
        return load(
            path,
            tokenizer_config={"trust_remote_code": args.trust_remote_code},
            # Memory is checked before the weights are read.
            lazy=True,
            trust_remote_code=args.trust_remote_code,
        )
    except FileNotFoundError as e:
        if "safetensors" not in str(e):
            raise ValueError(
                f"Can't load the model {path!r}: {explain_failure(path, e)}"
            ) from e
        raise ValueError(
            f"{path} has no .safetensors weights (a repo with only .bin files must be "
            "saved again with transformers: model.save_pretrained(folder))."
        ) from e
    except RuntimeError as e:
        raise _unreadable(path, e) from e
    except Exception as e:
        # Whatever a file holds: each loader raises what it likes.
        raise ValueError(
            f"Can't load the model {path!r}: {explain_failure(path, e)}"
        ) from e


def _unreadable(path, error):
    end = "" if str(error)[-1:] in ".?" else "."
    return ValueError(f"Can't read the weights of {path}: {error}{end} Copy it again.")


def read_weights(model: nn.Module, path: str) -> None:
    """
    Read a model's weights into memory, which ``load_model`` leaves on the disk.

    Args:
        model (nn.Module): The model.
        path (str): What it was loaded from, for the message.

    Raises:
        ValueError: If a file is damaged.

    Example:
        >>> read_weights(nn.Linear(1, 1), "models/tiny")
    """
    try:
        mx.eval(model.parameters())
    except RuntimeError as e:
        raise _unreadable(path, e) from e


def adapter_config(path: str | Path) -> dict | None:
    """
    Read the configuration that lies beside an adapter file.

    Args:
        path (str or Path): ``adapters.safetensors``, a numbered checkpoint, or
            their folder.

    Returns:
        dict: The configuration, or None if there is none.

    Raises:
        ValueError: If it is damaged.

    Example:
        >>> adapter_config("nowhere") is None
        True
    """
    path = Path(path)
    path = (path if path.is_dir() else path.parent) / "adapter_config.json"
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_bytes())
    except ValueError as e:
        raise ValueError(f"{path} is damaged: {e}. Copy it again.") from e
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no configuration: it must hold keys and values.")
    return config


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
    if path.parent.resolve() == Path(args.adapter_path).resolve():
        raise ValueError(
            f"adapter_path {args.adapter_path} holds the adapter to start from, which "
            "the run would overwrite: choose another folder."
        )
    args.resume_adapter_file = str(path)
    config = adapter_config(path)
    if config is None:
        rprint(
            f"[WARNING] {path} has no adapter_config.json beside it: its rank, scale "
            "and layers are taken to be this run's."
        )
        return
    if config.get("trained_with") == TRAINED_WITH and not args.new_reference:
        raise ValueError(
            f"{path} was written by a DPO run, whose reference is not this adapter. "
            "Continue that run with --resume, or set new_reference: true to start a "
            "new one whose reference is this adapter."
        )
    _adopt(args, config, path)


def _adopt(args, config, path):
    """Take the adapter's shape from its configuration, or say what contradicts."""
    theirs = {k: config[k] for k in ADAPTER_KEYS if config.get(k) is not None}
    ours = {k: getattr(args, k) for k in theirs if k in args.explicit}
    if "lora_parameters" in ours:
        parameters = dict(theirs["lora_parameters"])
        given = ours.pop("lora_parameters")
        # Dropout is no part of what the adapter computes.
        parameters["dropout"] = given.get("dropout", parameters.get("dropout", 0.0))
        theirs["lora_parameters"] = parameters
        ours |= {f"lora_parameters.{k}": v for k, v in given.items()}
    for key, value in ours.items():
        parent, _, name = key.partition(".")
        other = theirs[parent].get(name) if name else theirs[parent]
        if value != other:
            raise ValueError(
                f"{key} is {value} but the adapter {path} was trained with {other}. "
                f"Leave {key} out, the adapter decides it."
            )
    for key, value in theirs.items():
        setattr(args, key, value)


def adopt_finished_run(args: SimpleNamespace) -> None:
    """
    Take the settings of a finished run that decide the numbers of its test.

    Args:
        args (SimpleNamespace): The settings; ``adapter_path`` is the run's folder.

    Raises:
        ValueError: If it is no folder of a run, or contradicts what was given.

    Example:
        >>> adopt_finished_run(SimpleNamespace(adapter_path="nowhere"))
        Traceback (most recent call last):
        ...
        ValueError: nowhere has no adapter_config.json. Give --adapter-path the \
folder of a run, or '' to test the model as it is.
    """
    config = adapter_config(args.adapter_path)
    if config is None:
        raise ValueError(
            f"{args.adapter_path} has no adapter_config.json. Give --adapter-path the "
            "folder of a run, or '' to test the model as it is."
        )
    _adopt(args, config, args.adapter_path)
    for key in TEST_KEYS:
        if config.get(key) is not None and key not in args.explicit:
            setattr(args, key, config[key])


def slow_dtype_notice(model: nn.Module) -> str | None:
    """
    Say in one line that 16-bit weights do badly on MLX's CPU backend.

    Args:
        model (nn.Module): The policy.

    Returns:
        str: The line, or None if the device or the weights are others.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> slow_dtype_notice(model) is None
        True
    """
    dtypes = {p.dtype for _, p in tree_flatten(model.parameters())}
    if mx.default_device() != mx.cpu or not dtypes & {mx.bfloat16, mx.float16}:
        return None
    return (
        "The CPU computes 16-bit models slowly and inexactly: use "
        "mlx_lm.convert --dtype float32 first."
    )


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
    if not Path(path).exists():
        raise ValueError(f"The adapter file {path} does not exist.")
    try:
        weights = mx.load(str(path))
    except RuntimeError as e:
        raise ValueError(f"Can't read the adapter file {path}: {e}") from e
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
    if missing := sorted(trainable.keys() - weights.keys()):
        raise ValueError(
            f"{path} does not fit: it has no tensor {missing[0]!r}, which is trained "
            "here. Check fine_tune_type, num_layers and lora_parameters.keys."
        )
    model.load_weights(list(weights.items()), strict=False)


def unfreeze_head(model: nn.Module) -> None:
    """
    Make the output head trainable: with tied embeddings, these.

    Args:
        model (nn.Module): The policy; changed in place.

    Raises:
        ValueError: If the head is quantized, or the model names it in its own way.

    Example:
        >>> from mlx_lm.models.gpt2 import Model, ModelArgs
        >>> model = Model(ModelArgs("gpt2", 16, 8, 2, 2, 16, 1e-5, 32))
        >>> _ = model.freeze()
        >>> unfreeze_head(model)
        >>> [name for name, _ in tree_flatten(model.trainable_parameters())]
        ['model.wte.weight']
    """
    names = ("lm_head", "output", "embed_out", "embed_tokens", "wte", "embeddings")
    modules = list(model.named_modules())
    for wanted in names:
        for path, module in modules:
            if path.split(".")[-1] != wanted or "layers." in path:
                continue
            if "scales" in module:
                raise ValueError(
                    f"train_head can't train {path}, which is quantized. Use a model "
                    "that is not quantized."
                )
            module.unfreeze()
            return
    raise ValueError(f"train_head finds no module named {', '.join(names)}.")


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
        layers = model.layers[-max(args.num_layers, 0) :]
        if any("scales" in m for layer in layers for m in layer.modules()):
            raise ValueError(
                "fine_tune_type full can't train quantized layers. Use lora or dora, "
                "or a model that is not quantized."
            )
        for layer in layers:
            layer.unfreeze()
        args.lora_parameters = None
    else:
        linear_to_lora_layers(
            model,
            args.num_layers,
            args.lora_parameters,
            use_dora=(args.fine_tune_type == "dora"),
        )
    if args.train_head:
        unfreeze_head(model)
    if not tree_flatten(model.trainable_parameters()):
        keys = (args.lora_parameters or {}).get("keys")
        raise ValueError(f"Nothing to train: the model has no layers named {keys}.")
    if args.resume_adapter_file is not None:
        rprint(f"Starting from the weights in {args.resume_adapter_file}")
        load_weights(model, args.resume_adapter_file)
