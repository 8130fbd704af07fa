# Copyright © 2026 MLX Contributors

"""A run in progress: its steps, what happens between them, and going on later."""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ...tuner.trainer import DPOTrainingArgs, training_step
from ..batch.collate import count_tokens, epoch_batches, iterate_preference_batches
from ..device import NewKernels, cache_limit, compiles, trim_cache
from ..forward.frozen import FrozenStart
from ..measure.evaluation import evaluate_pairs
from ..measure.metrics import hidden_metrics, sum_values
from ..measure.window import LastGradient, MetricsWindow
from ..policy.model import load_weights
from ..ranks import wait_for_all
from ..step import scoring_step
from ..terminal import rprint
from . import checkpoint, state
from .best import BestAdapter
from .layouts import LayoutTrial
from .plan import possible_layouts, training_plan
from .screen import PreferenceTrainUI
from .signals import StopSignals

INPUTS = ("prompts", "inputs")


class TrainingStopped(RuntimeError):
    """A run that can't go on: one line that says why, and what to do."""


class _Interrupted(Exception):
    """A signal came during validation."""


class PreferenceRun:
    """What a run trains, what it knows and how far it is."""

    def __init__(
        self,
        policy_model: Any,
        reference: Any,
        optimizer: Any,
        args: DPOTrainingArgs,
        train_set: Any,
        val_set: Any = None,
    ):
        self.policy_model, self.reference, self.args = policy_model, reference, args
        self.optimizer = optimizer
        self._step, self.state = training_step(policy_model, optimizer, args)
        self.train_set, self.val_set = train_set, val_set
        self.world = mx.distributed.init()
        self.rank = self.world.rank()
        self.folder = Path(args.adapter_file).parent
        self.callback: Any = None
        self.identity: dict[str, Any] = {}
        self.hidden = hidden_metrics(args.objective)
        self.metrics: dict[str, float] = {}
        #: Updates so far, and those of steps that were skipped.
        self.updates = 0
        self.shapes: set[tuple] = set()
        self.window = MetricsWindow(self.hidden)
        self.gradient = LastGradient()
        self.skipped = state.SkippedSteps()
        self.checkpoints = checkpoint.Checkpoints(self.folder, args.keep_checkpoints)
        self.best = BestAdapter(args)
        self.ui = PreferenceTrainUI(
            args.iters, rank=self.rank, noun=args.objective.noun
        )
        self.parts: dict[str, state.Part] = {
            "optimizer": state.OptimizerState(optimizer),
            "accumulator": state.TreeState(self.state[3]),
            "window": self.window,
            "reference": reference,
            "gradient": self.gradient,
            "skipped": self.skipped,
            "checkpoints": self.checkpoints,
            "best": self.best,
            "screen": self.ui,
        }
        if args.sync_reference and isinstance(reference.model, FrozenStart):
            self.parts["moved"] = state.MovedReference(reference.model)
        self.cache_limit = cache_limit(args.clear_cache_threshold)
        self.train_buckets = training_plan(train_set, args)
        layouts = possible_layouts(train_set, args, self.train_buckets)
        given = self.train_buckets, args.batch_size, layouts
        self.layouts = LayoutTrial(*given, args.grad_accumulation_steps)
        self.parts["layouts"] = self.layouts
        self.kernels, self.began = NewKernels(), time.perf_counter()
        self.val_buckets = training_plan(val_set, args, True) if val_set else []
        batches = epoch_batches(
            self.val_buckets, args.batch_size, num_batches=args.val_batches
        )
        self.val_batches = len(batches)
        # The same in each validation: what the reference is still asked about.
        self.validated = [val_set[i] for _, indices in batches for i in indices]

    def train(self, resume: checkpoint.TrainingState | None = None) -> None:
        """Take all steps that are left, and do what is due between them."""
        args = self.args
        compile_it = partial(self.reference.compiled, compile=compiles(args.compile))
        done, pending = self._go_on(resume) if resume else self._begin()
        self.step = compile_it(self._step, self.state, self.state)
        score = scoring_step(self.policy_model, args.objective)
        self.score = compile_it(score, [self.policy_model.state])
        batches = iterate_preference_batches(
            self.train_set,
            args.batch_size,
            self.train_buckets,
            loop=True,
            seed=args.seed,
            comm_group=self.world,
            first_batch=done,
            lead=self.layouts.lead,
            reshape=self.layouts.reshape,
        )
        self.reference.cache.exchange(self.world)
        advice = f"Go on with: --resume {self.folder}"
        with StopSignals(self.world.size() > 1, advice) as self.stop:
            if self.val_set and pending:
                self._validate(done)
                if resume:
                    self._ends_early(done)
                    self._save(done)
            self.policy_model.train()
            last = done if self.best.is_past else args.iters
            for it, batch in zip(range(done + 1, last + 1), batches):
                self._take_step(it, batch)
                if self._updates_at(it):
                    self._count_update()
                self.ui.advance()
                self._after_step(it)
                if self.best.is_past:
                    break
        if args.load_best:
            self.best.put_back(self.policy_model, self.world)
        if self.rank == 0:
            if not self.skipped.in_a_row:
                self.checkpoints.drop_old()
            self.reference.cache.save()
        if self.skipped.total == args.iters:
            raise TrainingStopped(
                f"Nothing was trained: the loss or its gradient was not finite in all "
                f"{args.iters:,} steps. {self._advice(args.iters)}"
            )

    def _begin(self):
        """Leave an earlier run's checkpoints alone: nothing tells whose they are."""
        if self.rank == 0 and (others := checkpoint.find_states(self.folder)):
            rprint(
                f"[WARNING] {self.folder} has checkpoints of an earlier run, such as "
                f"{others[0][1].name}, which resuming may find first: delete them, or "
                "give each run a folder of its own."
            )
        return 0, True

    def _go_on(self, resume):
        """Become what the run was that wrote a checkpoint."""
        load_weights(self.policy_model, resume.adapter)
        arrays, info = resume.arrays, resume.info
        self.updates = info["updates"]
        state.apply_snapshot(self.parts, arrays, info["parts"], self.world)
        self.reference.check(self.train_set, self.args.objective.ld_alpha)
        if self.rank == 0:
            checkpoint.drop_newer(self.folder, resume.iteration)
            checkpoint.copy_adapter(resume.adapter, self.args.adapter_file)
        return resume.iteration, info["pending"]

    def _after_step(self, it):
        """Report, validate, save and stop, as far as it is due."""
        args, last, doubtful = self.args, it == self.args.iters, self.skipped.in_a_row
        if self.rank == 0 and not doubtful:
            # Only now it is known that a step can be taken from the newest.
            self.checkpoints.drop_old()
        if it % args.steps_per_report == 0 or last:
            self._report(it)
        if self.val_set and (it % args.steps_per_eval == 0 or last):
            self._validate(it)
            last = last or self._ends_early(it)
        due = it % args.steps_per_save == 0 or self.checkpoints.is_due
        self.checkpoints.is_due = due and doubtful > 0
        if due and not doubtful or last:
            self._save(it)
        if self._must_stop():
            self._save_and_exit(it)

    def _updates_at(self, it):
        args = self.args
        return it % args.grad_accumulation_steps == 0 or it == args.iters

    def _take_step(self, it, batch):
        """Take one step, and wait for it."""
        tic = time.perf_counter()
        args = self.args
        # Random numbers are a function of the step, so a resumed run repeats them.
        seeds = np.random.SeedSequence([args.seed, it, self.rank])
        mx.random.seed(int(seeds.generate_state(1)[0]))
        arrays = self.reference.recall(self.train_set, batch)
        update = self._updates_at(it)
        before = args.debug_gradients and self.policy_model.trainable_parameters()
        try:
            values = self.step(arrays, update)
            mx.eval(self.state, values)
        except RuntimeError as e:
            shapes = [f"{k} {arrays[k].shape}" for k in INPUTS if k in arrays]
            raise self._failure(e, f"a step with {' and '.join(shapes)}") from e
        skipped = values.pop("skipped").item() > 0
        grad_norm = values.pop("grad_norm", mx.array(math.nan))
        gradients = values.pop("gradients", None)
        if math.isfinite(grad_norm.item()):
            trees = gradients, before, self.policy_model.trainable_parameters()
            self.gradient.keep(grad_norm, trees if args.debug_gradients else None)
        self._remember(self.train_set, batch, arrays, values["reference_logps"])
        if skipped:
            self._count_skipped(it, batch)
        else:
            self.skipped.in_a_row = 0
            sums = sum_values(values, arrays)
            self.window.add(sums, *count_tokens(arrays))
        trim_cache(self.cache_limit)
        is_new = self._is_new_shape(arrays, update) and not skipped
        seconds = time.perf_counter() - tic
        self.window.time(seconds, sums if is_new else None)
        found = self.layouts.time(seconds)
        if found and self.rank == 0:
            rprint(found)

    def _count_update(self):
        """Count an update, and let the reference follow the policy if it is due."""
        self.updates += 1
        if self.args.sync_reference and self.updates % self.args.sync_steps == 0:
            self.reference.sync(self.args.sync_alpha)

    def _is_new_shape(self, arrays, update):
        """Whether a step was compiled for its batch."""
        shape = (update, *((k, getattr(x, "shape", x)) for k, x in arrays.items()))
        is_new = shape not in self.shapes
        self.shapes.add(shape)
        return is_new and compiles(self.args.compile)

    def _failure(self, error, where):
        """Turn an error of MLX into a line that helps, where it is known."""
        text = str(error).lower()
        if not any(word in text for word in ("alloc", "memory")):
            return error
        return TrainingStopped(
            f"Memory ran out in {where}. Try grad_checkpoint: true, "
            "batch_size: 1 with grad_accumulation_steps, a smaller max_seq_length or a "
            f"4-bit model. {self.checkpoints.name_last()}"
        )

    def _count_skipped(self, it, batch):
        """Note a step whose numbers were not finite, so that it changed nothing."""
        self.skipped.count()
        place = getattr(self.train_set, "source_row", int)
        # Any rank's pairs may be the cause.
        indices = mx.distributed.all_gather(mx.array(batch.indices), group=self.world)
        rows = ", ".join(str(place(i)) for i in dict.fromkeys(indices.tolist()))
        rprint(
            f"[WARNING] Step {it} skipped: its loss or gradient is not finite "
            f"(rows {rows})."
        )
        if self.skipped.in_a_row >= self.args.max_skipped_steps:
            raise TrainingStopped(
                f"The loss or its gradient was not finite in {self.skipped.in_a_row} "
                f"steps in a row, last with rows {rows}. {self._advice(it)}"
            )

    def _advice(self, it):
        """What to do about numbers that are not finite."""
        taken = it - self.skipped.in_a_row
        if taken > 0:
            last = self.checkpoints.name_last(taken)
            return f"Lower learning_rate, or look at these rows. {last}"
        text = "No step was taken yet, so this is not the learning rate's fault: "
        if mx.float16 in (
            x.dtype for _, x in tree_flatten(self.policy_model.parameters())
        ):
            text += "float16 ends at 65,504, so use a bfloat16 or float32 model, or "
        return f"{text}look at these rows."

    def _remember(self, dataset, batch, arrays, logps):
        """Keep the reference's log-probs if they are new."""
        if "reference_logps" not in arrays:
            self.reference.remember(dataset, batch, logps)

    def _score_batch(self, batch):
        """What a validation batch's metrics are made of."""
        arrays = self.reference.recall(self.val_set, batch)
        values = self.score(arrays)
        self._remember(self.val_set, batch, arrays, values["reference_logps"])
        return values, arrays

    def _validate(self, it):
        """Evaluate, show and report, and go back to training mode."""
        tic = time.perf_counter()
        args = self.args
        try:
            with self.ui.val_task(self.val_batches) as advance:
                metrics = evaluate_pairs(
                    self._score_batch,
                    self.policy_model,
                    self.val_set,
                    args.batch_size,
                    args.val_batches,
                    self.val_buckets,
                    self.cache_limit,
                    partial(self._interruptible, advance),
                    self.hidden,
                )
        except _Interrupted:
            self._save_and_exit(it, pending=True)
        except RuntimeError as e:
            raise self._failure(e, "a validation") from e
        self.policy_model.train()
        seconds = time.perf_counter() - tic
        self.ui.report_val(it, metrics, seconds)
        if self.callback is not None:
            named = {f"val_{k}": v for k, v in metrics.items()}
            info = {"iteration": it, **named, "val_time": seconds}
            self.callback.on_val_loss_report(info)
        if it > 0:
            self.best.judge(metrics, it, self.policy_model if self.rank == 0 else None)

    def _ends_early(self, it):
        """Tell whether a run stops early after a step, and report the rest then."""
        if not self.best.is_past or it >= self.args.iters:
            return False
        if it % self.args.steps_per_report:
            self._report(it)
        if self.rank == 0:
            self.best.say_past(it)
        return True

    def _interruptible(self, advance):
        """Let a signal end a validation; several ranks must end it together."""
        advance()
        self.stop.beat()
        if self.stop.exit_code and self.world.size() == 1:
            raise _Interrupted

    def _report(self, it):
        """Average what happened since the last report, show and report it."""
        self.metrics = metrics = self.window.report(self.world)
        built = self.kernels.notice(time.perf_counter() - self.began)
        if built and self.rank == 0:
            rprint(built)
        metrics["learning_rate"] = self.optimizer.learning_rate.item()
        metrics["grad_norm"] = self.gradient.norm.item()
        metrics["skipped_steps"] = self.skipped.total
        self.reference.cache.exchange(self.world)
        if self.reference.release(self.train_set, self.validated):
            mx.clear_cache()
        self.ui.report_train(it, metrics)
        if self.callback is not None:
            info = {"iteration": it, "train_loss": metrics["loss"], **metrics}
            if (gradients := self.gradient.report()) is not None:
                info["gradients"] = gradients
            self.callback.on_train_loss_report(info)

    def _must_stop(self):
        """Tell whether a signal came, to any rank."""
        if self.world.size() == 1:
            return bool(self.stop.exit_code)
        code = mx.array(self.stop.exit_code)
        code = int(mx.distributed.all_max(code, group=self.world).item())
        # A signal that came while this rank waited is told in the next step.
        self.stop.exit_code = code or self.stop.exit_code
        self.stop.beat()
        return bool(code)

    def _save_and_exit(self, it, pending=False):
        """Save, say how to go on, and end the process as the signal asks."""
        if self.world.size() > 1:
            self.stop.ignore()
        if it not in self.checkpoints.steps[-1:] or pending:
            self._save(it, pending)
        if self.rank == 0:
            rprint(f"Stopped after step {it}. Go on with: --resume {self.folder}")
        # The first to leave with an error code takes the others with it.
        wait_for_all()
        raise SystemExit(self.stop.exit_code)

    def _save(self, it, pending=False):
        """Write a checkpoint: adapter, state, and the reference's numbers."""
        self.checkpoints.add(it)
        arrays, parts = state.take_snapshot(self.parts, self.world)
        if self.rank != 0:
            return
        metrics = self.folder / "metrics.jsonl"
        info = {
            "parts": parts,
            "pending": pending,
            "updates": self.updates,
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
            "identity": self.identity,
        }
        adapter = checkpoint.numbered(self.folder, it, "adapters")
        checkpoint.save_adapter(self.policy_model, adapter)
        checkpoint.save_state(self.folder, it, arrays, info)
        # Without a state beside it, it tells that one was lost.
        checkpoint.copy_adapter(adapter, self.args.adapter_file)
        self.reference.cache.save()
        self.ui.report_save(adapter)
