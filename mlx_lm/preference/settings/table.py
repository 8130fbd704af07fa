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
from ..data.shapes import ROW_OPTIONS
from ..features import features
from ..objective.losses import LOSSES
from ..policy.model import LEARNING_RATES
from ..policy.optimizer import OPTIMIZERS
from ..setting import Setting, declared

# Keys of mlx_lm.lora for data without preferences: accepted, without effect.
UNUSED_KEYS = ("text_feature", "completion_feature", "chat_feature")
LORA_KEYS = {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": None}


# Marks that many settings have.
_FREE: dict[str, Any] = {"resume": "free"}
_ADAPTER: dict[str, Any] = {"resume": "shape", "tested": True}
_TEXT: dict[str, Any] = {"kind": str}
_COUNT: dict[str, Any] = {"kind": int, "least": 1}
_YAML: dict[str, Any] = {"flag": False}
_OWN: dict[str, Any] = {"per_rank": True}
_OUTSIDE: dict[str, Any] = {"outside": True}


def _shared(name: str, help: str, **marks: Any) -> Setting:
    """A setting that ``mlx_lm.lora`` has, with its default."""
    return Setting(name, lora.CONFIG_DEFAULTS[name], help, **marks)


def _policy() -> Iterable[Setting]:
    model = "The policy: a local folder or a Hugging Face repo."
    yield _shared("model", model, tested=True, compared=True, **_OWN, **_OUTSIDE)
    yield _shared(
        "trust_remote_code", "Let the repo's own code run at loading.", **_FREE, **_OWN
    )
    what = "What is trained: adapters (lora, dora) or whole layers (full)."
    yield _shared("fine_tune_type", what, choices=[*LEARNING_RATES], **_ADAPTER)
    what = (
        "Layers to train, counted from the last one; -1 for all. The default is "
        "lowered to what the model has, a larger given number is an error."
    )
    yield _shared("num_layers", what, least=1, all=True, **_ADAPTER)
    what = (
        "For lora and dora; those left out keep their defaults. keys, a list of module "
        "names such as self_attn.q_proj, limits the adapter to them."
    )
    yield _shared("lora_parameters", what, **_YAML, **_ADAPTER)
    what = "The optimizer of the weights that are trained."
    yield _shared("optimizer", what, choices=[*OPTIMIZERS], resume="shape")
    what = "Arguments of each optimizer of mlx.optimizers."
    yield _shared("optimizer_config", what, **_YAML)
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    what = f"The largest learning rate. Default: {rates}."
    yield Setting("learning_rate", None, what, kind=float, least=0)
    what = (
        "How the rate falls: a name, or a name with its options. Default: not at all."
    )
    yield _shared("lr_schedule", what, **_YAML)
    what = "Optimizer updates in which the rate rises from 0."
    yield Setting("warmup_steps", None, what, kind=int, least=0)


def _data() -> Iterable[Setting]:
    what = (
        "Preference pairs: a folder with {train, valid, test}.jsonl, a file, or a "
        "Hugging Face dataset such as Anthropic/hh-rlhf."
    )
    yield Setting("data", None, what, **_TEXT, **_OWN, **_OUTSIDE)
    what = "Folder inside data."
    yield Setting("data_dir", None, what, **_TEXT, **_YAML, per_dataset=True, **_OWN)
    yield from declared(RowOptions)
    what = "Share of the pairs held out, at most 500, if there is no validation split."
    yield Setting("valid_fraction", 0.02, what, least=0, below=1, **_YAML)
    yield _shared("mask_prompt", "No effect: prompts are never scored.")


def _run() -> Iterable[Setting]:
    yield _shared(
        "config", "YAML file with these settings.", **_TEXT, **_OWN, short="-c"
    )
    yield _shared("train", "Train; needs a train split.", **_FREE)
    what = (
        "Folder to write to, or to test; '' with --test alone tests the model as it "
        "is, several folders compare runs."
    )
    yield _shared("adapter_path", what, nargs="+", several=True, **_OWN)
    what = "Passes over the training pairs; takes the place of iters."
    yield Setting("epochs", None, what, **_COUNT, **_FREE)
    what = "Print plan, batches and predicted memory, and stop."
    yield Setting("dry_run", False, what, **_FREE)


def _loop() -> Iterable[Setting]:
    others: dict[str, Any] = {"iters": {"default": lora.CONFIG_DEFAULTS["iters"]}}
    others["clear_cache_threshold"] = {"read": lora._parse_size}
    for one in declared(DPOTrainingArgs):
        yield replace(one, **others.get(one.name, {}))


GROUPS = {
    "What to do": [*_run()],
    "Model and optimizer": [*_policy()],
    "Rows and pairs": [*_data()],
    "Loss and steps": [*_loop()],
}
for feature in features():
    for group, more in feature.settings().items():
        GROUPS[group] = [*GROUPS.get(group, ()), *more]
_BROUGHT = {name for feature in features() for name in feature.brings}
_BROUGHT |= {name for loss in LOSSES.values() for name in loss.options} | ROW_OPTIONS
_ALL = {one.name: one for group in GROUPS.values() for one in group}
SETTINGS = {k: x for k, x in _ALL.items() if not x.brought or k in _BROUGHT}
CONFIG_DEFAULTS = {name: one.default for name, one in SETTINGS.items()}
# With what all ask for, and no feature may declare.
_ASKED = ["inspect", "resume", "reference_model", "hf_dataset"]
DEFAULTS: dict[str, Any] = dict.fromkeys(_ASKED) | {"test": False, "pack": False}
DEFAULTS |= {name: one.default for name, one in _ALL.items()}


def names(**marks: Any) -> list[str]:
    """The settings that have all of these marks, such as ``tested=True``."""
    fits = lambda one: all(getattr(one, mark) == x for mark, x in marks.items())
    return [name for name, one in SETTINGS.items() if fits(one)]
