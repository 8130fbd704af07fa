# Copyright © 2026 MLX Contributors

"""Whether a model is still good at ordinary text: perplexity before and after."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from transformers.utils import logging as transformers_log

from ..cli_ui import rprint
from .atomic_files import replace_file, writing
from .policy import read_weights
from .token_scores import token_logps

FEWEST_CHARACTERS = 1000
FILE_NAME = "retained_text.json"


@dataclass
class RetainedText:
    """
    The perplexity of one text under the start and under the trained policy.

    Args:
        file (str): The text's file.
        tokens (int): Tokens that were scored.
        after (float): Perplexity per token under the policy.
        before (float, optional): The same before training.

    Example:
        >>> RetainedText("alice.txt", 20000, after=10.3, before=10.0).line()
        'Perplexity of alice.txt: 10.00 before, 10.30 after (+3.0 %), 20,000 tokens'
    """

    file: str
    tokens: int
    after: float
    before: float | None = None

    @property
    def change(self) -> float | None:
        """
        The relative change, positive where the model got worse.

        Returns:
            float: For example 0.03 for 3 %; None without a value before.

        Example:
            >>> round(RetainedText("a", 10, after=9.0, before=10.0).change, 4)
            -0.1
        """
        return None if self.before is None else self.after / self.before - 1

    def line(self) -> str:
        """
        One line for the user.

        Returns:
            str: File, perplexities, change and tokens.

        Example:
            >>> RetainedText("alice.txt", 20000, after=10.3).line()
            'Perplexity of alice.txt: 10.30, 20,000 tokens'
        """
        values = f"{self.after:.2f}"
        if self.change is not None:
            values = f"{self.before:.2f} before, {values} after"
            values += f" ({100 * self.change:+.1f} %)"
        name = Path(self.file).name
        return f"Perplexity of {name}: {values}, {self.tokens:,} tokens"

    def as_dict(self) -> dict[str, Any]:
        """
        What files hold of it.

        Returns:
            dict: The fields, and ``change``.

        Example:
            >>> RetainedText("a", 10, after=10.0, before=10.0).as_dict()["change"]
            0.0
        """
        return {**asdict(self), "change": self.change}

    def save(self, folder: str | Path) -> None:
        """
        Write ``retained_text.json``.

        Args:
            folder (str or Path): The adapter's folder.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     RetainedText("a", 10, after=9.0).save(folder)
            ...     (Path(folder) / "retained_text.json").exists()
            True
        """
        path = Path(folder) / FILE_NAME
        text = json.dumps(self.as_dict(), indent=1) + "\n"
        with writing(path):
            replace_file(path, lambda name: Path(name).write_text(text, "utf-8"))


def read_text(path: str | Path) -> str:
    """
    Read a text and check that a perplexity of it says something.

    Args:
        path (str or Path): A UTF-8 file.

    Returns:
        str: The text.

    Raises:
        ValueError: If it is missing, not text, or shorter than 1,000 characters.

    Example:
        >>> read_text("nowhere.txt")
        Traceback (most recent call last):
        ...
        ValueError: retain_data nowhere.txt can't be read: No such file or directory. \
Name a text file.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(
            f"retain_data {path} can't be read: {reason}. Name a text file."
        ) from e
    if len(text.strip()) < FEWEST_CHARACTERS:
        raise ValueError(
            f"retain_data {path} has {len(text.strip()):,} characters, too few for a "
            f"perplexity: give a text of {FEWEST_CHARACTERS:,} or more."
        )
    return text


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """
    Tokenize a text that is longer than what a model reads at a time.

    Args:
        tokenizer (TokenizerWrapper): The tokenizer.
        text (str): The text.

    Returns:
        list: Token ids, without transformers' warning about their number.

    Example:
        >>> encode_text(SimpleNamespace(encode=lambda text: [len(text)]), "abc")
        [3]
    """
    level = transformers_log.get_verbosity()
    transformers_log.set_verbosity_error()
    try:
        return tokenizer.encode(text)
    finally:
        transformers_log.set_verbosity(level)


def retained_metrics(folder: str | Path) -> dict[str, Any]:
    """
    What a run's text says about its policy, beside a test's metrics.

    Args:
        folder (str or Path): The adapter's folder.

    Returns:
        dict: What ``as_dict`` gives, ``retained_text/`` before each name; empty
        without a text.

    Example:
        >>> retained_metrics("nowhere")
        {}
    """
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return {}
    content = json.loads(path.read_text("utf-8"))
    return {f"retained_text/{name}": value for name, value in content.items()}


def text_perplexity(
    model: nn.Module, tokens: list[int], window: int
) -> tuple[float, int]:
    """
    The perplexity per token of a whole text, read window by window.

    ``exp(-mean log p(token | those before it in its window))``. A window begins
    with the last token of the one before: every token but the first is scored.

    Args:
        model (nn.Module): The model; its mode is the same afterwards.
        tokens (list): The text's token ids.
        window (int): Most tokens that the model reads at a time.

    Returns:
        tuple: The perplexity, and how many tokens were scored.

    Raises:
        ValueError: If there are fewer than 2 tokens.

    Example:
        >>> model = lambda tokens: mx.zeros((*tokens.shape, 8))
        >>> perplexity, scored = text_perplexity(model, [1, 2, 3, 4, 5], window=2)
        >>> round(perplexity, 4), scored
        (8.0, 4)
    """
    if len(tokens) < 2:
        raise ValueError("A perplexity needs a text of at least 2 tokens.")
    training = getattr(model, "training", False)
    if training:
        model.eval()
    total = 0.0
    for start in range(0, len(tokens) - 1, window):
        part = mx.array(tokens[start : start + window + 1])[None]
        total += token_logps(model(part[:, :-1]), part[:, 1:]).sum().item()
    if training:
        model.train()
    # Windows have other shapes than batches: what they took is given back.
    mx.clear_cache()
    scored = len(tokens) - 1
    # Of a model that was broken by training: too large for a float.
    mean = -total / scored
    return math.exp(mean) if not mean > 700 else math.inf, scored


@contextmanager
def scored_text(
    args: SimpleNamespace, model: nn.Module, tokenizer: Any, start: bool = True
) -> Iterator[None]:
    """
    Score the text that ``retain_data`` names before and after what happens inside.

    The first rank does it, prints one line and writes ``retained_text.json``.

    Args:
        args (SimpleNamespace): For ``retain_data``, ``max_seq_length``, ``model``
            and ``adapter_path``.
        model (nn.Module): The policy, at its start.
        tokenizer (TokenizerWrapper): Its tokenizer.
        start (bool): Score it before, too. Default: ``True``.

    Raises:
        ValueError: If the text is unusable.

    Example:
        >>> with scored_text(SimpleNamespace(retain_data=None), None, None):
        ...     pass
    """
    if args.retain_data is None or mx.distributed.init().rank() != 0:
        yield
        return
    tokens = encode_text(tokenizer, read_text(args.retain_data))
    read_weights(model, args.model)
    before = None
    if start:
        rprint(f"Scoring {args.retain_data}: {len(tokens):,} tokens")
        before = text_perplexity(model, tokens, args.max_seq_length)[0]
    yield
    after, scored = text_perplexity(model, tokens, args.max_seq_length)
    result = RetainedText(str(args.retain_data), scored, after, before)
    rprint(result.line())
    if args.adapter_path and Path(args.adapter_path).is_dir():
        result.save(args.adapter_path)
