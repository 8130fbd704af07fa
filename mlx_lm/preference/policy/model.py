# Copyright © 2026 MLX Contributors

"""The model, and the trained part of it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ... import utils
from ...tuner.dora import DoRAEmbedding, DoRALinear
from ...tuner.utils import linear_to_lora_layers
from ...utils import _download, _get_classes, load_tokenizer
from ..errors import InputError
from ..plug_ins import load

# What takes the place of upstream's classes.
CLASSES: dict[type, type] = {}
LEARNING_RATES = {"lora": 1e-5, "dora": 1e-5, "full": 1e-6}


def explain_failure(path: str, error: Exception) -> str:
    """Look for the reason in a model's folder, since loaders seldom name a file."""
    folder = Path(path)
    if not folder.is_dir():
        return str(error)
    for file in sorted(folder.glob("*.json")):
        if not file.is_file():
            return f"{file.name} is no regular file. Copy it again."
        try:
            json.loads(file.read_bytes())
        except ValueError as e:
            return f"{file.name} is damaged ({e}). Copy it again."
    if not (folder / "config.json").exists():
        return "it has no config.json. Give the folder of a whole model."
    if not any(folder.glob("*token*.*")):
        return (
            "it has no tokenizer (tokenizer.json or tokenizer.model). Copy the "
            "tokenizer's files of the model that it was made from."
        )
    kind = f"{type(error).__name__}: " if isinstance(error, LookupError) else ""
    return f"{kind}{error}"


MOST_LAYERS = 10_000


def check_model_folder(path: str) -> None:
    """Check that a model is there, unless it may be one of the Hub."""
    if not Path(path).exists() and path.startswith(("/", ".", "~")):
        raise InputError(f"The model folder {path} does not exist.")


def load_model(path: str, trust_remote_code: bool = False) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer, with one clear line if that fails."""
    check_model_folder(path)
    try:
        folder = _download(path)
        for file in sorted(Path(folder).iterdir()):
            if not (file.is_file() or file.is_dir()):
                raise ValueError(f"{file.name} is no regular file.")
        model, config = utils.load_model(
            folder,
            # Memory is checked before the weights are read.
            lazy=True,
            get_model_classes=_model_classes,
            trust_remote_code=trust_remote_code,
        )
        ends = config.get("eos_token_id")
        for end in ends if isinstance(ends, list) else [ends]:
            if not isinstance(end, (int, type(None))):
                raise ValueError(f"eos_token_id is no token id: {end!r}.")
        tokenizer = load_tokenizer(
            folder,
            {"trust_remote_code": trust_remote_code},
            eos_token_ids=config.get("eos_token_id"),
        )
        return model, tokenizer
    except RuntimeError as e:
        raise _unreadable(path, e) from e
    except Exception as e:
        # Whatever a file holds: each loader raises what it likes.
        text = f"Can't load the model {path!r}: {explain_failure(path, e)}"
        if isinstance(e, FileNotFoundError) and "safetensors" in str(e):
            text = (
                f"{path} has no .safetensors weights (a repo with only .bin files must "
                "be saved again with transformers: model.save_pretrained(folder))."
            )
        raise InputError(text) from e


def _model_classes(config):
    # Each is built before any weight of it is looked for.
    for part in (config, config.get("text_config") or {}):
        for name, value in part.items():
            if "layers" in name and isinstance(value, int) and value > MOST_LAYERS:
                raise ValueError(f"config.json has {name} {value:,}.")
    model, model_args = _get_classes(config)
    return CLASSES.get(model, model), model_args


def _unreadable(path, error):
    end = "" if str(error)[-1:] in ".?" else "."
    return InputError(f"Can't read the weights of {path}: {error}{end} Copy it again.")


def most_positions(model: nn.Module) -> int | None:
    """The longest sequence that a model is made for, if it says so."""
    config = vars(getattr(model, "args", SimpleNamespace()))
    text = config.get("text_config") or {}
    config = {**(text if isinstance(text, dict) else vars(text)), **config}
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    found = (config.get(name) for name in names)
    return next((x for x in found if isinstance(x, int)), None)


def read_weights(model: nn.Module, path: str) -> None:
    """Read a model's weights into memory, which ``load_model`` leaves on the disk."""
    try:
        mx.eval(model.parameters())
    except RuntimeError as e:
        raise _unreadable(path, e) from e


def prepare_policy(
    model: nn.Module,
    fine_tune_type: str,
    num_layers: int,
    lora_parameters: dict[str, Any] | None = None,
    *,
    seed: int = 0,
) -> None:
    """Make the trained part: adapters or unfrozen layers."""
    mx.random.seed(seed)
    model.freeze()
    if fine_tune_type == "full":
        layers = model.layers[-max(num_layers, 0) :]
        if any("scales" in m for layer in layers for m in layer.modules()):
            raise InputError(
                "fine_tune_type full can't train quantized layers. Use lora or dora, "
                "or a model that is not quantized."
            )
        for layer in layers:
            layer.unfreeze()
    else:
        use_dora = fine_tune_type == "dora"
        try:
            linear_to_lora_layers(model, num_layers, lora_parameters, use_dora=use_dora)
        except ValueError as e:
            raise InputError(
                f"{e}. Use another fine_tune_type, or name other modules in "
                "lora_parameters.keys."
            ) from e
        _check_dora(model)
    if not tree_flatten(model.trainable_parameters()):
        keys = (lora_parameters or {}).get("keys")
        raise InputError(f"Nothing to train: the model has no layers named {keys}.")


def _check_dora(model):
    """Refuse layers that mlx-lm's DoRA makes matrices of a wrong size for."""
    for name, module in model.named_modules():
        if not isinstance(module, (DoRALinear, DoRAEmbedding)):
            continue
        inner = module["linear" if "linear" in module else "embedding"]
        fits = isinstance(module, DoRALinear) and 32 % getattr(inner, "bits", 32) == 0
        if "scales" in inner and not fits:
            raise InputError(
                f"fine_tune_type dora can't adapt {name}, which is quantized to "
                f"{inner.bits} bits. Use lora, or a model that is not quantized."
            )


def check_token_ids(model: Any, largest: int) -> None:
    """Check that a model has a logit for every token id in use."""
    width = model(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]
    if largest >= width:
        raise InputError(
            f"Token id {largest} is outside of the model's vocabulary of {width} "
            "tokens: its tokenizer belongs to another model."
        )


# Each fills the table of classes.
PLUG_INS = ("gpt2",)
load(__package__, PLUG_INS)
