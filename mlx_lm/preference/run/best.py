# Copyright © 2026 MLX Contributors

"""The adapter that validates best, and runs that stop early since none is better."""

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ...tuner.trainer import DPOTrainingArgs
from ..digest import digest
from ..errors import InputError
from ..features import Feature
from ..files import replace_file
from ..policy.adapter import ADAPTER
from ..policy.start import fitting_weights
from ..ranks import sum_over_ranks
from ..terminal import rprint
from .adapters import copy_adapter, save_adapter

# By what --save-best may choose: the metric, and whether more or less is better.
BEST = {"accuracy": ("rewards/accuracies", 1), "loss": ("loss", -1)}


def check_validated(settings: Any, val_set: Any) -> None:
    """Refuse to look for the best where nothing is validated."""
    for name in ("early_stopping", "load_best", "save_best"):
        if getattr(settings, name) and not val_set:
            raise InputError(
                f"{name} needs validation pairs: add a valid split, or give "
                "valid_fraction more than 0."
            )


class BestAdapter:
    """The best validation so far, its adapter in ``best/``, and how long ago it was."""

    def __init__(self, args: DPOTrainingArgs):
        asked = args.early_stopping or args.load_best
        self.measure = args.save_best or ("accuracy" if asked else None)
        self.keep = bool(args.save_best or args.load_best)
        self.patience, self.iters = args.early_stopping, args.iters
        self.path = Path(args.adapter_file).parent / "best" / ADAPTER
        #: The best by a measure, and the number of validations since.
        self.held: dict[str, Any] = {"measure": None, "value": None, "since": 0}

    def judge(
        self, metrics: dict[str, float], it: int, model: nn.Module | None
    ) -> None:
        """Compare a validation with the best so far, and keep its model if it is."""
        if self.measure is None:
            return
        name, sign = BEST[self.measure]
        if self.held["measure"] != self.measure:
            self.held = {"measure": self.measure, "value": None, "since": 0}
        value, best = metrics[name], self.held["value"]
        is_more = best is None or sign * value > sign * best
        if not (is_more and math.isfinite(value)):
            self.held["since"] += 1
            return
        self.held = {"measure": self.measure, "value": value, "since": 0, "step": it}
        if self.keep and model is not None:
            self._save(model)
            self.held["adapter"] = self._digest()

    def _save(self, model):
        self.path.parent.mkdir(exist_ok=True)
        config = self.path.parents[1] / "adapter_config.json"
        if config.exists():
            copy = partial(shutil.copyfile, config)
            replace_file(self.path.parent / config.name, copy)
        save_adapter(model, self.path)

    def _digest(self):
        return digest(mx.load(str(self.path)))

    def begin(self, run: Any, it: int) -> None:
        """Take no step of a run that had stopped early."""
        if self.is_past:
            run.last = run.done

    def after_validation(self, run: Any, it: int, metrics: dict[str, float]) -> None:
        """Judge the adapter of a run, and end it if none was better for long."""
        if it > 0:
            self.judge(metrics, it, run.policy_model if run.rank == 0 else None)
            if self.is_past:
                run.last = it

    def ends_early(self, run: Any, it: int) -> None:
        """Say so on the first rank."""
        if run.rank == 0:
            self.say_past(it)

    def end(self, run: Any, it: int) -> None:
        """Let the best be what remains, if that is asked for."""
        if run.args.load_best:
            self.put_back(run.policy_model, run.world)

    @property
    def is_past(self) -> bool:
        """Whether the run has to stop, since too many validations brought nothing."""
        is_same = self.patience is not None and self.held["measure"] == self.measure
        return is_same and self.held["since"] >= self.patience

    def say_past(self, it: int) -> None:
        """Say that the run stops early."""
        since, name = self.held["since"], BEST[self.held["measure"]][0]
        validations = f"{since:,} validation" + "s" * (since > 1)
        rprint(
            f"Stopped early after step {it:,} of {self.iters:,}: {validations} without "
            f"gain in {name}, best {self._describe()}."
        )

    def _describe(self):
        if self.held["value"] is None:
            return "of no step, as it never was a finite number"
        return f"{self.held['value']:.4g} at step {self.held['step']:,}"

    def _is_whole(self):
        """Whether ``best/`` has the adapter that this run put there."""
        named = self.held["measure"] == self.measure and self.held.get("adapter")
        return bool(named) and self.path.is_file() and self._digest() == named

    def put_back(self, model: nn.Module, world: mx.distributed.Group) -> None:
        """Let it be what remains in the run's folder, and in the model of all ranks."""
        is_first = world.rank() == 0
        # Only the first rank's folder has it.
        found = {"whole": mx.array(float(is_first and self._is_whole()))}
        if not sum_over_ranks(found, world)["whole"].item():
            if is_first:
                rprint(
                    f"[WARNING] load_best: {self.path} is not the best adapter of this "
                    f"run, {ADAPTER} remains that of the last step."
                )
            return
        ours = dict(tree_flatten(model.trainable_parameters()))
        best = {k: mx.zeros_like(x) for k, x in ours.items()}
        if is_first:
            best = fitting_weights(model, self.path)
            copy_adapter(self.path, self.path.parents[1] / ADAPTER)
            name, _ = BEST[self.held["measure"]]
            rprint(f"{ADAPTER} is the best one: {name} {self._describe()}.")
        best = sum_over_ranks(best, world)
        loaded = [(k, best[k].astype(x.dtype)) for k, x in ours.items()]
        model.load_weights(loaded, strict=False)
        mx.eval(model.parameters())

    def state_dict(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        return {}, self.held

    def load_state_dict(self, arrays: dict[str, mx.array], info: dict) -> None:
        self.held = {"since": 0, "step": 0, **info}


class _Best(Feature):
    brings = ("save_best", "early_stopping", "load_best")

    def after_loading(self, job: Any) -> None:
        if job.args.train:
            check_validated(job.args, job.valid_set)

    def parts(self, run: Any) -> dict[str, Any]:
        check_validated(run.args, run.val_set)
        return {"best": BestAdapter(run.args)}


FEATURE = _Best()
