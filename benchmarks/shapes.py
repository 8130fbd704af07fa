# Copyright © 2026 MLX Contributors

"""Model folders of public shapes with random weights, and pairs of given lengths."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_lm.utils import _get_classes

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
END = "</s>"
MOST_WORDS = 4096


def own_dtype() -> str:
    """What weights have on this machine."""
    return "bfloat16" if mx.default_device() == mx.gpu else "float32"


def random_model(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """A model with random weights, none of them computed yet."""
    model_class, config_class = _get_classes(config)
    mx.random.seed(seed)
    return model_class(config_class.from_dict(config))


def words_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer for which every number below the vocabulary's size is a token."""
    count = min(vocabulary, MOST_WORDS)
    words = {END: 0} | {str(i): i for i in range(1, count)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def random_rows(
    lengths: list[tuple[int, int, int]], count: int, vocabulary: int, seed: int = 0
) -> list[dict[str, str]]:
    """Rows of words: the lengths of prompt and answers, END included, in turns."""
    rng = np.random.default_rng(seed)
    count_words = min(vocabulary, MOST_WORDS)
    text = lambda n: " ".join(map(str, rng.integers(1, count_words, n)))
    rows = []
    for i in range(count):
        prompt, chosen, rejected = lengths[i % len(lengths)]
        answers = {"chosen": chosen, "rejected": rejected}
        # A word and the end of the answer are two tokens only if they are parted.
        row = {name: f" {text(n - 1)} {END}" for name, n in answers.items()}
        rows.append({"prompt": text(prompt), **row})
    return rows


def save_random_model(
    folder: Path,
    config: dict[str, Any],
    dtype: str | None = None,
    tokenizer: Path | None = None,
    seed: int = 0,
) -> Path:
    """Write a model folder; its tokenizer is a copy of one, or of words."""
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(config, seed)
    model.set_dtype(DTYPES[dtype or own_dtype()])
    weights = dict(tree_flatten(model.parameters()))
    # One at a time: a float32 copy of all weights may not fit.
    for name in weights:
        mx.eval(weights[name])
    metadata = {"format": "mlx"}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata)
    del model, weights
    # The memory is for the runs that follow.
    mx.clear_cache()
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    add_tokenizer(folder, config["vocab_size"], tokenizer)
    return folder


def link_model(folder: Path, model: Path) -> Path:
    """A folder with a model's own weights and a tokenizer of words."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((model / "config.json").read_text("utf-8"))
    for file in (model / "config.json", *model.glob("*safetensors*")):
        (folder / file.name).symlink_to(file.resolve())
    add_tokenizer(folder, config["vocab_size"])
    return folder


def add_tokenizer(folder: Path, vocabulary: int, source: Path | None = None) -> None:
    """Put a tokenizer's files beside a model's."""
    if source is None:
        words_tokenizer(vocabulary).save_pretrained(folder)
        return
    names = ("*token*", "chat_template*", "vocab*", "merges*")
    for file in {file for name in names for file in source.glob(name)}:
        shutil.copy(file, folder)
