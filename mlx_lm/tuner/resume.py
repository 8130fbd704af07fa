# Copyright © 2026 MLX Contributors

"""Going on with a run: its settings, and whether it still is the same run."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..cli_ui import rprint
from .policy import TRAINED_WITH, adapter_config
from .reference_cache import pair_key
from .training_state import TrainingState

# What may change without changing what is computed, or only how long.
FREE_KEYS = (
    "resume",
    "resume_anyway",
    "train",
    "iters",
    "epochs",
    "steps_per_report",
    "steps_per_eval",
    "save_every",
    "val_batches",
    "test",
    "test_batches",
    "keep_checkpoints",
    "save_best",
    "max_skipped_steps",
    "debug_gradients",
    "report",
    "sample_prompts",
    "sample_tokens",
    "retain_data",
    "clear_cache_threshold",
    "report_to",
    "project_name",
    "reference_cache",
    "token_cache",
    "dry_run",
    "trust_remote_code",
)
# The shape of what was saved: no wish can change it.
SHAPE_KEYS = (
    "fine_tune_type",
    "num_layers",
    "lora_parameters",
    "train_head",
    "optimizer",
)


def adopt_resumed_run(args: SimpleNamespace, known: dict[str, Any]) -> None:
    """
    Take all settings from the run that goes on.

    Args:
        args (SimpleNamespace): The settings; ``resume`` is the run's folder.
        known (dict): The settings that exist, with their defaults.

    Raises:
        ValueError: If there is no run, or a setting contradicts it.

    Example:
        >>> args = SimpleNamespace(resume="nowhere", explicit=set())
        >>> adopt_resumed_run(args, {})
        Traceback (most recent call last):
        ...
        ValueError: Nothing to resume in nowhere: it has no adapter_config.json of a \
mlx_lm.dpo run.
    """
    folder = str(args.resume)
    config = adapter_config(folder) if Path(folder).is_dir() else None
    if config is None or config.get("trained_with") != TRAINED_WITH:
        raise ValueError(
            f"Nothing to resume in {folder}: it has no adapter_config.json of a "
            "mlx_lm.dpo run."
        )
    for key, old in config.items():
        if key not in known or key in ("resume", "resume_anyway", "dry_run"):
            continue
        new = getattr(args, key)
        if key not in args.explicit or _means(key, new, old):
            setattr(args, key, old)
        elif key not in FREE_KEYS:
            _refuse(f"{key} is {new!r}", repr(old), key, args)
    if "iters" in args.explicit:
        args.epochs = None
    if config.get("loss_weights") and args.loss_type != config.get("loss_type"):
        # Those were for the losses before.
        if "loss_weights" not in args.explicit:
            args.loss_weights = None
    args.train, args.adapter_path = True, folder
    # What was saved is complete: nothing more is taken from an adapter.
    args.explicit -= {"lora_parameters"}


def _means(key, new, old):
    """Whether a setting, as the user writes it, is what was saved."""
    if key == "optimizer":
        return new.lower() == old
    if key == "lora_parameters":
        return old is None or all(old.get(k) == v for k, v in new.items())
    if key == "resume_adapter_file" and old is not None:
        return Path(old) in (Path(new), Path(new) / "adapters.safetensors")
    if key == "adapter_path":
        return Path(new).resolve() == Path(old).resolve()
    return new == old


def _refuse(what, before, key, args):
    if key in SHAPE_KEYS:
        raise ValueError(
            f"{what}, but the run in {args.resume} was started with {before}, and what "
            "it saved has that shape. Leave it out, or start a new run."
        )
    if not args.resume_anyway:
        raise ValueError(
            f"{what}, but the run in {args.resume} was started with {before}. Leave it "
            "out, or give --resume-anyway to go on all the same."
        )
    rprint(f"[WARNING] {what}, no longer {before}.")


def data_fingerprint(dataset: Any) -> str:
    """
    A name for the pairs of a data set and their weights, labels and the like.

    Args:
        dataset (PreferenceDataset): The pairs; may be empty.

    Returns:
        str: 16 hexadecimal digits.

    Example:
        >>> len(data_fingerprint([([1], [2], [3], (1, 2, 2))]))
        16
    """
    digest = hashlib.blake2b(digest_size=8)
    for i in range(len(dataset or [])):
        digest.update(pair_key(*dataset[i][:3]))
    for name, values in sorted(getattr(dataset, "values", {}).items()):
        digest.update(name.encode() + np.asarray(values, "<f4").tobytes())
    return digest.hexdigest()


_MEANINGS = {
    "model": "the model (its weights, MLX's version or the kind of device) is",
    "reference": "the reference model is",
    "train": "the training pairs are",
    "valid": "the validation pairs are",
}


def check_identity(
    state: TrainingState, identity: dict[str, str], args: SimpleNamespace
) -> None:
    """
    Check that a checkpoint belongs to what would go on with it.

    Args:
        state (TrainingState): The checkpoint.
        identity (dict): Fingerprints by name.
        args (SimpleNamespace): For ``resume`` and ``resume_anyway``.

    Raises:
        ValueError: If something differs and ``resume_anyway`` is not set.

    Example:
        >>> state = TrainingState(1, {}, {"identity": {"train": "a"}}, Path("x"))
        >>> args = SimpleNamespace(resume="adapters", resume_anyway=False)
        >>> check_identity(state, {"train": "b"}, args)
        Traceback (most recent call last):
        ...
        ValueError: Can't resume adapters: the training pairs are not what the run was \
started with. Restore that, or give --resume-anyway to go on all the same.
    """
    before = state.info["identity"]
    for name, value in identity.items():
        if before.get(name) == value:
            continue
        what = _MEANINGS.get(name, f"{name} is")
        if not args.resume_anyway:
            raise ValueError(
                f"Can't resume {args.resume}: {what} not what the run was started with. "
                "Restore that, or give --resume-anyway to go on all the same."
            )
        rprint(f"[WARNING] {what[0].upper()}{what[1:]} not what the run started with.")
