# Copyright © 2026 MLX Contributors

import json
import tempfile
import unittest
from pathlib import Path

import mlx.core as mx
import numpy as np
from fixtures.tokenizers_for_tests import no_template_tokenizer

from mlx_lm.models.gpt2 import ModelArgs
from mlx_lm.preference.policy.gpt2 import Model
from mlx_lm.preference.policy.model import load_model


def transformers_weights(n_layer, n_embd, n_positions, vocab_size, seed=0):
    """Weights named and laid out as transformers saves GPT2LMHeadModel."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape, scale=0.2).astype(np.float32)
    weights = {
        "transformer.wte.weight": draw(vocab_size, n_embd),
        "transformer.wpe.weight": draw(n_positions, n_embd),
    }
    sizes = {
        "attn.c_attn": (n_embd, 3 * n_embd),
        "attn.c_proj": (n_embd, n_embd),
        "mlp.c_fc": (n_embd, 4 * n_embd),
        "mlp.c_proj": (4 * n_embd, n_embd),
    }
    norms = ["transformer.ln_f"]
    for i in range(n_layer):
        layer = f"transformer.h.{i}"
        norms += [f"{layer}.ln_1", f"{layer}.ln_2"]
        for name, (rows, columns) in sizes.items():
            weights[f"{layer}.{name}.weight"] = draw(rows, columns)
            weights[f"{layer}.{name}.bias"] = draw(columns)
        mask = np.tril(np.ones((1, 1, n_positions, n_positions), dtype=np.uint8))
        weights[f"{layer}.attn.bias"] = mask
        weights[f"{layer}.attn.masked_bias"] = np.array(-1e4, dtype=np.float32)
    for name in norms:
        weights[f"{name}.weight"] = 1 + draw(n_embd)
        weights[f"{name}.bias"] = draw(n_embd)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def save_gpt2(folder, n_layer=2, n_embd=16, n_head=2, n_positions=64, prefix=True):
    """A GPT-2 folder as transformers writes it, without a chat template."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = no_template_tokenizer()
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": "gpt2",
        "n_ctx": n_positions,
        "n_embd": n_embd,
        "n_head": n_head,
        "n_layer": n_layer,
        "n_positions": n_positions,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = transformers_weights(n_layer, n_embd, n_positions, len(tokenizer))
    if not prefix:
        # The base model's names, as in the first GPT-2 checkpoints.
        del weights["lm_head.weight"]
        weights = {k.removeprefix("transformer."): v for k, v in weights.items()}
    arrays = {k: mx.array(v) for k, v in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder


def gpt2_logits(weights, tokens, n_layer, n_head):
    """GPT-2 in float64, from weights as transformers names them."""
    w = {
        k.removeprefix("transformer."): v.astype(np.float64) for k, v in weights.items()
    }

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def conv1d(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def heads(x):
        return x.reshape(len(tokens), n_head, -1).transpose(1, 0, 2)

    x = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
    later = np.triu(np.ones((len(tokens), len(tokens)), dtype=bool), 1)
    for i in range(n_layer):
        qkv = conv1d(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        q, k, v = map(heads, np.split(qkv, 3, axis=-1))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        scores = np.where(later, -np.inf, scores)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = (scores / scores.sum(-1, keepdims=True)) @ v
        y = y.transpose(1, 0, 2).reshape(len(tokens), -1)
        x = x + conv1d(y, f"h.{i}.attn.c_proj")
        y = conv1d(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + conv1d(y, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


class TestGPT2(unittest.TestCase):
    def test_logits_are_those_of_the_checkpoint(self):
        tokens = [5, 3, 200, 17, 0, 9]
        logits = {}
        for prefix in (True, False):
            with self.subTest(prefix=prefix), tempfile.TemporaryDirectory() as folder:
                path = str(save_gpt2(folder, prefix=prefix))
                model, tokenizer = load_model(path)
                logits[prefix] = np.array(model(mx.array([tokens]))[0])
                weights = transformers_weights(2, 16, 64, len(tokenizer.get_vocab()))
                expected = gpt2_logits(weights, tokens, 2, 2)
                np.testing.assert_allclose(
                    logits[prefix], expected, atol=2e-5 * np.abs(expected).max()
                )
        np.testing.assert_array_equal(logits[True], logits[False])

    def test_converted_names_stay(self):
        args = ModelArgs("gpt2", 8, 8, 1, 8, 8, 1e-5, 16)
        weights = {"model.h.0.attn.c_attn.weight": mx.zeros((24, 8))}
        (kept,) = Model(args).sanitize(weights).items()
        self.assertEqual((kept[0], kept[1].shape), (*weights, (24, 8)))

    def test_untied_head_is_refused(self):
        args = ModelArgs("gpt2", 8, 8, 1, 8, 8, 1e-5, 16)
        weights = {
            "transformer.wte.weight": mx.zeros((16, 8)),
            "lm_head.weight": mx.ones((16, 8)),
        }
        with self.assertRaisesRegex(ValueError, "lm_head"):
            Model(args).sanitize(weights)


if __name__ == "__main__":
    unittest.main()
