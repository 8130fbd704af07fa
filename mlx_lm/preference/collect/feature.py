# Copyright © 2026 MLX Contributors

"""Rounds as a part of the command ``mlx_lm.dpo``: their settings, and their runs."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import InputError
from ..features import Feature
from ..files import replace_file, writing
from ..objective.objective import objective_of
from ..policy.adapter import adapter_config
from ..policy.start import load_weights
from ..run.checkpoint import newest_state
from ..run.folder import saved_settings
from ..run.lock import folder_kept, keep_folder
from ..setting import Setting
from ..terminal import resuming, rprint
from .round_log import STATE

_TEXT: dict[str, Any] = {"kind": str}
_COUNT: dict[str, Any] = {"kind": int, "least": 1}
_FILE: dict[str, Any] = {"metavar": "FILE", "per_rank": True, "outside": True, **_TEXT}


def _rounds() -> Iterable[Setting]:
    what = (
        "Generate answers, have them judged and train on them, so many times over; takes "
        "the place of data."
    )
    yield Setting("rounds", None, what, **_COUNT, resume="free")
    what = (
        "Prompts to answer: a text with one a line, .jsonl with prompt or messages, or "
        "preference data."
    )
    yield Setting("prompts", None, what, **_FILE)
    what = "Prompts of a round, the next ones each time. Default: all."
    yield Setting("prompts_per_round", None, what, **_COUNT)
    what = "Prompts that are only measured: wins against the start, by the same judge."
    yield Setting("held_out_prompts", None, what, **_FILE)
    what = "Who judges: human, function:FILE:NAME, model:PATH or endpoint:URL:MODEL."
    yield Setting("judge", None, what, **_TEXT, outside=True)
    what = "Most seconds of a function for one prompt, or of an endpoint for one reply."
    yield Setting("judge_timeout", 60.0, what, above=0, resume="free")
    yield Setting("samples", 4, "Answers to each prompt.", least=2)
    yield Setting("temperature", 1.0, "Temperature of the samples.", above=0)
    what = "Share of the probability that is sampled from."
    yield Setting("top_p", 1.0, what, above=0, most=1)
    yield Setting("max_tokens", 256, "Most tokens of an answer.", least=1)
    what = "Answers that are generated at a time."
    yield Setting("generate_batch_size", 32, what, least=1)
    what = "Pairs of a prompt: the best with the worst answer, or all."
    yield Setting("pairs", "best", what, choices=("best", "all"))
    what = "The reference of each round: the start of all rounds, or the round's own."
    yield Setting("reference", "start", what, choices=("start", "round"))
    what = "Steps of each round. Default: those of one epoch."
    yield Setting("iters_per_round", None, what, **_COUNT)
    what = "Passes over the pairs of each round."
    yield Setting("epochs_per_round", None, what, **_COUNT)
    what = "Share of earlier rounds' pairs that is trained on again."
    yield Setting("replay", 0.0, what, least=0, most=1)


ROUNDS = {one.name: one for one in _rounds()}
# What a run has that does not go with rounds, which make their own data.
_NOT_WITH = ("hf_dataset", "test", "inspect", "report", "resume_adapter_file")
PAIRS = "pairs"


class _Collect(Feature):
    def settings(self) -> dict[str, Iterable[Setting]]:
        what = (
            "Adapter that the policy goes on from, while the reference is without it."
        )
        own: dict[str, Any] = {"per_rank": True, "outside": True, **_TEXT}
        return {
            "Model and optimizer": [Setting("policy_adapter_file", None, what, **own)],
            "Rounds": ROUNDS.values(),
        }

    def check(self, args: Any) -> None:
        if args.rounds is None:
            if given := sorted(args.explicit & ROUNDS.keys()):
                raise InputError(
                    f"{given[0]} needs rounds: say how many, or leave it out."
                )
            return
        for name in _NOT_WITH:
            if getattr(args, name):
                raise InputError(
                    f"{name} does not go with rounds: leave it out, or use it on the "
                    "folder afterwards."
                )
        for name in ("prompts", "judge"):
            if getattr(args, name) is None:
                raise InputError(f"rounds need {name}: name it.")
        for name in ("iters", "epochs"):
            if name in args.explicit:
                raise InputError(f"rounds have {name}_per_round: give that instead.")
        if args.iters_per_round and args.epochs_per_round:
            raise InputError(
                "iters_per_round and epochs_per_round both say how long: leave one out."
            )
        if objective_of(args).data != "pairs" or mx.distributed.init().size() > 1:
            raise InputError(
                "rounds train a loss of pairs in one process: choose another loss_type, "
                "or start the command without a launcher."
            )

    def takes_over(self, args: Any) -> bool:
        before = args.resume and adapter_config(args.resume) or {}
        if not args.resume and (args.rounds or args.train):
            _check_no_rounds(args.adapter_path)
        if args.rounds is None and before.get("rounds") is None:
            return False
        if "data" in args.explicit:
            raise InputError(
                "data does not go with rounds, which make their own: leave it out."
            )
        # What needs the table of settings, which has those from here.
        from ..settings.begin import settle

        args.train, args.data = True, str(Path(args.adapter_path) / PAIRS)
        settle(args)
        with folder_kept(args.adapter_path):
            _run_rounds(args)
        return True

    def after_weights(self, job: Any) -> None:
        if (path := job.args.policy_adapter_file) is None:
            return
        load_weights(job.model, path)
        # The policy does not begin as its reference.
        job.kept["watched"] = replace(job.kept["watched"], frozen_start=False)
        if job.reference_model is None:
            job.kept.pop("asked", None)


def _check_no_rounds(folder):
    """Answers and labels of earlier rounds are neither mixed with new ones nor lost."""
    if (Path(folder) / STATE).exists():
        raise InputError(
            f"{folder} holds rounds: go on with {resuming(folder)}, or name another "
            "adapter_path."
        )


def _run_rounds(args):
    """Generate, label and train, round by round, each a run of its own."""
    from ...utils import save_config
    from .rounds import Rounds, round_settings

    train = partial(_train_round, args)
    rounds = Rounds(args.adapter_path, round_settings(vars(args)), train)
    if args.dry_run:
        rprint("Dry run: nothing was generated.")
        return
    folder = Path(args.adapter_path)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    keep_folder(folder)
    config, file = saved_settings(vars(args)), folder / "adapter_config.json"
    with writing(file):
        replace_file(file, lambda name: save_config(config, name))
    try:
        rounds.run()
    except KeyboardInterrupt:
        rprint(f"Stopped. Go on with: {resuming(folder)}")
        raise


def _train_round(args, number, folder, data, before):
    """The run of a round, which goes on where it has a checkpoint."""
    from ...dpo import run

    one = copy.copy(args)
    vars(one).update({name: setting.default for name, setting in ROUNDS.items()})
    one.adapter_path, one.data = str(folder), str(data)
    one.seed = args.seed + number
    one.iters, one.epochs = args.iters_per_round, args.epochs_per_round
    if one.iters is None:
        one.epochs = one.epochs or 1
    if before is not None:
        if args.reference == "round":
            one.resume_adapter_file, one.new_reference = str(before), True
        else:
            one.policy_adapter_file = str(before / "adapters.safetensors")
    one.explicit = args.explicit - {*ROUNDS, "adapter_path", "resume"}
    one.resume = str(folder) if newest_state(folder) else None
    if one.resume:
        one.explicit = {"resume"}
    run(one)


FEATURE = _Collect()
