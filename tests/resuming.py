# Copyright © 2026 MLX Contributors

"""Runs that are broken off and gone on with, and what must be the same then."""

import contextlib
import io
import json
import shutil
import signal
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from tiny import random_pairs, tiny_model

from mlx_lm.preference.forward.dropout import KeyedDropout
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.reference.cache import ReferenceCache
from mlx_lm.preference.reference.remembered import RememberedReference
from mlx_lm.preference.run.checkpoint import newest_state
from mlx_lm.preference.run.folder import CallbackList, MetricsFile
from mlx_lm.preference.run.loop import PreferenceRun
from mlx_lm.tuner.trainer import DPOTrainingArgs, train_dpo

MEASURED = {
    *("pairs_per_second", "tokens_per_second", "peak_memory", "val_time"),
    "compile_seconds",
}
STEPS = 9


def lines_of(folder):
    """The lines of metrics.jsonl, without what depends on the machine."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def bits(path, prefixes=""):
    """The arrays of a safetensors file as bytes."""
    return {
        k: (str(v.dtype), v.shape, np.array(v.reshape(-1).view(mx.uint8)).tobytes())
        for k, v in mx.load(str(path)).items()
        if k.startswith(prefixes)
    }


def result(folder):
    """All that must be the same: weights, optimizer, metrics, names of files."""
    folder = Path(folder)
    states = sorted(folder.glob("*_state.safetensors"))
    prefixes = ("optimizer.", "accumulator.", "window.", "gradient.")
    best = folder / "best" / "adapters.safetensors"
    return {
        "adapter": bits(folder / "adapters.safetensors"),
        "state": bits(states[-1], prefixes),
        "best": bits(best) if best.exists() else None,
        "metrics": lines_of(folder),
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
    }


class Setup:
    """A kind of run, made anew as a new process would make it."""

    def __init__(
        self,
        kind="lora",
        dtype=None,
        schedule=None,
        other_reference=False,
        moved=False,
        optimizer=optim.Adam,
        dropout=0.0,
        **args,
    ):
        self.kind, self.dtype, self.schedule = kind, dtype, schedule
        self.other_reference, self.moved = other_reference, moved
        self.optimizer, self.dropout, self.args = optimizer, dropout, args

    def start(self, folder, resume=None, disk=None, callback=None, **args):
        """A run from the start, or from a state; returns what it printed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        args = DPOTrainingArgs(
            **{
                **{"batch_size": 2, "iters": STEPS, "steps_per_report": 2},
                **{"steps_per_eval": 3, "steps_per_save": 1, "val_batches": 2},
                **{"keep_checkpoints": 99, "max_seq_length": 64},
                **self.args,
                **args,
            },
            adapter_file=str(folder / "adapters.safetensors"),
        )
        model, reference = self._models()
        written = resume.info["metrics_bytes"] if resume else 0
        callback = CallbackList(
            [MetricsFile(folder / "metrics.jsonl", written), callback]
        )
        rate = 1e-2 if self.schedule is None else self.schedule(1e-2, args.iters)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            train_dpo(
                model,
                self.optimizer(rate),
                random_pairs(7),
                random_pairs(5, seed=3),
                args,
                RememberedReference(reference, ReferenceCache(disk, "0" * 64), False),
                callback,
                resume,
            )
        return out.getvalue()

    def _models(self):
        model = tiny_model(self.kind, dropout=self.dropout)
        if self.moved:
            # As an SFT adapter would have it: B is not zero.
            model.update(tree_map(lambda x: x + 0.01, model.trainable_parameters()))
        if self.dtype is not None:
            model.set_dtype(self.dtype)
        reference = tiny_model(seed=5) if self.other_reference else FrozenStart(model)
        return model, reference

    def go_on(self, folder, **args):
        """A run from the newest state."""
        return self.start(folder, newest_state(folder), **args)


def copy_at(source, folder, step):
    """A run's folder as it was right after a step's checkpoint, or a bit later."""
    shutil.copytree(source, folder)
    for path in folder.glob("[0-9]*.safetensors"):
        if int(path.name[:7]) > step:
            path.unlink()
    return folder


@contextlib.contextmanager
def masks_drawn():
    """What each dropout of a run keeps, call by call."""
    drawn, call = [], KeyedDropout.__call__

    def recorded(self, x):
        y = call(self, x)
        if self.training:
            drawn.append(y != 0)
        return y

    with mock.patch.object(KeyedDropout, "__call__", recorded):
        yield drawn


@contextlib.contextmanager
def signals(name, *at, number=signal.SIGTERM, owner=PreferenceRun):
    """Send the process a signal when a method of the run is called for these times."""
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def method(*args):
        if next(calls) in at:
            signal.raise_signal(number)
        return original(*args)

    with mock.patch.object(owner, name, method):
        yield
