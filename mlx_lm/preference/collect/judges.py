# Copyright © 2026 MLX Contributors

"""Judges: what says which of some responses are better, and how it is asked.

A judge is called with the prompt, the texts of the responses and the prompt's other
columns. It returns a score for each response; a ranking, groups of their numbers, the
best first; "tie" or "bad"; or None, if it can't tell. Nothing else becomes a label.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..policy.model import check_model_folder
from ..terminal import counted, rprint
from .answers import Answers, read_answers
from .endpoint import Endpoint, read_address
from .function import LONGEST, find_function
from .labels import (
    BAD,
    HUMAN,
    NONE,
    RANKING,
    REWARD,
    SCORES,
    TIE,
    Label,
    append_label,
    read_labels,
)
from .local import ModelJudge, RewardJudge
from .progress import JudgeProgress
from .summary import agreement_lines, order_lines
from .verdicts import Verdict

# The reward's judge reads the tokens too.
Judge = Callable[[Any, list[str], dict[str, Any]], Verdict] | RewardJudge
KINDS = "human, function:FILE.py:NAME, model:PATH, endpoint:URL:MODEL, reward"


def load_judge(
    spec: str,
    longest: float = LONGEST,
    model: str | None = None,
    adapter_path: str | None = None,
    trust_remote_code: bool = False,
) -> Judge:
    """Load a judge that needs no person; ``reward`` is of a model and its adapter."""
    check_judge(spec)
    kind, _, rest = spec.partition(":")
    if kind == "function":
        return find_function(rest, longest)
    if kind == "model":
        return ModelJudge(rest, trust_remote_code)
    if kind == "endpoint":
        return Endpoint(rest, longest)
    return RewardJudge(model, adapter_path, trust_remote_code=trust_remote_code)


def check_judge(spec: str) -> None:
    """Check what can be known of a judge without loading a model or asking a server."""
    kind, _, rest = spec.partition(":")
    if kind == "function":
        find_function(rest)
    elif kind == "endpoint":
        read_address(rest)
    elif kind == "model" and rest:
        check_model_folder(rest)
    elif kind != HUMAN.rstrip(":") and spec != REWARD:
        raise InputError(f"A judge is one of {KINDS}: got {spec!r}.")


def label_answers(
    folder: str | Path, name: str, judge: Judge | None = None, **given: Any
) -> Counter[str]:
    """Have a judge label what it has not labelled yet, and count its verdicts."""
    answers = read_answers(folder)
    mine = {
        key: labels[name]
        for key, labels in read_labels(folder, answers).items()
        if name in labels
    }
    # What failed before, such as an endpoint that was down, is tried again.
    done = Counter(x.verdict for x in mine.values() if x.verdict != NONE)
    waiting = [
        one
        for one in answers
        if len(one.responses) > 1
        and (one.key not in mine or mine[one.key].verdict == NONE)
    ]
    reasons: Counter[str] = Counter()
    if waiting:
        judge = judge or load_judge(name, **given)
        if done:
            rprint(f"{name}: {counted(done.total(), 'prompt')} labelled before.")
        with JudgeProgress(len(waiting)) as progress:
            for one in waiting:
                said = _ask(judge, one)
                label = Label(one.id, name, round=one.round, of=one.mark, **vars(said))
                append_label(folder, label)
                done[said.verdict] += 1
                reasons[said.why or ""] += said.verdict == NONE
                progress.add()
    rprint(f"{name}: {described(done)}.")
    for reason, count in (+reasons).most_common(3):
        rprint(f"[WARNING] {counted(count, 'prompt')} without a verdict: {reason}.")
    labels = read_labels(folder, answers)
    notes: list[str] = getattr(judge, "notes", list)()
    sizes = {one.key: len(one.responses) for one in answers}
    for line in (*notes, *order_lines(labels, name), *agreement_lines(labels, sizes)):
        rprint(line)
    return done


def described(verdicts: Mapping[str, int]) -> str:
    """Say how often each verdict was given."""
    ranked = verdicts.get(SCORES, 0) + verdicts.get(RANKING, 0)
    parts = [f"{counted(ranked, 'prompt')} with a best answer"]
    for verdict, text in ((TIE, "tied"), (BAD, "all bad"), (NONE, "without a verdict")):
        if count := verdicts.get(verdict, 0):
            parts.append(f"{count:,} {text}")
    return ", ".join(parts)


def _ask(judge: Judge, one: Answers) -> Verdict:
    if isinstance(judge, RewardJudge):
        return judge(one)
    texts = [response.text for response in one.responses]
    return judge(one.prompt, texts, one.row)
