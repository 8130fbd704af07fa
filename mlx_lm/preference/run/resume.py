# Copyright © 2026 MLX Contributors

"""A run that can be stopped at any moment, and goes on as if it never had been."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from ..errors import InputError
from ..features import Feature
from ..policy.adapter import adapter_config
from ..policy.start import fitting_weights, load_weights
from ..setting import Setting
from ..terminal import resuming, rprint
from . import checkpoint, state
from .adapters import copy_adapter
from .folder import METRICS
from .identity import rank_inputs, run_identity
from .lock import folder_kept, keep_folder, resumed_folder
from .signals import StopSignals


class Stoppable:
    """A run's checkpoints: written beside each adapter, and when a signal asks for it."""

    def __init__(self, run: Any):
        self.state: checkpoint.TrainingState | None = run.resume
        self.checkpoints = run.parts["checkpoints"]
        self.advice = f"Go on with: {resuming(resumed_folder(run.folder))}"
        self.stop = StopSignals(run.world.size() > 1, self.advice)
        self._snapshot: tuple = ()

    def around(self, run: Any) -> AbstractContextManager:
        """Listen to signals while steps are taken."""
        return self.stop

    def begin(self, run: Any, it: int) -> None:
        """Become what the run was that wrote a checkpoint."""
        if (resume := self.state) is None:
            self._leave_alone(run)
            return
        load_weights(run.policy_model, resume.adapter)
        info = resume.info
        run.done, run.updates = resume.iteration, info["updates"]
        run.pending = info["pending"]
        try:
            state.apply_snapshot(run.parts, resume.arrays, info["parts"], run.world)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            path = checkpoint.numbered(run.folder, run.done, "state")
            raise InputError(f"{path} can't be used ({type(e).__name__}: {e}).") from e
        run.reference.check(run.train_set, run.args.objective.ld_alpha)
        if run.rank == 0:
            checkpoint.drop_newer(run.folder, run.done)
            copy_adapter(resume.adapter, run.args.adapter_file)

    def _leave_alone(self, run):
        # Nothing tells whose they are.
        if run.rank == 0 and (others := checkpoint.find_states(run.folder)):
            rprint(
                f"[WARNING] {run.folder} has checkpoints of an earlier run, such as "
                f"{others[0][1].name}, which resuming may find first: delete them, or "
                "give each run a folder of its own."
            )

    def after_step(self, run: Any, it: int) -> None:
        """Drop old checkpoints: only now a step was taken from the newest."""
        if run.rank == 0 and not run.skipped.in_a_row:
            self.checkpoints.drop_old()

    def after_validation_batch(self, run: Any, it: int) -> None:
        """Let a signal end a validation; several ranks must end it together."""
        self.stop.beat()
        if self.stop.exit_code and run.world.size() == 1:
            run.pending = True
            self._save_and_exit(run, it)

    def after_first_validation(self, run: Any, it: int) -> None:
        """Note that one that had been interrupted is done."""
        if self.state is not None:
            run.ends_early(it)
            run.save(it)

    def at_rest(self, run: Any, it: int) -> None:
        """End the run if a signal came, to any rank."""
        if self.must_stop(run.world):
            self._save_and_exit(run, it)

    def must_stop(self, world: mx.distributed.Group) -> bool:
        """Tell whether a signal came, to any rank."""
        if world.size() == 1:
            return bool(self.stop.exit_code)
        code = mx.array(self.stop.exit_code)
        code = int(mx.distributed.all_max(code, group=world).item())
        # A signal that came while this rank waited is told in the next step.
        self.stop.exit_code = code or self.stop.exit_code
        self.stop.beat()
        return bool(code)

    def _save_and_exit(self, run, it):
        """Save, say how to go on, and end the process as the signal asks."""
        if run.world.size() > 1:
            self.stop.ignore()
        if it not in self.checkpoints.steps[-1:] or run.pending:
            run.save(it)
        if run.rank == 0:
            rprint(f"Stopped after step {it}. {self.advice}")
        # The first to leave with an error code takes the others with it.
        _wait_for_all()
        raise SystemExit(self.stop.exit_code)

    def before_save(self, run: Any, it: int) -> None:
        """Collect what every rank has to say."""
        self.checkpoints.add(it)
        self._snapshot = state.take_snapshot(run.parts, run.world)

    def after_save(self, run: Any, it: int) -> None:
        """Write the state: the newest adapter without one tells that one was lost."""
        arrays, parts = self._snapshot
        self._snapshot = ()
        metrics = run.folder / METRICS
        info = {
            "parts": parts,
            "pending": run.pending,
            "updates": run.updates,
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
            "identity": run.identity,
        }
        checkpoint.save_state(run.folder, it, arrays, info)

    def end(self, run: Any, it: int) -> None:
        """Drop old checkpoints for the last time."""
        self.after_step(run, it)


