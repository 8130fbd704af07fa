# Copyright © 2026 MLX Contributors

"""Every setting of ``mlx_lm.dpo``.

Flags, YAML keys, defaults, checks of types and ranges, what a resumed run may change,
what a test takes from a finished run, and DPO_REFERENCE.md follow from this table.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ... import lora
from ...tuner.trainer import DPOTrainingArgs
from ..data.options import RowOptions
from ..policy.model import LEARNING_RATES
from ..policy.optimizer import OPTIMIZERS
from ..setting import Setting, declared

# Keys of mlx_lm.lora for data without preferences: accepted, without effect.
UNUSED_KEYS = ("text_feature", "completion_feature", "chat_feature")
# What an entry of hf_dataset has beside settings.
DATASET_KEYS = ["path", "config", "train_split", "valid_split", "test_split"]
DATASET_KEYS += [*UNUSED_KEYS, "mask_prompt"]
LORA_KEYS = {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": None}


def _shared(name: str, help: str, **marks: Any) -> Setting:
    """A setting that ``mlx_lm.lora`` has, with its default."""
    return Setting(name, lora.CONFIG_DEFAULTS[name], help, **marks)


def _policy() -> Iterable[Setting]:
    adapter: dict[str, Any] = {"resume": "shape", "tested": True}
    yield _shared(
        "model",
        "The policy: a local folder or a Hugging Face repo.",
        tested=True,
        compared=True,
    )
    yield _shared(
        "trust_remote_code", "Let the repo's own code run at loading.", resume="free"
    )
    yield _shared(
        "fine_tune_type",
        "What is trained: adapters (lora, dora) or whole layers (full).",
        choices=[*LEARNING_RATES],
        **adapter,
    )
    yield _shared(
        "num_layers",
        "Layers to train, counted from the last one; -1 for all. The default is "
        "lowered to what the model has, a larger given number is an error.",
        least=1,
        all=True,
        **adapter,
    )
    yield _shared(
        "lora_parameters",
        "For lora and dora; those left out keep their defaults. keys, a list of module "
        "names such as self_attn.q_proj, limits the adapter to them.",
        flag=False,
        **adapter,
    )
    yield Setting(
        "train_head",
        False,
        "Train the output head too, and tied embeddings with it.",
        **adapter,
    )
    yield Setting(
        "reference_model",
        None,
        "Another model as the reference. Default: the policy's frozen start.",
        kind=str,
        tested=True,
    )
    yield _shared(
        "resume_adapter_file",
        "Adapter to start from, a file or its folder; it is also the reference.",
        kind=str,
        tested=True,
    )
    yield Setting(
        "new_reference",
        False,
        "Allow an adapter of a DPO run as the start and the new reference.",
    )
    yield _shared(
        "optimizer",
        "The optimizer of the weights that are trained.",
        choices=[*OPTIMIZERS],
        resume="shape",
    )
    yield _shared(
        "optimizer_config", "Arguments of each optimizer of mlx.optimizers.", flag=False
    )
    yield Setting(
        "learning_rate",
        None,
        "The largest learning rate. Default: "
        + ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
        + ".",
        kind=float,
        least=0,
    )
    yield _shared(
        "lr_schedule",
        "How the rate falls: a name, or a name with its options. Default: not at all.",
        flag=False,
    )
    yield Setting(
        "warmup_steps",
        None,
        "Optimizer updates in which the rate rises from 0.",
        kind=int,
        least=0,
    )


def _data() -> Iterable[Setting]:
    yield Setting(
        "data",
        None,
        "Preference pairs: a folder with {train, valid, test}.jsonl, a file, or a "
        "Hugging Face dataset such as Anthropic/hh-rlhf.",
        kind=str,
    )
    yield Setting(
        "data_dir", None, "Folder inside data.", kind=str, flag=False, per_dataset=True
    )
    yield Setting(
        "hf_dataset",
        None,
        "One or several Hugging Face datasets with options of their own.",
        flag=False,
    )
    yield from declared(RowOptions)
    yield Setting(
        "valid_fraction",
        0.02,
        "Share of the pairs held out, at most 500, if there is no validation split.",
        least=0,
        below=1,
        flag=False,
    )
    for name, what in (
        ("reference", "the reference's log-probs"),
        ("token", "the token ids of large data sets"),
    ):
        yield Setting(
            f"{name}_cache",
            None,
            f"Folder that keeps {what} for later runs. Default: in the user's cache "
            "folder; false: nowhere.",
            kind=str,
            off=True,
            metavar="DIR",
            resume="free",
        )
    yield _shared("mask_prompt", "No effect: prompts are never scored.")


def _run() -> Iterable[Setting]:
    free: dict[str, Any] = {"resume": "free"}
    yield _shared("config", "YAML file with these settings.", kind=str, short="-c")
    yield _shared("train", "Train; needs a train split.", **free)
    yield _shared(
        "test", "Evaluate the test split, after training if both are set.", **free
    )
    yield Setting(
        "inspect",
        None,
        "Show so many held-out pairs, the surest mistakes first.",
        kind=int,
        least=1,
        metavar="N",
        **free,
    )
    yield _shared(
        "adapter_path",
        "Folder to write to, or to test; '' with --test alone tests the model as it "
        "is, several folders compare runs.",
        nargs="+",
    )
    yield Setting(
        "epochs",
        None,
        "Passes over the training pairs; takes the place of iters.",
        kind=int,
        least=1,
        **free,
    )
    yield _shared(
        "test_batches", "Batches of the test; -1 for all.", least=1, all=True, **free
    )
    yield Setting(
        "share_prompt",
        True,
        "Compute each prompt once for both answers, where the model gives the same "
        "numbers.",
    )
    yield Setting(
        "pack",
        False,
        "Put several sequences in a row, each attending to itself alone, instead of "
        "sharing prompts.",
    )
    yield Setting(
        "resume",
        None,
        "Go on with the run in this adapter folder; needs no other flag.",
        kind=str,
        metavar="DIR",
        **free,
    )
    yield Setting(
        "resume_anyway",
        False,
        "Go on although data, model or settings are not those of the start.",
        **free,
    )
    yield Setting(
        "dry_run", False, "Print plan, batches and predicted memory, and stop.", **free
    )


def _watchers() -> Iterable[Setting]:
    free: dict[str, Any] = {"resume": "free"}
    yield Setting(
        "report",
        False,
        "Write report.html and curves.png beside the adapter; needs matplotlib.",
        **free,
    )
    yield Setting(
        "sample_prompts",
        None,
        "Prompts to answer greedily at every validation: a file, one a line or .jsonl; "
        "in YAML also a list.",
        metavar="FILE",
        **free,
    )
    yield Setting(
        "sample_tokens", 100, "Most tokens of such an answer.", least=1, **free
    )
    yield Setting(
        "retain_data",
        None,
        "File of an ordinary text, whose perplexity is taken before and after.",
        kind=str,
        metavar="FILE",
        **free,
    )
    yield _shared(
        "report_to",
        "Where to log: wandb, swanlab, tensorboard, trackio, or several such as "
        "wandb,trackio.",
        kind=str,
        **free,
    )
    yield _shared("project_name", "Project name for them.", kind=str, **free)


def _loop() -> Iterable[Setting]:
    for one in declared(DPOTrainingArgs):
        if one.name == "iters":
            one = replace(one, default=lora.CONFIG_DEFAULTS["iters"])
        if one.name == "clear_cache_threshold":
            one = replace(one, read=lora._parse_size)
        yield one


GROUPS = {
    "What to do": [*_run()],
    "Model and optimizer": [*_policy()],
    "Rows and pairs": [*_data()],
    "Loss and steps": [*_loop()],
    "What looks on": [*_watchers()],
}
SETTINGS: dict[str, Setting] = {
    one.name: one for group in GROUPS.values() for one in group
}
CONFIG_DEFAULTS = {name: one.default for name, one in SETTINGS.items()}


def names(**marks: Any) -> list[str]:
    """The settings that have all of these marks, such as ``tested=True``."""
    return [
        name
        for name, one in SETTINGS.items()
        if all(getattr(one, mark) == value for mark, value in marks.items())
    ]
