# Copyright © 2026 MLX Contributors

"""Judges that are models on this machine: what they would say, or what they learned."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from ...models.cache import make_prompt_cache
from ..batch.collate import collate_pairs
from ..data.content import RowFault
from ..data.pairs import PreferenceRow, template_kwargs
from ..data.row import Row
from ..data.tokenizer import PairTokenizer
from ..errors import InputError
from ..forward.answers import paired_sequence_logps
from ..forward.frozen import FrozenStart
from ..objective.objective import objective_of
from ..policy.model import (
    load_model,
    most_positions,
    read_weights,
)
from ..policy.reference import load_reference_model
from ..policy.start import load_weights
from ..run.setup import make_policy
from ..settings.begin import settle
from ..settings.table import CONFIG_DEFAULTS
from ..terminal import rprint
from .answers import Answers
from .compare import compare
from .labels import NONE, SCORES, TIE, certainty
from .verdicts import Verdict

_STEP = 2048
_LETTERS = "A", "B"
_ASK = "\nReply with one letter, A or B.\n"
# Less of the probability on both letters: the model answers something else.
_LITTLE = 0.1


class ModelJudge:
    """Which of two letters a model would write next, in both orders."""

    def __init__(self, path: str, trust_remote_code: bool = False):
        rprint(f"Loading the judge {path}")
        self.model, self.tokenizer = load_model(path, trust_remote_code)
        read_weights(self.model, path)
        self.model.eval()
        self._path = path
        self._letters: list[list[int]] = []
        self._limit = most_positions(self.model) or 2**30
        self._mass: list[float] = []

    def __call__(self, prompt: Any, responses: list[str], row: dict) -> Verdict:
        """Compare all responses."""
        return compare(prompt, responses, self._prefer)

    def notes(self) -> list[str]:
        """What should be known of its labels."""
        mean = sum(self._mass) / max(len(self._mass), 1)
        if not self._mass or mean >= _LITTLE:
            return []
        return [
            f"[WARNING] {self._path} gives A and B only {mean:.1%} of the probability "
            "of what it would write: it may not be able to judge."
        ]

    def _prefer(self, question: str) -> float | str:
        text = self._rendered(question + _ASK)
        tokens = self._encode(text)
        if len(tokens) > self._limit:
            return f"longer than the {self._limit:,} tokens that the judge reads"
        if not self._letters:
            self._letters = [self._ids(text, tokens, letter) for letter in _LETTERS]
        logps = next_logps(self.model, tokens)
        first, second = (
            mx.logsumexp(logps[mx.array(ids)]).item() for ids in self._letters
        )
        self._mass.append(math.exp(first) + math.exp(second))
        return 1 / (1 + math.exp(min(second - first, 700)))

    def _rendered(self, text):
        if not self.tokenizer.has_chat_template:
            return f"{text}Letter:"
        messages = [{"role": "user", "content": text}]
        # A thought would come before the letter.
        options = {"enable_thinking": False} if self.tokenizer.has_thinking else {}
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **options
        )

    def _encode(self, text):
        bos = self.tokenizer.bos_token
        is_begun = self.tokenizer.has_chat_template or bos and text.startswith(bos)
        return self.tokenizer.encode(text, add_special_tokens=not is_begun)

    def _ids(self, text, tokens, letter):
        """The tokens that a letter may begin with behind the question."""
        found = []
        for way in (letter, f" {letter}"):
            longer = self._encode(text + way)
            if longer[:-1] == tokens and longer[-1] not in found:
                found.append(longer[-1])
        if not found:
            raise InputError(
                f"{self._path} can't judge: {letter!r} is no token of its own there. "
                "Take another model."
            )
        return found


def next_logps(model: Any, tokens: list[int]) -> mx.array:
    """Log-probs of the token that follows some others. Shape: ``(V,)``."""
    cache = make_prompt_cache(model)
    inputs = mx.array(tokens)[None]
    for start in range(0, len(tokens) - 1, _STEP):
        model(inputs[:, start : min(start + _STEP, len(tokens) - 1)], cache=cache)
        # Not the logits, which nobody needs.
        mx.eval([layer.state for layer in cache])
    logits = model(inputs[:, -1:], cache=cache)[0, -1].astype(mx.float32)
    return logits - mx.logsumexp(logits)


class RewardJudge:
    """How much likelier each response is under a trained policy than under its start."""

    def __init__(self, model: str | None, adapter_path: str | None, **given: Any):
        if not model or not adapter_path:
            raise InputError(
                "The reward judge needs --model and the --adapter-path of a mlx_lm.dpo "
                "run."
            )
        explicit = {"test", "adapter_path", "model", "data", *given}
        # It reads no data, which a test would need.
        given |= {"model": model, "adapter_path": adapter_path, "data": "answers"}
        args = SimpleNamespace(**CONFIG_DEFAULTS, explicit=explicit)
        vars(args).update(given, test=True)
        settle(args)
        rprint(f"Loading the judge {model} with {adapter_path}")
        self.model, self.tokenizer = load_model(model, args.trust_remote_code)
        self.start = load_reference_model(args.reference_model, self.tokenizer)
        make_policy(args, self.model)
        self.start = self.start or FrozenStart(self.model)
        load_weights(self.model, Path(adapter_path) / "adapters.safetensors")
        read_weights(self.model, model)
        self.model.eval()
        self._objective = objective_of(args)
        self._encode = PairTokenizer(self.tokenizer, template_date=args.template_date)
        self._longest = args.max_seq_length

    def __call__(self, answers: Answers) -> Verdict:
        """Score all responses to a prompt."""
        prompt = answers.prompt
        said = [x for x in answers.responses if x.text.strip()]
        if len(said) < 2:
            return Verdict(NONE, why="fewer than two answers say anything")
        is_text = isinstance(prompt, str)
        kwargs = {} if is_text else template_kwargs(Row(answers.row))
        found = self._encode(
            [
                PreferenceRow(
                    prompt,
                    x.text if is_text else [{"role": "assistant", "content": x.text}],
                    None,
                    "answers",
                    template_kwargs=kwargs,
                    chosen_tokens=x.tokens,
                )
                for x in said
            ]
        )
        pairs = []
        for one in found:
            if isinstance(one, RowFault):
                return Verdict(NONE, why=str(one))
            pairs.append((one.prompt, one.chosen))
        rewards = self._rewards(pairs)
        if not all(map(math.isfinite, rewards)):
            return Verdict(NONE, why="a reward is not finite")
        if len({*rewards}) == 1:
            return Verdict(TIE)
        given = iter(round(reward, 6) for reward in rewards)
        # No answer is an opinion of the policy's length, not of what it says.
        scores = [next(given) if x.text.strip() else None for x in answers.responses]
        return Verdict(SCORES, scores=scores, certainty=certainty(scores))

    def _rewards(self, answers):
        """Rewards in nats; two answers make a batch, the last one twice if it is odd."""
        rewards: list[float] = []
        for i in range(0, len(answers), 2):
            (prompt, first), (_, second) = (
                answers[i],
                answers[min(i + 1, len(answers) - 1)],
            )
            sides = [np.array(x, np.int32) for x in (prompt, first, second)]
            size = len(prompt)
            lengths = size, size + len(first), size + len(second)
            batch = collate_pairs([(*sides, lengths)])
            policy, start, _ = paired_sequence_logps(self.model, self.start, batch)
            rewards += (self._objective.beta * (policy - start)).tolist()
        return rewards[: len(answers)]
