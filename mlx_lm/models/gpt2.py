# Copyright © 2026 MLX Contributors

import mlx.core as mx

from ._upstream_gpt2 import (
    MLP,
    Any,
    Attention,
    BaseModelArgs,
    GPT2Model,
)
from ._upstream_gpt2 import Model as _Model
from ._upstream_gpt2 import (
    ModelArgs,
    Optional,
    TransformerBlock,
    create_attention_mask,
    dataclass,
    nn,
    scaled_dot_product_attention,
)


class Model(_Model):
    """
    GPT-2, from checkpoints with and without a language-model head.

    Example:
        >>> args = ModelArgs("gpt2", 8, 8, 1, 8, 8, 1e-5, 16)
        >>> weights = {"transformer.ln_f.bias": mx.zeros((8,))}
        >>> list(Model(args).sanitize(weights))
        ['model.ln_f.bias']
    """

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """
        Rename a checkpoint's weights to the model's.

        transformers saves ``GPT2LMHeadModel`` (DialoGPT, for one) with names
        that start with ``transformer.``, mask buffers and a copy of the tied head.

        Args:
            weights (dict): Arrays by name.

        Returns:
            dict: Arrays by the model's names.

        Raises:
            ValueError: If the head is not tied.

        Example:
            >>> args = ModelArgs("gpt2", 8, 8, 1, 8, 8, 1e-5, 16)
            >>> Model(args).sanitize({"lm_head.weight": mx.zeros((16, 8))})
            {}
        """
        weights = {k.removeprefix("transformer."): v for k, v in weights.items()}
        head = weights.pop("lm_head.weight", None)
        embedding = weights.get("wte.weight", head)
        if head is not None and not mx.array_equal(head, embedding):
            raise ValueError("The checkpoint's lm_head is not its token embedding.")
        for k in [*weights]:
            if k.endswith(".attn.masked_bias"):
                del weights[k]
        return super().sanitize(weights)