def find_checkpoint(
    args: SimpleNamespace, identity: dict[str, str]
) -> checkpoint.TrainingState | None:
    """Find the state to go on with, and say from where."""
    try:
        state = checkpoint.newest_state(args.adapter_path)
    except InputError as e:
        if not args.restart:
            raise InputError(
                f"{e} Restore its files, or give --restart to begin again at step 0 and "
                "overwrite what is there."
            ) from e
        rprint(f"[WARNING] {e} The run begins again at step 0.")
        return None
    if state is None:
        rprint(f"{args.adapter_path} has no checkpoint yet: the run starts again.")
        return None
    checkpoint.check_identity(state, identity, args.adapter_path, args.resume_anyway)
    done, iters = state.iteration, args.iters
    if done > iters or (done == iters and not state.info["pending"]):
        how = f"is complete: it has taken all of its {done:,} steps."
        if done > iters:
            how = f"has already taken {done:,} steps, more than the {iters:,} asked "
            how += "for: it takes no more."
        train_on = "To train on, give a larger --iters."
        rprint(f"The run in {args.adapter_path} {how} {train_on}")
        return state
    since = state.info["parts"].get("best", {}).get("since", 0)
    if 0 < (args.early_stopping or 0) <= since and not state.info["pending"]:
        rprint(
            f"The run in {args.adapter_path} stopped early after step {done:,}: it takes "
            "no more. To train on, give a larger --early-stopping."
        )
        return state
    rprint(f"Going on after step {done:,} of {iters:,}.")
    before = adapter_config(args.adapter_path) or {}
    if before.get("iters") not in (None, args.iters):
        rprint(
            f"The run has {args.iters:,} steps now instead of {before['iters']:,}: a "
            f"learning rate schedule ends at step {args.iters:,}."
        )
    return state


class _Resume(Feature):
    brings = ("keep_checkpoints",)

    def settings(self) -> dict[str, Iterable[Setting]]:
        marks: dict[str, Any] = {"resume": "free"}
        what = "Go on with the run in this adapter folder; needs no other flag."
        own: dict[str, Any] = {"metavar": "DIR", "per_rank": True, **marks}
        anyway = "Go on although data, model or settings are not those of the start."
        again = (
            "Let resume begin again at step 0 where no checkpoint can be used, and "
            "overwrite what is there."
        )
        found = [
            Setting("resume", None, what, kind=str, **own),
            Setting("resume_anyway", False, anyway, per_rank=True, **marks),
            Setting("restart", False, again, **marks),
        ]
        return {"What to do": found}

    def check(self, args: Any) -> None:
        if args.restart and not args.resume:
            raise InputError(
                "restart needs resume: without it a run begins anew anyway."
            )

    def around_command(self, args: Any) -> AbstractContextManager:
        writes = args.train and not args.dry_run and _is_first()
        return folder_kept(args.adapter_path) if writes else nullcontext()

    def after_weights(self, job: Any) -> None:
        args, sets = job.args, (job.train_set, job.valid_set or [])
        given = job.model, job.reference_model, job.reference
        job.identity = run_identity(*given, *sets)
        if args.resume and not args.dry_run:
            job.state = find_checkpoint(args, job.identity)
        if job.state:
            job.metrics_bytes = job.state.info["metrics_bytes"]
            fitting_weights(job.model, job.state.adapter)

    def inputs(self, job: Any) -> dict[str, Any]:
        return rank_inputs(job.identity, job.state)

    def claim_folder(self, job: Any) -> None:
        keep_folder(job.args.adapter_path)

    def clear_folder(self, job: Any) -> None:
        # An earlier run's states do not belong to these settings.
        done = job.state.iteration if job.state else -1
        checkpoint.drop_newer(job.args.adapter_path, done)

    def parts(self, run: Any) -> dict[str, Any]:
        args, folder = run.args, run.folder
        run.parts |= {
            "optimizer": state.OptimizerState(run.optimizer),
            "accumulator": state.TreeState(run.state[3]),
            "checkpoints": checkpoint.Checkpoints(folder, args.keep_checkpoints),
        }
        return {"stoppable": Stoppable(run)}

    def around(self, model: Any, args: Any, folder: Path) -> AbstractContextManager:
        return folder_kept(folder) if _is_first() else nullcontext()


def _wait_for_all() -> None:
    """Wait until every rank got here; one that leaves earlier ends the others."""
    if mx.distributed.init().size() > 1:
        mx.eval(mx.distributed.all_sum(mx.array(1.0)))


def _is_first():
    return mx.distributed.init().rank() == 0


FEATURE = _Resume()
