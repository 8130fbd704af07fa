# Copyright © 2026 MLX Contributors

"""Models that fit the settings, and ranks that have the same ones."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn

from ..policy import model as models
from ..ranks import start_together
from .checks import fit_to_model
from .table import names


def load_models(args: SimpleNamespace) -> tuple[nn.Module, Any, nn.Module | None]:
    """Load the model, its tokenizer, and the reference model if one is named."""
    model, tokenizer = models.load_model(args.model, args.trust_remote_code)
    fit_to_model(args, model)
    path, start = args.reference_model, None
    if args.reference_bits and path is None:
        path, start = args.model, args.resume_adapter_file
    reference_model = models.load_reference_model(
        path, tokenizer, args.trust_remote_code, start, args.reference_bits
    )
    return model, tokenizer, reference_model


def agree(args: SimpleNamespace, loaded: Callable[[], dict[str, Any]]) -> None:
    """Wait for all ranks, and refuse any that has other settings or inputs."""
    settings = {name: getattr(args, name) for name in names(per_rank=False)}
    start_together(inputs=lambda: {**settings, **loaded()})
