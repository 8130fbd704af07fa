# Copyright © 2026 MLX Contributors

"""GPT-2's checkpoints as transformers saves them: with a language-model head."""

import mlx.core as mx

from ...models import gpt2
from ..errors import InputError
from .model import CLASSES


class Model(gpt2.Model):
    """GPT-2, from checkpoints with and without a language-model head."""

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Rename a checkpoint's weights; drop mask buffers and a tied head's copy."""
        weights = {k.removeprefix("transformer."): v for k, v in weights.items()}
        head = weights.pop("lm_head.weight", None)
        embedding = weights.get("wte.weight", head)
        if head is not None and not mx.array_equal(head, embedding):
            raise InputError("The checkpoint's lm_head is not its token embedding.")
        for k in [*weights]:
            if k.endswith(".attn.masked_bias"):
                del weights[k]
        return super().sanitize(weights)


CLASSES[gpt2.Model] = Model
