# Copyright © 2026 MLX Contributors

"""What looks on while a run goes."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ... import lora
from ..errors import InputError
from ..features import Feature
from ..setting import Setting
from . import retained_text
from .samples import read_prompts
from .trackers import SERVICES, missing_tracker, reporting_callbacks, service_names
from .watchers import WatchedRun, run_watchers


def _watchers() -> Iterable[Setting]:
    own: dict[str, Any] = {"resume": "free", "per_rank": True}
    file: dict[str, Any] = {"metavar": "FILE", "outside": True, **own}
    what = (
        "Prompts to answer greedily at every validation: a file, one a line or .jsonl; "
        "in YAML also a list."
    )
    yield Setting("sample_prompts", None, what, **file)
    what = "Most tokens of such an answer."
    yield Setting("sample_tokens", 100, what, least=1, **own)
    what = "File of an ordinary text, whose perplexity is taken before and after."
    yield Setting("retain_data", None, what, kind=str, **file)
    what = (
        "Where to log: wandb, swanlab, tensorboard, trackio, or several such as "
        "wandb,trackio."
    )
    name, default = "report_to", lora.CONFIG_DEFAULTS["report_to"]
    yield Setting(name, default, what, kind=str, outside=True, **own)
    name, default = "project_name", lora.CONFIG_DEFAULTS["project_name"]
    yield Setting(name, default, "Project name for them.", kind=str, **own)


class _Watch(Feature):
    def settings(self) -> dict[str, Iterable[Setting]]:
        return {"What looks on": _watchers()}

    def check(self, args: Any) -> None:
        if args.sample_prompts is not None:
            read_prompts(args.sample_prompts)
        if args.retain_data is not None:
            retained_text.read_text(args.retain_data)
        for name in service_names(args.report_to):
            if name not in SERVICES:
                raise InputError(
                    f"Unknown report_to {name!r}, choose from {', '.join(SERVICES)}."
                )
            if missing := missing_tracker(name):
                raise InputError(f"report_to needs {missing}: pip install {missing}")

    def after_weights(self, job: Any) -> None:
        args = job.args
        compared = job.settings.objective.needs_reference
        job.kept["watched"] = WatchedRun(
            Path(args.adapter_path),
            job.model,
            job.tokenizer,
            job.valid_set,
            # Rewards are measured from the policy as it was.
            compared and not (job.reference_model or args.sync_reference),
            args.sample_prompts,
            args.sample_tokens,
        )
        if compared and args.sample_prompts is not None:
            job.kept["asked"] = job.reference_model or job.model

    def before_folder(self, job: Any) -> None:
        job.kept["watched"].check()

    def services(self, job: Any, config: dict) -> Iterable[Any]:
        args = job.args
        given = args.report_to, args.project_name, args.adapter_path
        return [reporting_callbacks(*given, config)]

    def watchers(self, job: Any) -> Iterable[Any]:
        asked = job.kept.pop("asked", None)
        return run_watchers(job.kept["watched"], job.state, asked)

    def around_training(self, job: Any) -> AbstractContextManager:
        # What has answered is let go, also where it was not asked.
        job.kept.pop("asked", None)
        return score_text(job.args, job.model, job.tokenizer)


def score_text(
    args: Any, model: Any, tokenizer: Any, start: bool = True
) -> AbstractContextManager:
    """Score ordinary text before and after what happens inside."""
    given = args.retain_data, args.model, args.max_seq_length, args.adapter_path
    return retained_text.scored_text(model, tokenizer, *given, start=start)


FEATURE = _Watch()
