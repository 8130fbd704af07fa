# Copyright © 2026 MLX Contributors

"""Settings that are complete, and models that fit them."""

from types import SimpleNamespace
from typing import Any

import mlx.nn as nn

from ..errors import InputError
from ..features import features
from ..policy import model as models
from .checks import check_args, fit_to_model
from .table import CONFIG_DEFAULTS


def settle(args: SimpleNamespace) -> None:
    """Complete the settings by those of an earlier run, and check them."""
    folder = next(filter(None, [one.complete(args) for one in features()]), None)
    # A full run saves null.
    given = {k: v for k, v in (args.lora_parameters or {}).items() if v is not None}
    args.lora_parameters = {**CONFIG_DEFAULTS["lora_parameters"], **given}
    try:
        check_args(args)
    except InputError as e:
        if folder is None:
            raise
        raise InputError(
            f"{e} What was not given to the command is from {folder}/adapter_config.json."
        ) from e
    if args.fine_tune_type == "full":
        args.lora_parameters = None


def load_models(args: SimpleNamespace) -> tuple[nn.Module, Any, nn.Module | None]:
    """Load the model, its tokenizer, and the reference model if one is named."""
    model, tokenizer = models.load_model(args.model, args.trust_remote_code)
    fit_to_model(args, model)
    found = (one.reference_model(args, tokenizer) for one in features())
    return model, tokenizer, next((x for x in found if x is not None), None)
