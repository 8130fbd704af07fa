# Copyright © 2026 MLX Contributors

"""A model's answers to prompts, in batches, each prompt computed once for its samples."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...generate import BatchGenerator
from ...models.cache import make_prompt_cache
from ...sample_utils import apply_top_p
from ...tuner.utils import load_adapters
from ..data.content import RowFault
from ..data.options import RowOptions
from ..data.pairs import template_kwargs
from ..data.row import Row
from ..data.tokenizer import PairTokenizer
from ..digest import digest
from ..errors import InputError
from ..files import json_text, writing
from ..forward.frozen import running
from ..forward.tokens import token_logps
from ..policy.model import load_model, most_positions, read_weights
from ..reference.fingerprint import model_fingerprint
from ..run.lock import folder_kept, keep_folder
from ..terminal import counted, rprint
from ..watch.samples import prompt_text
from .answers import (
    LENGTH,
    STOP,
    Answers,
    Response,
    answers_so_far,
    append_answers,
    read_answers,
)
from .progress import AnswerProgress
from .prompts import PromptRow, read_prompts, skip_rows

# Prompts are answered in groups that are begun anew as a whole after a kill: numbers
# depend a little on what is computed beside them. So many batches make a group.
GROUP_BATCHES = 4
PREFILL_STEP = 2048
# Random keys that are made at a time: few answers are as long as they may be.
KEYS = 2**16
# What a damaged adapter, or one of another model, raises as it is loaded.
_UNUSABLE = OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled."""

    samples: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature and self.samples > 1:
            raise InputError(
                "At temperature 0 all samples are equal: raise --temperature, or take "
                "one sample."
            )

    @property
    def shown(self) -> dict[str, Any]:
        """What a line of answers holds of it; the size of a batch is no part of it."""
        return {
            k: x for k, x in asdict(self).items() if k not in ("batch_size", "seed")
        }


class _Sampler:
    """Draws the tokens of one answer with keys of its own."""

    def __init__(self, sampling: Sampling, *name: Any):
        self._sampling, self._keys = sampling, self._make_keys(name)

    def _make_keys(self, name):
        size = min(self._sampling.max_tokens + 1, KEYS)
        for block in count():
            more = (block,) if block else ()
            number = int(digest(self._sampling.seed, *name, *more, size=8), 16)
            keys = mx.random.split(mx.random.key(number), size)
            yield from (keys[i] for i in range(size))

    def __call__(self, logprobs: mx.array) -> mx.array:
        if not self._sampling.temperature:
            return mx.argmax(logprobs, axis=-1)
        if self._sampling.top_p < 1:
            logprobs = apply_top_p(logprobs, self._sampling.top_p)
        scaled = logprobs / self._sampling.temperature
        return mx.random.categorical(scaled, key=next(self._keys))


class _Float32:
    """A model whose logits are float32: sums over a vocabulary need them."""

    def __init__(self, model: nn.Module):
        self._model = model

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        return self._model(tokens, cache=cache).astype(mx.float32)


@dataclass
class _Encoded:
    """A prompt with its ids."""

    row: PromptRow
    ids: list[int]


