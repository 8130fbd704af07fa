# Copyright © 2026 MLX Contributors

"""Generate, label and train, again and again; each phase may be done twice.

A folder has ``rounds.json`` (which round, which phase), ``prompts.json`` (names of the
prompts that the files last held), ``collected`` (answers and labels of all rounds),
``pairs/round-1`` and so on (what is trained on), ``round-1`` and so on (runs of
``mlx_lm.dpo``), ``held_out`` (answers to prompts that are not trained on) and
``rounds.jsonl``, a line for each round.
"""

import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.options import RowOptions
from ..digest import digest
from ..errors import InputError
from ..files import (
    json_text,
    remove_leftovers,
    replace_file,
    write_json,
    write_text,
    writing,
)
from ..run.loop import TrainingStopped
from ..run.reading import read_json, read_lines
from ..terminal import counted, resuming, rprint
from .answers import (
    Answers,
    answers_so_far,
    append_answers,
    read_answers,
)
from .function import LONGEST
from .generate import (
    Sampling,
    answer_prompts,
    encode_prompts,
    load_answering_model,
    summed_logps,
)
from .judges import check_judge, label_answers
from .labels import HUMAN, LABELS, read_labels
from .pairs import make_rows, write_splits
from .prompts import PromptRow, read_prompts
from .round_log import (
    LOG,
    STATE,
    answer_facts,
    compare_with_start,
    describe_line,
    describe_round,
    length_facts,
    mean_of,
    side_by_side,
    standard_error,
    warnings_of,
)

PROMPTS = "prompts.json"
PHASES = ("generate", "label", "pairs", "train", "measure")
ADAPTER = "adapters.safetensors"


@dataclass(frozen=True)
class RoundSettings:
    """What rounds are made of, beside the settings of a run."""

    model: str
    prompts: str
    judge: str
    rounds: int
    judge_timeout: float = LONGEST
    max_bad_rows: float = RowOptions.max_bad_rows
    sampling: Sampling = field(default_factory=Sampling)
    prompts_per_round: int | None = None
    held_out_prompts: str | None = None
    pairs: str = "best"
    weights: str | None = None
    replay: float = 0.0
    valid_fraction: float = 0.02
    seed: int = 0
    # The adapter that the first round starts from.
    start: str | None = None
    trust_remote_code: bool = False


def round_settings(given: Mapping[str, Any]) -> RoundSettings:
    """What rounds read of the settings of ``mlx_lm.dpo``."""
    names = {f.name for f in fields(RoundSettings)} & given.keys()
    sampling = {f.name: given[f.name] for f in fields(Sampling) if f.name in given}
    sampling["batch_size"] = given["generate_batch_size"]
    return RoundSettings(
        **{name: given[name] for name in names}, sampling=Sampling(**sampling)
    )


