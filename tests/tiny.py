# Copyright © 2026 MLX Contributors

"""Tiny models, tokenizers and pairs that several tests share."""

import contextlib
import importlib.util
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from float64 import float64_logps  # noqa: F401
from mlx.utils import tree_flatten

from mlx_lm.models import llama
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import DPOTrainingArgs, train_dpo
from mlx_lm.tuner.utils import linear_to_lora_layers

# What commands keep for later runs stays out of the user's own cache folder.
CACHE = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = CACHE.name
# But for the list of fonts, which takes matplotlib seconds to make.
os.environ.setdefault("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))
from tokenizers_for_tests import CASES, bos_tokenizer  # noqa: E402, F401

VOCAB = 64
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
LORA = {"rank": 4, "dropout": 0.0, "scale": 10.0}


class Recorder(TrainingCallback):
    def __init__(self):
        self.train, self.val = [], []

    def on_train_loss_report(self, train_info):
        self.train.append(train_info)

    def on_val_loss_report(self, val_info):
        self.val.append(val_info)


class Pairs(list):
    """Tokenized pairs with the part of PreferenceDataset that batches need."""

    def pair_lengths(self):
        return np.array([lengths for *_, lengths in self]).reshape(-1, 3)


def pair(prompt, chosen, rejected):
    p = len(prompt)
    return prompt, chosen, rejected, (p, p + len(chosen), p + len(rejected))


def random_pairs(n, seed=0, vocab=VOCAB, longest=9):
    rng = np.random.default_rng(seed)
    row = lambda low: rng.integers(1, vocab, rng.integers(low, longest)).tolist()
    return Pairs(pair(row(1), row(1), row(1)) for _ in range(n))


def tiny_model(kind="full", seed=0, dropout=0.0, layers=2, **config):
    """A random llama with its last layers trainable, as the kind says."""
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict({**CONFIG, **config}))
    model.freeze()
    if kind == "full":
        for layer in model.layers[-layers:]:
            layer.unfreeze()
    elif kind in ("lora", "dora"):
        parameters = {**LORA, "dropout": dropout}
        linear_to_lora_layers(model, layers, parameters, use_dora=(kind == "dora"))
    return model


def weights_of(model):
    return {k: np.array(v) for k, v in tree_flatten(model.trainable_parameters())}


def train(model, pairs, val=None, optimizer=None, callback=None, **args):
    """A run without a screen; returns its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"batch_size": 2, "iters": 20, "steps_per_save": 1000, **args}
        reference = settings.pop("reference_model", None)
        settings.setdefault("adapter_file", f"{folder}/adapters.safetensors")
        with contextlib.redirect_stdout(io.StringIO()):
            return train_dpo(
                model,
                optimizer or optim.Adam(1e-2),
                pairs,
                val,
                DPOTrainingArgs(**settings),
                reference,
                callback,
            )


def save_tiny_model(folder, quantize=False, **config):
    """A model folder that ``mlx_lm.load`` reads, with a chat tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = bos_tokenizer()
    tokenizer.save_pretrained(folder)
    config = {**CONFIG, "vocab_size": len(tokenizer), **config}
    config["eos_token_id"] = tokenizer.eos_token_id
    mx.random.seed(1)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    if quantize:
        bits = 4 if quantize is True else quantize
        nn.quantize(model, group_size=32, bits=bits)
        config["quantization"] = {"group_size": 32, "bits": bits}
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


ROWS = [
    {
        "prompt": [{"role": "user", "content": f"Say {word}."}],
        "chosen": [{"role": "assistant", "content": f"{word}"}],
        "rejected": [{"role": "assistant", "content": f"oh, the {word} again"}],
    }
    for word in "tea hat pen cup sun ink map oak bee jam fog".split()
]


def save_rows(folder, rows=ROWS, names=("train", "valid", "test")):
    """A data folder with the same rows in every split."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder
