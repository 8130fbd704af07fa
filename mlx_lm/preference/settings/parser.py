# Copyright © 2026 MLX Contributors

"""The settings of ``mlx_lm.dpo``: their defaults and the command line."""

import argparse
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from ... import lora
from ..errors import InputError
from ..measure.metrics import BEST
from ..objective.losses import LOSSES
from ..objective.objective import DIVERGENCES, Objective

CONFIG_DEFAULTS = {
    **lora.CONFIG_DEFAULTS,
    "data": None,
    "clear_cache_threshold": None,
    "learning_rate": None,
    **asdict(Objective()),
    "sync_reference": False,
    "sync_alpha": 0.6,
    "sync_steps": 512,
    "reference_model": None,
    "new_reference": False,
    "epochs": None,
    "max_grad_norm": 1.0,
    "warmup_steps": None,
    "hf_dataset": None,
    "data_dir": None,
    "prompt_feature": "prompt",
    "chosen_feature": "chosen",
    "rejected_feature": "rejected",
    "weight_feature": None,
    "margin_feature": None,
    "criteria": None,
    "wrap_text": False,
    "transcripts": "turns",
    "valid_fraction": 0.02,
    "max_bad_rows": 0.1,
    "share_prompt": True,
    "pack": False,
    "train_head": False,
    "reference_cache": None,
    "token_cache": None,
    "dry_run": False,
    "resume": None,
    "resume_anyway": False,
    "keep_checkpoints": None,
    "save_best": None,
    "max_skipped_steps": 10,
    "debug_gradients": False,
    "report": False,
    "inspect": None,
    "sample_prompts": None,
    "sample_tokens": 100,
    "retain_data": None,
}
# Keys of mlx_lm.lora for data without preferences: accepted, without effect.
UNUSED_KEYS = ("text_feature", "completion_feature", "chat_feature")


def build_parser() -> argparse.ArgumentParser:
    """The command line: that of ``mlx_lm.lora`` and what preferences need."""
    parser = lora.build_parser()
    # --resume-adapter-file must not answer to a shorter name.
    parser.allow_abbrev = False
    parser.error = _refuse_flags
    parser.description = "Preference fine-tuning with DPO, for LoRA, DoRA or full."
    _adapt_flags(parser)
    _add_objective(parser)
    _add_training(parser)
    _add_batches(parser)
    _add_run(parser)
    _add_watching(parser)
    return parser


def _add_switch(parser, flag, help):
    parser.add_argument(flag, action="store_true", default=None, help=help)


def _adapt_flags(parser):
    """What ``mlx_lm.lora``'s own flags mean here."""
    parser.set_defaults(**{a.dest: None for a in parser._actions if a.dest != "help"})
    for action in parser._actions:
        if action.dest == "learning_rate":
            action.help = "Learning rate. Default: 1e-5 for adapters, 1e-6 for full."
        if action.dest == "data":
            action.help = (
                "Folder with {train, valid, test}.jsonl of preference pairs, or the "
                "name of a Hugging Face dataset (e.g., 'Anthropic/hh-rlhf')."
            )
        if action.dest == "adapter_path":
            action.nargs = "+"
            action.help = (
                "Folder to write to, or to test; with --test alone several to compare."
            )
        if action.dest == "report_to":
            action.help = (
                "Where to log: wandb, swanlab, tensorboard, trackio, or several such as "
                "'wandb,trackio'."
            )
        if action.dest == "mask_prompt":
            action.help = "Without effect: preference losses never score prompts."


def _add_training(parser):
    """Flags for the reference, the run's length and the gradient."""
    parser.add_argument(
        "--reference-model",
        type=str,
        help="Path or repo of another reference model. Default: the frozen start.",
    )
    parser.add_argument(
        "--epochs", type=int, help="Passes over the data; takes the place of --iters."
    )
    parser.add_argument(
        "--max-grad-norm",
        type=float,
        help="Clip the gradient to this norm, 0 for no clipping. Default: 1.",
    )
    parser.add_argument(
        "--warmup-steps",
        type=int,
        help="Optimizer updates in which the learning rate rises linearly.",
    )


def _add_batches(parser):
    """Flags for the data, its rows in a batch, and what is kept of it."""
    for name, what in (("weight", "the pairs' weights"), ("margin", "their margins")):
        parser.add_argument(
            f"--{name}-feature",
            type=str,
            metavar="COLUMN",
            help=f"Column of {what}. Default: there is none.",
        )
    _add_switch(
        parser,
        "--wrap-text",
        "Put text rows into the chat template, as mlx_lm.lora does.",
    )
    _add_switch(
        parser,
        "--train-head",
        "Train the output head too, and tied embeddings with it.",
    )
    parser.add_argument(
        "--no-share-prompt",
        dest="share_prompt",
        action="store_false",
        default=None,
        help="Compute each prompt twice, once for each answer.",
    )
    _add_switch(
        parser, "--pack", "Put several sequences in a row, instead of sharing prompts."
    )
    for name, what in (
        ("reference", "the reference's log-probs"),
        ("token", "the token ids of large data sets"),
    ):
        parser.add_argument(
            f"--{name}-cache",
            type=str,
            metavar="DIR",
            help=f"Folder that keeps {what}. Default: in the user's cache folder.",
        )
        parser.add_argument(
            f"--no-{name}-cache",
            dest=f"{name}_cache",
            action="store_false",
            default=None,
            help=f"Don't keep {what} on disk.",
        )


def _add_run(parser):
    """Flags for going on with a run, what it keeps, and a run that only plans."""
    parser.add_argument(
        "--resume",
        type=str,
        metavar="DIR",
        help="Go on with the run in this adapter folder; needs no other flag.",
    )
    _add_switch(
        parser,
        "--resume-anyway",
        "Resume although data, model or settings are not those of the start.",
    )
    parser.add_argument(
        "--keep-checkpoints",
        type=int,
        metavar="N",
        help="Keep the newest N checkpoints. Default: every adapter.",
    )
    parser.add_argument(
        "--save-best",
        type=str,
        choices=list(BEST),
        help="Keep the adapter that validates best in the folder best/.",
    )
    _add_switch(
        parser, "--dry-run", "Print plan, batches and predicted memory, and stop."
    )
    _add_switch(
        parser,
        "--new-reference",
        "Start a new run, with a new reference, from an adapter of a DPO run.",
    )


def _add_watching(parser):
    """Flags for looking at a run and at what came of it."""
    parser.add_argument(
        "--inspect",
        type=int,
        metavar="N",
        help="Show N held-out pairs as the model sees them, the surest mistakes first.",
    )
    _add_switch(
        parser,
        "--debug-gradients",
        "Write the gradient of every module to metrics.jsonl at each report.",
    )
    _add_switch(
        parser,
        "--report",
        "Write report.html and curves.png beside the adapter; needs matplotlib.",
    )
    parser.add_argument(
        "--sample-prompts",
        type=str,
        metavar="FILE",
        help="Prompts, one a line or .jsonl, to answer greedily at every validation.",
    )
    parser.add_argument(
        "--sample-tokens",
        type=int,
        help="Most tokens of such an answer. Default: 100.",
    )
    parser.add_argument(
        "--retain-data",
        type=str,
        metavar="FILE",
        help="An ordinary text: its perplexity is taken before and after.",
    )


def _add_objective(parser):
    """A flag for each setting of the objective."""
    choices = {"loss_type": list(LOSSES), "f_divergence": list(DIVERGENCES)}
    for setting in fields(Objective):
        # A list is for YAML.
        if setting.default is None:
            continue
        flag, help = setting.name.replace("_", "-"), setting.metadata["help"]
        if isinstance(setting.default, bool):
            _add_switch(parser, f"--{flag}", help)
            continue
        parser.add_argument(
            f"--{flag}",
            type=type(setting.default),
            choices=choices.get(setting.name),
            help=help,
        )
    _add_switch(
        parser, "--sync-reference", "Let the reference follow the policy (TR-DPO)."
    )
    parser.add_argument(
        "--sync-alpha",
        type=float,
        help="The policy's share in the new reference. Default: 0.6.",
    )
    parser.add_argument(
        "--sync-steps",
        type=int,
        help="Optimizer updates between two new references. Default: 512.",
    )


def _refuse_flags(message):
    # In one line, where argparse prints all flags.
    raise InputError(f"{message}. See mlx_lm.dpo --help.")


def read_config(path: str | Path, loader: Any) -> dict[str, Any]:
    """Read a YAML file of settings."""
    try:
        config = yaml.load(Path(path).read_bytes().decode("utf-8"), loader) or {}
    except OSError as e:
        raise InputError(f"Can't read the configuration {path}: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: invalid UTF-8. Save it as UTF-8.") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        raise InputError(
            f"{place}: {getattr(e, 'problem', None) or e}. Text with special "
            "characters needs quotes."
        ) from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"Can't read the configuration {path}: {e}.") from e
    if not isinstance(config, dict):
        raise InputError(f"{path} must hold keys and values.")
    return config