class Rounds:
    """The rounds in a folder; ``train`` makes a run of a folder of pairs."""

    def __init__(
        self,
        folder: str | Path,
        settings: RoundSettings,
        train: Callable[[int, Path, Path, Path | None], Any],
    ):
        self.folder, self.settings, self._make_run = Path(folder), settings, train
        self.collected = self.folder / "collected"
        self.held_out = self.folder / "held_out"
        if settings.judge == "reward":
            raise InputError(
                "rounds can't be judged by reward, which needs a trained policy in the "
                "first one: choose function, model, endpoint or human."
            )
        check_judge(settings.judge)
        self.prompts = read_prompts(settings.prompts, settings.max_bad_rows)
        self.asked = self._read_held_out()

    def _read_held_out(self) -> list[PromptRow]:
        """The prompts that are only for measuring, none of which is trained on."""
        if self.settings.held_out_prompts is None or self._is_human:
            return []
        rows = read_prompts(self.settings.held_out_prompts, self.settings.max_bad_rows)
        # Those too that were asked before the file was edited.
        asked = [PromptRow(x.id, x.prompt) for x in answers_so_far(self.collected)]
        known = {digest(one.turns) for one in (*self.prompts, *asked)}
        if both := [one.id for one in rows if digest(one.turns) in known]:
            raise InputError(
                f"held_out_prompts shares {counted(len(both), 'prompt')} with those that are "
                f"trained on, or were before, such as {both[0]!r}: remove them from it."
            )
        return rows

    @property
    def _is_human(self) -> bool:
        return self.settings.judge.partition(":")[0] == HUMAN.rstrip(":")

    def run(self) -> bool:
        """Go on with what is not done yet; False where a person's labels are awaited."""
        for place in (self.collected, self.held_out):
            with writing(place):
                place.mkdir(parents=True, exist_ok=True)
        for place in (self.folder, *filter(Path.is_dir, self.folder.rglob("*"))):
            remove_leftovers(place)
        self._tell_edits()
        first, phase = self._state()
        for number in range(first, self.settings.rounds):
            rprint(f"Round {number + 1} of {self.settings.rounds}.")
            for name in PHASES[PHASES.index(phase) :]:
                state = {"round": number, "phase": name}
                write_json(self.folder / STATE, state)
                if getattr(self, f"_{name}")(number) is False:
                    return False
            phase = PHASES[0]
        self._finish()
        return True

    def _tell_edits(self) -> None:
        """Say what changed in the files of prompts since the rounds last went on."""
        path, now = self.folder / PROMPTS, {}
        known = read_json(path)
        for name, rows, advice in (
            ("prompts", self.prompts, "What was collected stays."),
            (
                "held_out_prompts",
                self.asked,
                "Rounds before this were measured on others.",
            ),
        ):
            now[name] = [digest(x.id, x.prompt, x.row, size=8) for x in rows]
            if (before := known.get(name, now[name])) != now[name]:
                new, gone = len({*now[name]} - {*before}), len({*before} - {*now[name]})
                what = f"{new:,} new, {gone:,} gone" if new or gone else "another order"
                file = getattr(self.settings, name)
                rprint(f"[WARNING] {file} was edited: {what}. {advice}")
        write_json(path, now)

    def _state(self) -> tuple[int, str]:
        found = read_json(self.folder / STATE)
        number, phase = found.get("round", 0), found.get("phase", PHASES[0])
        is_number = type(number) is int and number >= 0
        if not is_number or phase not in (*PHASES, "done"):
            raise InputError(
                f"{self.folder / STATE} is damaged: remove it; what was done is found "
                "again."
            )
        if phase == "done":
            # More rounds may be asked for than there were.
            return number + 1, PHASES[0]
        return number, phase

    def _run_folder(self, number: int) -> Path:
        return self.folder / f"round-{number + 1}"

    def _pairs_folder(self, number: int) -> Path:
        return self.folder / "pairs" / f"round-{number + 1}"

    def _adapter(self, number: int) -> str | None:
        """The folder of the adapter that a round starts from."""
        return str(self._run_folder(number - 1)) if number else self.settings.start

    def _load(self, number: int) -> tuple[Any, Any]:
        given = self.settings
        return load_answering_model(
            given.model, self._adapter(number), given.trust_remote_code
        )

    def _of_round(self, number: int) -> list[PromptRow]:
        """The round's prompts: the next ones, from the first again after the last."""
        count = self.settings.prompts_per_round or len(self.prompts)
        places = range(number * count, number * count + min(count, len(self.prompts)))
        return [self.prompts[i % len(self.prompts)] for i in places]

    def _generate(self, number: int) -> None:
        rows = self._of_round(number)
        if not self._are_answered(self.collected, rows, number):
            model, tokenizer = self._load(number)
            answer_prompts(
                self.collected,
                rows,
                model,
                tokenizer,
                self.settings.sampling,
                number,
                max_bad_rows=self.settings.max_bad_rows,
                of=len(self.prompts),
            )

    def _are_answered(self, folder, rows, number):
        """Whether no model has to be loaded."""
        done = {one.id for one in answers_so_far(folder, number)}
        return all(row.id in done for row in rows)

    def _label(self, number: int) -> bool | None:
        if not self._is_human:
            self._judge(self.collected)
            return None
        answers, labels = self._labelled(self.collected, [number])
        waiting = [
            one
            for one in answers
            if len(one.responses) > 1
            and not any(x.is_human for x in labels.get(one.key, {}).values())
        ]
        if not waiting:
            return None
        rprint(
            f"For you to judge, {counted(len(waiting), 'prompt')}: "
            f"mlx_lm.dpo_collect --label {shlex.quote(self.settings.judge)} --output "
            f"{shlex.quote(str(self.collected))}\n"
            f"Then go on: mlx_lm.dpo {resuming(self.folder)}"
        )
        return False

    def _judge(self, folder):
        given = self.settings
        label_answers(
            folder,
            given.judge,
            longest=given.judge_timeout,
            trust_remote_code=given.trust_remote_code,
        )

    def _labelled(self, folder, numbers):
        answers = read_answers(folder)
        labels = read_labels(folder, answers)
        found = [one for one in answers if one.round in numbers]
        return found, {x.key: labels[x.key] for x in found if x.key in labels}

    def _rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        answers, labels = self._labelled(self.collected, numbers)
        given = self.settings
        return make_rows(answers, labels, given.pairs, given.weights)[0]

    def _pairs(self, number: int) -> None:
        rows = self._rows([number])
        if not rows:
            raise InputError(
                f"Round {number + 1} has no pair: the judge preferred no answer. Look "
                f"at {self.collected / LABELS}, or ask for more samples."
            )
        old = self._rows(range(number))
        order = np.random.default_rng([self.settings.seed, number]).permutation(
            len(old)
        )
        count = round(self.settings.replay * len(old))
        rows += [old[i] for i in sorted(order[:count].tolist())]
        folder = self._pairs_folder(number)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_splits(folder, rows, self.settings.valid_fraction, self.settings.seed)
        replayed = f", {count:,} of them of earlier rounds" if count else ""
        rprint(f"Round {number + 1}: {counted(len(rows), 'pair')}{replayed}.")

    def _train(self, number: int) -> None:
        folder, before = self._run_folder(number), self._run_folder(number - 1)
        try:
            self._make_run(
                number, folder, self._pairs_folder(number), before if number else None
            )
        except TrainingStopped as e:
            # The rounds go on, not one of their runs.
            raise TrainingStopped(f"{e} Go on with: {resuming(self.folder)}") from e

    def _measure(self, number: int) -> None:
        """Write the round's line of the log, and say what is to be watched."""
        answers, labels = self._labelled(self.collected, [number])
        line = {"round": number + 1, **describe_round(answers, labels)}
        line |= length_facts(self._rows([number]))
        if self.asked:
            line |= self._measure_held_out(number)
        lines = read_lines(self.folder / LOG, round=(int,))
        kept = [one for one in lines if one["round"] <= number] + [line]
        text = "".join(json_text(one) + "\n" for one in kept)
        write_text(self.folder / LOG, text)
        for said in describe_line(line):
            rprint(said)
        for warning in warnings_of(line):
            rprint(f"[WARNING] {warning}")

    def _measure_held_out(self, number: int) -> dict[str, Any]:
        """Answers to held-out prompts before all rounds and after this one, compared."""
        sampling = replace(self.settings.sampling, samples=1)
        before, after = 0, number + 1
        for at in (before, after):
            if not self._are_answered(self.held_out, self.asked, at):
                who = f"round {at}" if at else "the start"
                rprint(f"Held-out prompts, answered by {who}.")
                model, tokenizer = self._load(at)
                answer_prompts(
                    self.held_out,
                    self.asked,
                    model,
                    tokenizer,
                    sampling,
                    at,
                    max_bad_rows=self.settings.max_bad_rows,
                )
        start, now = (
            {one.id: one for one in read_answers(self.held_out, at)}
            for at in (before, after)
        )
        folder = self.held_out / f"round-{after}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        known = {one.id for one in answers_so_far(folder)}
        for name, one in now.items():
            if name in start and name not in known:
                both = [*start[name].responses, *one.responses]
                append_answers(folder, replace(one, responses=both, sampled=2))
        self._judge(folder)
        answers, labels = self._labelled(folder, [after])
        found = compare_with_start(answers, labels)
        gaps = self._log_ratios(list(now.values()))
        found["held_out/kl"] = mean_of(gaps)
        found["held_out/kl_error"] = standard_error(gaps)
        return {**found, **answer_facts(list(now.values()), "held_out/")}

    def _log_ratios(self, answers: Sequence[Answers]) -> list[float]:
        """How much likelier the policy's answers are than under the start, in nats: the
        mean is its KL from the start, of few answers below 0 at times."""
        model, tokenizer = self._load(0)
        rows = [PromptRow(one.id, one.prompt, one.row) for one in answers]
        ids = {p.row.id: p.ids for p in encode_prompts(rows, tokenizer, model, 0)}
        return [
            response.logps - summed_logps(model, ids[one.id], response.tokens)
            for one in answers
            for response in one.responses
        ]

    def _finish(self) -> None:
        """Put the last round's adapter where a run has it."""
        last = self._run_folder(self.settings.rounds - 1) / ADAPTER
        with writing(self.folder / ADAPTER):
            replace_file(self.folder / ADAPTER, lambda name: shutil.copy(last, name))
        state = {"round": self.settings.rounds - 1, "phase": "done"}
        write_json(self.folder / STATE, state)
        lines = read_lines(self.folder / LOG, round=(int,))
        for said in side_by_side(lines) if len(lines) > 1 else ():
            rprint(said)
        rounds = counted(self.settings.rounds, "round")
        rprint(f"Saved the adapter of {rounds} to {self.folder}")
