# Copyright © 2026 MLX Contributors

"""Fixed prompts, answered greedily at every validation."""

import json
from pathlib import Path
from typing import Any

import mlx.nn as nn
from rich.cells import cell_len, set_cell_size

from ...tuner.callbacks import TrainingCallback
from ..data.messages import as_messages
from ..data.render import ChatRenderer
from ..errors import InputError
from ..files import append_text, json_text, write_text
from ..forward.frozen import running
from ..run.reading import read_lines
from ..terminal import rprint
from .texts import read_lines_of

FILE_NAME = "samples.jsonl"
WIDTH = 80
Prompt = str | list[dict[str, Any]]
# What a line of the file has, beside the reference's answer where there is one.
LINE = {"iteration": (int,), "prompt": (str, list), "answer": (str,)}


def read_prompts(given: Any) -> list[Prompt]:
    """The prompts that a setting names."""
    where, rows = "sample_prompts", given
    if isinstance(given, str):
        where, rows = f"sample_prompts {given}", _read_file(given)
    if not isinstance(rows, list):
        raise InputError(f"sample_prompts must be a list or a file, got {given!r}.")
    if not rows:
        raise InputError(f"{where} has no prompts: give at least one.")
    return [_prompt(row, f"{where}, prompt {i}") for i, row in enumerate(rows, 1)]


def _read_file(path):
    advice = "Give a text with one prompt a line, or .jsonl."
    lines = read_lines_of(path, "sample_prompts", advice)
    if not path.lower().endswith(".jsonl"):
        return [line for _, line in lines]
    rows = []
    for number, line in lines:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as e:
            reason = f"line {number} is no JSON ({e})"
            raise InputError(
                f"sample_prompts {path} can't be read: {reason}. {advice}"
            ) from e
    return rows


def _prompt(row, where):
    if isinstance(row, dict):
        row = row.get("messages", row.get("prompt"))
    messages = isinstance(row, list) and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in row
    )
    if not row or not (isinstance(row, str) or messages):
        raise InputError(
            f"{where} is no prompt: give a text, or messages with role and content."
        )
    return row


def encode_prompts(tokenizer: Any, prompts: list[Prompt]) -> list[list[int]]:
    """The token ids of prompts, as generation begins with them."""
    return [_encode(tokenizer, x, i) for i, x in enumerate(prompts, 1)]


def _encode(tokenizer, prompt, number):
    if tokenizer.has_chat_template:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        try:
            # As rows of data are read: parts of texts are joined.
            messages = as_messages(prompt, "messages")
            with ChatRenderer(tokenizer).guarded():
                return tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True
                )
        except Exception as e:
            # Each template fails in its own way.
            raise InputError(
                f"sample_prompts, prompt {number}: the chat template can't write it "
                f"({type(e).__name__}: {e}). Give messages with texts as content."
            ) from e
    if not isinstance(prompt, str):
        raise InputError(
            "sample_prompts has messages, which need a chat template, and the "
            "tokenizer has none: give texts."
        )
    return tokenizer.encode(prompt)


class PromptSamples(TrainingCallback):
    """Answer prompts whenever a validation is reported, and keep the answers."""

    # It draws no random number: a run with samples trains the same bits as one without.

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: list[Prompt],
        path: str | Path,
        max_tokens: int = 100,
        keep: int = -1,
        reference: nn.Module | None = None,
    ):
        self.model, self.tokenizer, self.path = model, tokenizer, Path(path)
        self.max_tokens = max_tokens
        self.prompts = list(zip(prompts, encode_prompts(tokenizer, prompts)))
        lines = read_lines(self.path, **LINE)
        kept = [json_text(x) + "\n" for x in lines if x["iteration"] <= keep]
        write_text(self.path, "".join(kept))
        self._starts_as_reference = reference is model
        self._beside: list[str | None] = [None] * len(prompts)
        if reference is not None:
            self._ask(reference, lines)

    def _ask(self, reference, lines):
        """Have the reference answer what it did not answer before."""
        known = {json_text(x["prompt"]): x.get("reference") for x in lines}
        known = {k: x for k, x in known.items() if isinstance(x, str)}
        keys = [json_text(prompt) for prompt, _ in self.prompts]
        new = [x for k, x in zip(keys, self.prompts) if k not in known]
        try:
            answers = self._answers(reference, new)
        except Exception as e:
            # What looks on never ends a run.
            rprint(f"[WARNING] The reference's answers are left out: {e!r}")
            return
        known |= {json_text(x): answer for (x, _), answer in zip(new, answers)}
        self._beside = [known[key] for key in keys]
        for (prompt, _), answer in zip(new, answers):
            # Before the first step the policy says the same.
            if not self._starts_as_reference:
                rprint(sample_line("ref", prompt, answer))

    def on_val_loss_report(self, val_info: dict) -> None:
        it = val_info["iteration"]
        lines: list[dict] = []
        known = [x for x in self._beside if x is not None]
        # Before the first step the policy says what the reference does.
        is_same = it == 0 and self._starts_as_reference
        answers = (
            known if is_same and len(known) == len(self.prompts) else self.answers()
        )
        for (prompt, _), answer, other in zip(self.prompts, answers, self._beside):
            line = {"iteration": it, "prompt": prompt, "answer": answer}
            lines.append(line if other is None else line | {"reference": other})
            rprint(sample_line(it, prompt, answer))
        append_text(self.path, "".join(json_text(line) + "\n" for line in lines))

    def answers(self) -> list[str]:
        """Answer all prompts."""
        return self._answers(self.model, self.prompts)

    def _answers(self, asked, prompts):
        # Only here: it is large, and few runs need it.
        from ...generate import generate

        with running(asked) as model:
            return [
                generate(model, self.tokenizer, ids, max_tokens=self.max_tokens)
                for _, ids in prompts
            ]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a text to show."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def sample_line(it: int | str, prompt: Prompt, answer: str, width: int = WIDTH) -> str:
    """An answer in one line of the log."""
    head, prompt = f"  {it:>5}  says  ", _one_line(prompt_text(prompt))
    prompt = _cut(prompt, max((width - len(head)) // 4, 1))
    return _cut(f"{head}{prompt} → {_one_line(answer)}", width)


def _one_line(text):
    return "".join(x if x.isprintable() else " " for x in " ".join(text.split()))


def _cut(text, width):
    """Cut a text to columns of the screen; wide characters take two."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1).rstrip() + "…"