def generate_answers(
    folder: str | Path,
    prompts: str | Path,
    model_path: str,
    adapter_path: str | None = None,
    *,
    sampling: Sampling,
    another_model: bool = False,
    max_bad_rows: float = RowOptions.max_bad_rows,
    trust_remote_code: bool = False,
) -> None:
    """Answer the prompts of a file with a model, into a folder; go on where it ended."""
    rows = read_prompts(prompts, max_bad_rows)
    rprint(f"{prompts}: {counted(len(rows), 'prompt')}.")
    model, tokenizer = load_answering_model(model_path, adapter_path, trust_remote_code)
    with folder_kept(folder, "--output"):
        with writing(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
        keep_folder(folder)
        answer_prompts(
            folder,
            rows,
            model,
            tokenizer,
            sampling,
            another_model=another_model,
            max_bad_rows=max_bad_rows,
        )


def load_answering_model(
    path: str, adapter_path: str | None = None, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """Load a model with its weights, and an adapter of any of mlx-lm's commands."""
    rprint("Loading pretrained model")
    model, tokenizer = load_model(path, trust_remote_code)
    if adapter_path is not None:
        try:
            load_adapters(model, adapter_path)
        except _UNUSABLE as e:
            reason = " ".join(str(e).split())
            raise InputError(
                f"Can't load the adapter {adapter_path}: {reason}. Name the folder that "
                "was trained from this model."
            ) from e
    read_weights(model, path)
    return model.eval(), tokenizer


def answer_prompts(
    folder: str | Path,
    rows: Sequence[PromptRow],
    model: nn.Module,
    tokenizer: Any,
    sampling: Sampling,
    round: int = 0,
    another_model: bool = False,
    max_bad_rows: float = RowOptions.max_bad_rows,
    of: int | None = None,
) -> list[Answers]:
    """Answer prompts that have no answers in a folder yet; return those of the round.
    They may be some ``of`` so many, of which a share may be bad."""
    name = model_fingerprint(model)
    done = _answered(folder, round, name, sampling, another_model)
    encoded = encode_prompts(
        rows, tokenizer, model, sampling.max_tokens, max_bad_rows, of
    )
    if not encoded:
        raise InputError("No prompt is left to answer: see the lines above.")
    edited = [p.row for p in encoded if _is_edited(p.row, done.get(p.row.id))]
    if edited:
        rprint(
            f"[WARNING] {counted(len(edited), 'prompt')} edited after the answers, such "
            f"as {edited[0].id!r} ({edited[0].place}). What was answered stays; give "
            "another id to what is to be answered anew."
        )
    size = GROUP_BATCHES * max(sampling.batch_size // sampling.samples, 1)
    groups = [encoded[i : i + size] for i in range(0, len(encoded), size)]
    left = sum(p.row.id not in done for p in encoded)
    if len(encoded) > left:
        before = f"{len(encoded) - left:,} of {counted(len(encoded), 'prompt')}"
        rprint(f"Answered before: {before}.")
    groups = [group for group in groups if any(p.row.id not in done for p in group)]
    count = sum(map(len, groups)) * sampling.samples
    with running(model), AnswerProgress(count, sampling.max_tokens) as progress:
        for group in groups:
            given = model, tokenizer, sampling, round, progress.add
            for prompt, responses in _answer(group, *given):
                if prompt.row.id not in done:
                    answers = _line(prompt.row, responses, sampling, round, name)
                    append_answers(folder, answers)
    found = read_answers(folder, round)
    if left:
        rprint(describe_answers(found))
    return found


def _answered(
    folder: str | Path, round: int, name: str, sampling: Sampling, another_model: bool
) -> dict[str, Answers]:
    """The answers of this round by their ids, of the same model and sampling."""
    before = answers_so_far(folder, round)
    others = {
        "another model": any(one.model != name for one in before),
        "another sampling": any(one.sampling != sampling.shown for one in before),
        "another seed": any(one.seed != sampling.seed for one in before),
    }
    if (
        found := [what for what, is_so in others.items() if is_so]
    ) and not another_model:
        raise InputError(
            f"The answers in {folder} come from {found[0]}: give a folder of its own "
            "with --output, or go on there with --another-model."
        )
    return {one.id: one for one in before}


def _is_edited(row: PromptRow, answered: Answers | None) -> bool:
    """Whether a prompt or its columns are not what was answered under its name."""
    if answered is None:
        return False
    before = PromptRow(row.id, answered.prompt, answered.row)
    return json_text([row.turns, row.row]) != json_text([before.turns, before.row])


def encode_prompts(
    rows: Sequence[PromptRow],
    tokenizer: Any,
    model: nn.Module,
    max_tokens: int,
    max_bad_rows: float = RowOptions.max_bad_rows,
    of: int | None = None,
) -> list[_Encoded]:
    """The ids of prompts as training has them; those too long for the model are named."""
    encode = PairTokenizer(tokenizer)
    most = most_positions(model)
    found, too_long, faults = [], [], []
    for row in rows:
        if encode.has_chat_template:
            row = replace(row, prompt=row.turns)
        try:
            ids = encode.prompt_ids(row.prompt, template_kwargs(Row(row.row)))
            if not ids:
                raise RowFault("a prompt without tokens")
        except RowFault as fault:
            faults.append((row.place, fault))
            continue
        if most is not None and len(ids) + max_tokens > most:
            too_long.append(
                f"{prompt_text(row.prompt)!r:.40} ({counted(len(ids), 'token')})"
            )
        else:
            found.append(_Encoded(row, ids))
    skip_rows("The prompts", faults, of or len(rows), max_bad_rows)
    if too_long:
        rprint(
            f"Left out, too long for {most:,} positions with max_tokens {max_tokens:,}: "
            f"{', '.join(too_long[:3])}"
            + (f" and {len(too_long) - 3:,} more." if len(too_long) > 3 else ".")
        )
    if encode.has_chat_template and found and not _opens_answer(tokenizer):
        rprint(
            "The chat template has no generation prompt: answers begin right after the "
            "last turn."
        )
    return found


def _opens_answer(tokenizer):
    """Whether the template writes anything before an answer."""
    turn = [{"role": "user", "content": "?"}]
    both = (
        tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=on)
        for on in (False, True)
    )
    return len(set(both)) > 1


def _prefill(model, ids):
    """The cache after all but the last token of a prompt."""
    cache, tokens = make_prompt_cache(model), mx.array([ids[:-1]])
    while tokens.shape[1]:
        model(tokens[:, :PREFILL_STEP], cache=cache)
        mx.eval([c.state for c in cache])
        tokens = tokens[:, PREFILL_STEP:]
    return cache


def _answer(
    group: list[_Encoded],
    model: nn.Module,
    tokenizer: Any,
    sampling: Sampling,
    round: int = 0,
    progress: Callable[[int, list[str]], None] = lambda tokens, ends: None,
) -> Iterator[tuple[_Encoded, list[Response]]]:
    """Yield each prompt of a group with its samples, in their order."""
    size, samples = sampling.batch_size, sampling.samples
    generator = BatchGenerator(
        _Float32(model),
        max_tokens=sampling.max_tokens,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=size,
        prefill_batch_size=size,
    )
    waiting, going = deque(group), deque[tuple[_Encoded, list[int]]]()
    tokens: dict[int, list[int]] = {}
    logps: dict[int, float] = {}
    ended: dict[int, Response] = {}
    try:
        while waiting or going:
            running_now = len(tokens) - len(ended)
            while waiting and (not running_now or running_now + samples <= size):
                prompt = waiting.popleft()
                with mx.stream(generator.stream):
                    cache = _prefill(model, prompt.ids)
                uids = generator.insert(
                    [prompt.ids[-1:]] * samples,
                    # They are copied when they become parts of a batch.
                    caches=[cache] * samples,
                    samplers=[
                        _Sampler(sampling, prompt.row.id, round, i)
                        for i in range(samples)
                    ],
                )
                going.append((prompt, uids))
                tokens |= {uid: [] for uid in uids}
                logps |= dict.fromkeys(uids, 0.0)
                running_now += samples
            responses = generator.next_generated()
            chosen = mx.stack([r.logprobs[r.token] for r in responses]).tolist()
            if not all(map(math.isfinite, chosen)):
                raise InputError(
                    "The model's numbers are not finite: its weights, or those of the "
                    "adapter, are damaged. Copy them again, or take another checkpoint."
                )
            for r, logp in zip(responses, chosen):
                tokens[r.uid].append(r.token)
                logps[r.uid] += logp
                if r.finish_reason is not None:
                    ended[r.uid] = _response(tokenizer, tokens[r.uid], r, logps[r.uid])
            ends = [r.finish_reason for r in responses if r.finish_reason]
            progress(len(responses), ends)
            while going and all(uid in ended for uid in going[0][1]):
                prompt, uids = going.popleft()
                yield prompt, [ended[uid] for uid in uids]
    finally:
        generator.close()


def summed_logps(model: nn.Module, prompt: list[int], tokens: list[int]) -> float:
    """The log-probability of an answer in nats, at temperature 1."""
    logits = model(mx.array([prompt + tokens[:-1]]))[:, len(prompt) - 1 :]
    return token_logps(logits, mx.array([tokens])).sum().item()


def _response(tokenizer, tokens, last, logps):
    is_stop = last.finish_reason == STOP
    text = tokenizer.decode(tokens[:-1] if is_stop else tokens)
    return Response(text, tokens, STOP if is_stop else LENGTH, logps)


def _line(row, responses, sampling, round, name):
    # Equal answers once, the first.
    kept = {tuple(one.tokens): one for one in reversed(responses)}
    kept = [one for one in responses if kept.get(tuple(one.tokens)) is one]
    return Answers(
        row.id,
        row.prompt,
        kept,
        round,
        row.row,
        sampling.shown,
        name,
        sampling.seed,
        len(responses),
    )


def describe_answers(answers: Sequence[Answers]) -> str:
    """How many answers there are, how they ended, and how long they are."""
    found = [one for line in answers for one in line.responses]
    sampled = sum(line.sampled for line in answers)
    text = f"{counted(len(answers), 'prompt')}, {counted(len(found), 'answer')}"
    if sampled > len(found):
        text += f" ({counted(sampled - len(found), 'equal one')} left out)"
    stopped = sum(one.finished for one in found) / max(len(found), 1)
    length = sum(len(one.tokens) for one in found) / max(len(found), 1)
    tokens = counted(round(length), "token")
    return f"{text}, {tokens} on average, {stopped:.0%} ended by the model."
