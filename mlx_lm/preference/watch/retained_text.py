# Copyright © 2026 MLX Contributors

"""Whether a model is still good at ordinary text: perplexity before and after."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from transformers.utils import logging as transformers_log

from ..errors import InputError
from ..files import write_json
from ..forward.frozen import running
from ..forward.head import completion_logps
from ..forward.probe import check_sharing
from ..forward.states import plain_states
from ..policy.model import read_weights
from ..run.reading import read_json
from ..terminal import rprint
from . import texts

FEWEST_CHARACTERS = 1000
FILE_NAME = "retained_text.json"


@dataclass
class RetainedText:
    """The perplexity of one text under the start and under the trained policy."""

    file: str
    tokens: int
    after: float
    before: float | None = None

    @property
    def change(self) -> float | None:
        """The relative change, positive where the model got worse."""
        return None if self.before is None else self.after / self.before - 1

    def line(self) -> str:
        """One line for the user."""
        values = f"{self.after:.2f}"
        if self.change is not None:
            values = f"{self.before:.2f} before, {values} after"
            values += f" ({100 * self.change:+.1f} %)"
        return f"Perplexity of {Path(self.file).name}: {values}, {self.tokens:,} tokens"

    def save(self, folder: str | Path) -> None:
        """Write ``retained_text.json``."""
        content = {**asdict(self), "change": self.change}
        write_json(Path(folder) / FILE_NAME, content, indent=1)


def read_text(path: str | Path) -> str:
    """Read a text and check that a perplexity of it says something."""
    text = texts.read_text(path, "retain_data", "Give a text file.")
    if len(text.strip()) < FEWEST_CHARACTERS:
        raise InputError(
            f"retain_data {path} has {len(text.strip()):,} characters, too few for a "
            f"perplexity: give a text of {FEWEST_CHARACTERS:,} or more."
        )
    return text


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a text that is longer than what a model reads at a time."""
    level = transformers_log.get_verbosity()
    transformers_log.set_verbosity_error()
    try:
        return tokenizer.encode(text)
    finally:
        transformers_log.set_verbosity(level)


def retained_metrics(folder: str | Path) -> dict[str, Any]:
    """What a run's text says about its policy, beside a test's metrics."""
    content = read_json(Path(folder) / FILE_NAME)
    return {f"retained_text/{name}": value for name, value in content.items()}


def text_perplexity(
    model: nn.Module, tokens: list[int], window: int
) -> tuple[float, int]:
    """The perplexity per token of a whole text, read window by window."""
    if len(tokens) < 2:
        raise InputError("A perplexity needs a text of at least 2 tokens.")
    total = 0.0
    with running(model):
        for start in range(0, len(tokens) - 1, window):
            # A window begins with the last token of the one before.
            part = mx.array(tokens[start : start + window + 1])
            # All its logits at once may need more memory than a training step.
            states = plain_states(model, {"inputs": part[None, :-1]})[0]
            total += completion_logps(model, states, part[1:]).sum().item()
    # Windows have other shapes than batches: what they took is given back.
    mx.clear_cache()
    scored = len(tokens) - 1
    # Of a model that was broken by training: too large for a float.
    mean = -total / scored
    return math.exp(mean) if not mean > 700 else math.inf, scored


@contextmanager
def scored_text(
    model: nn.Module,
    tokenizer: Any,
    text_file: str | None,
    model_path: str,
    window: int,
    folder: str | None,
    start: bool = True,
) -> Iterator[None]:
    """Score a text, if there is one, before and after what happens inside."""
    if text_file is None or mx.distributed.init().rank() != 0:
        yield
        return
    tokens = encode_text(tokenizer, read_text(text_file))
    read_weights(model, model_path)
    check_sharing(model)  # Finds out whether the head may run by itself.
    before = None
    if start:
        rprint(f"Scoring {text_file}: {len(tokens):,} tokens")
        before = text_perplexity(model, tokens, window)[0]
    yield
    after, scored = text_perplexity(model, tokens, window)
    result = RetainedText(str(text_file), scored, after, before)
    rprint(result.line())
    if folder and Path(folder).is_dir():
        result.save(folder)
