# Copyright © 2026 MLX Contributors

"""The output head, trained beside whole layers."""

from collections.abc import Iterable
from typing import Any

import mlx.nn as nn

from ..errors import InputError
from ..features import Feature
from ..setting import Setting


def unfreeze_head(model: nn.Module) -> None:
    """Make the output head trainable: with tied embeddings, these."""
    names = ("lm_head", "output", "embed_out", "embed_tokens", "wte", "embeddings")
    modules = list(model.named_modules())
    for wanted in names:
        for path, module in modules:
            if path.split(".")[-1] != wanted or "layers." in path:
                continue
            if "scales" in module:
                raise InputError(
                    f"train_head can't train {path}, which is quantized. Use a model "
                    "that is not quantized."
                )
            module.unfreeze()
            return
    raise InputError(f"train_head finds no module named {', '.join(names)}.")


class _Head(Feature):
    def settings(self) -> dict[str, Iterable[Setting]]:
        what = "Train the output head too, and tied embeddings with it."
        one = Setting("train_head", False, what, resume="shape", tested=True)
        return {"Model and optimizer": [one]}

    def check(self, args: Any) -> None:
        if args.train_head and args.fine_tune_type != "full":
            raise InputError(
                "train_head needs fine_tune_type full: no loader takes a whole head "
                f"beside {args.fine_tune_type}. Name it in lora_parameters.keys to "
                "adapt it."
            )

    def policy_made(self, args: Any, model: Any) -> None:
        if args.train_head:
            unfreeze_head(model)


FEATURE = _Head()
