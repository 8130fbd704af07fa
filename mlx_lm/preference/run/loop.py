# Copyright © 2026 MLX Contributors

"""A run in progress: its steps, what happens between them, and going on later."""

import math
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ...tuner.trainer import DPOTrainingArgs, training_step
from ..batch.collate import count_tokens, epoch_batches, iterate_preference_batches
from ..device import cache_limit, compiles, trim_cache
from ..features import Feature, tell
from ..forward.frozen import is_start
from ..measure.evaluation import evaluate_pairs
from ..measure.metrics import hidden_metrics, sum_values
from ..measure.window import LastGradient, MetricsWindow
from ..step import scoring_step
from ..terminal import counted, rprint
from .adapters import copy_adapter, numbered, save_adapter
from .plan import training_plan
from .screen import PreferenceTrainUI

INPUTS = ("prompts", "inputs")


# Words of MLX's errors, and what to say of them; the first that fits.
FAILURES = {
    ("resource limit",): "Metal can't hold more buffers, in {where}. Give a smaller "
    "clear_cache_threshold, such as 500MB.",
    ("impacting interactivity", "gpu timeout", "gpu hang", "failed: internal error"): (
        "The GPU took too long over one piece of work in {where}, and macOS stopped it. "
        "Set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1, or try batch_size: 1 with "
        "grad_accumulation_steps or a smaller max_seq_length."
    ),
    ("alloc", "memory"): "Memory ran out in {where}. Try grad_checkpoint: true, "
    "batch_size: 1 with grad_accumulation_steps, a smaller max_seq_length or a 4-bit "
    "model.",
}


class TrainingStopped(RuntimeError):
    """A run that can't go on: one line that says why, and what to do."""


class SkippedSteps:
    """How many steps changed nothing, because their numbers were not finite."""

    def __init__(self) -> None:
        self.total = self.in_a_row = 0

    def count(self) -> None:
        """Count one more."""
        self.total += 1
        self.in_a_row += 1

    def state_dict(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        return {}, dict(vars(self))

    def load_state_dict(self, arrays: dict[str, mx.array], info: dict) -> None:
        vars(self).update(info)


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
        #: What must be the same for a checkpoint, and the one to go on from.
        self.identity: dict[str, Any] = {}
        self.resume: Any = None
        self.hidden = hidden_metrics(args.objective)
        self.metrics: dict[str, float] = {}
        #: Steps and updates so far, and whether the validation of this step is due.
        self.done = self.updates = 0
        self.pending = True
        #: Whether the policy still is the reference.
        self.at_start = False
        #: The last step to take, which parts may bring forward.
        self.last = args.iters
        #: Whether a save was put off: nothing was known to follow from the weights.
        self.put_off = False
        self.shapes: set[tuple] = set()
        self.window = MetricsWindow(self.hidden)
        self.gradient = LastGradient()
        #: Those of the last step, if it applied them and they are asked for.
        self.gradients: Any = None
        self.skipped = SkippedSteps()
        self.ui = PreferenceTrainUI(
            args.iters, rank=self.rank, noun=args.objective.noun
        )
        self.cache_limit = cache_limit(args.clear_cache_threshold)
        self.train_buckets = training_plan(train_set, args)
        self.val_buckets = training_plan(val_set, args, True) if val_set else []
        batches = epoch_batches(
            self.val_buckets, args.batch_size, num_batches=args.val_batches
        )
        self.val_batches = len(batches)
        # The same in each validation: what the reference is still asked about.
        self.validated = [val_set[i] for _, indices in batches for i in indices]
        self.parts: dict[str, Any] = {
            "window": self.window,
            "reference": reference,
            "gradient": self.gradient,
            "skipped": self.skipped,
            "screen": self.ui,
        }

    def take_part(self, features: Iterable[Feature]) -> None:
        """Let features add their parts, before the first step."""
        for feature in features:
            self.parts |= feature.parts(self)

    def tell(self, what: str, *given: Any) -> list[Any]:
        """Tell all parts what has happened, see ``Feature.parts``."""
        return list(tell(self.parts, what, self, *given))

    def train(self) -> None:
        """Take all steps that are left, and do what is due between them."""
        args = self.args
        self.tell("begin", 0)
        compiled, compile = self.reference.compiled, compiles(args.compile)
        self.step = compiled(self._step, self.state, self.state, compile=compile)
        given, held = (self.policy_model, args.objective), [self.policy_model.state]
        self.score = compiled(scoring_step(*given), held, compile=compile)
        # Taken once, and the compiler fails where two results are one array.
        self.score_start = compiled(scoring_step(*given, True), held, compile=False)
        options: dict[str, Any] = {}
        for more in tell(self.parts, "batches"):
            options |= more
        batches = iterate_preference_batches(
            self.train_set,
            args.batch_size,
            self.train_buckets,
            loop=True,
            seed=args.seed,
            comm_group=self.world,
            first_batch=self.done,
            **options,
        )
        with ExitStack() as stack:
            for context in self.tell("around"):
                stack.enter_context(context)
            if self.val_set and self.pending:
                self._validate(self.done)
                self.pending = False
                self.tell("after_first_validation", self.done)
            self.pending = False
            self.policy_model.train()
            for it, batch in zip(range(self.done + 1, self.last + 1), batches):
                self._take_step(it, batch)
                if self._updates_at(it):
                    self.updates += 1
                    self.tell("after_update", it)
                self.ui.advance()
                self._after_step(it)
                if it >= self.last:
                    break
        self.tell("end", self.last)
        # Parts may have ended it early, and a run that goes on may have fewer to take.
        if self.skipped.total == (steps := max(self.done, self.last)):
            raise TrainingStopped(
                f"Nothing was trained: the loss or its gradient was not finite in all "
                f"{steps:,} steps. {self._advice(steps)}"
            )
        if skipped := self.skipped.in_a_row:
            rprint(
                f"[WARNING] The run ends with {counted(skipped, 'skipped step')}, and no "
                f"step tells whether what was saved is sound. {self._advice(steps)}"
            )

    def _after_step(self, it):
        """Report, validate, save and stop, as far as it is due."""
        args, last, doubtful = self.args, it == self.args.iters, self.skipped.in_a_row
        self.tell("after_step", it)
        if it % args.steps_per_report == 0 or last:
            self._report(it)
        if self.val_set and (it % args.steps_per_eval == 0 or last):
            self._validate(it)
            last = last or self.ends_early(it)
        due = it % args.steps_per_save == 0 or self.put_off
        self.put_off = due and doubtful > 0
        if due and not doubtful or last:
            self.save(it)
        self.tell("at_rest", it)

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
        try:
            values = self.step(arrays, update)
            mx.eval(self.state, values)
        except RuntimeError as e:
            shapes = [f"{k} {arrays[k].shape}" for k in INPUTS if k in arrays]
            raise self._failure(e, f"a step with {' and '.join(shapes)}") from e
        skipped = values.pop("skipped").item() > 0
        grad_norm = values.pop("grad_norm", mx.array(math.nan))
        self.gradients = values.pop("gradients", None)
        if math.isfinite(grad_norm.item()):
            self.gradient.norm = grad_norm
        else:
            self.gradients = None
        self._remember(self.train_set, batch, arrays, values["reference_logps"])
        if skipped:
            self._count_skipped(it, batch)
        else:
            self.skipped.in_a_row = 0
            sums = sum_values(values, arrays)
            self.window.add(sums, *count_tokens(arrays))
        trim_cache(self.cache_limit)
        is_new = self._is_new_shape(arrays, update) and not skipped
        self.seconds = time.perf_counter() - tic
        self.window.time(self.seconds, sums if is_new else None)

    def _is_new_shape(self, arrays, update):
        """Whether a step was compiled for its batch."""
        shape = (update, *((k, getattr(x, "shape", x)) for k, x in arrays.items()))
        is_new = shape not in self.shapes
        self.shapes.add(shape)
        return is_new and compiles(self.args.compile)

    def _failure(self, error, where):
        """Turn an error of MLX into a line that helps, where it is known."""
        text = str(error).lower()
        for words, what in FAILURES.items():
            if any(word in text for word in words):
                what = what.format(where=where)
                return TrainingStopped(f"{what} {self._last_saved()}")
        return error

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
            last = self._last_saved(taken)
            return f"Lower learning_rate, or look at these rows. {last}"
        text = "No step was taken yet, so this is not the learning rate's fault: "
        if mx.float16 in (
            x.dtype for _, x in tree_flatten(self.policy_model.parameters())
        ):
            text += "float16 ends at 65,504, so use a bfloat16 or float32 model, or "
        return f"{text}look at these rows."

    def _last_saved(self, taken=math.inf):
        """Name what was saved last, of before a step that was taken."""
        return " ".join(tell(self.parts, "name_last", taken))

    def _remember(self, dataset, batch, arrays, logps):
        """Keep the reference's log-probs if they are new."""
        if "reference_logps" not in arrays:
            self.reference.remember(dataset, batch, logps)

    def _score_batch(self, batch):
        """What a validation batch's metrics are made of."""
        arrays = self.reference.recall(self.val_set, batch)
        at_start = self.at_start and "reference_logps" not in arrays
        return (self.score_start if at_start else self.score)(arrays), arrays

    def _keep_scores(self, batch, values):
        """Keep what the reference said of a validation batch."""
        logps = values["reference_logps"]
        self._remember(self.val_set, batch, batch.arrays, logps)

    def _validate(self, it):
        """Evaluate, show and report, and go back to training mode."""
        tic = time.perf_counter()
        args = self.args
        self.at_start = is_start(self.reference.model, self.policy_model)
        try:
            with self.ui.val_task(self.val_batches) as advance:

                def count():
                    advance()
                    self.tell("after_validation_batch", it)

                metrics = evaluate_pairs(
                    self._score_batch,
                    self.policy_model,
                    self.val_set,
                    args.batch_size,
                    args.val_batches,
                    self.val_buckets,
                    self.cache_limit,
                    count,
                    self.hidden,
                    self._keep_scores,
                )
        except RuntimeError as e:
            raise self._failure(e, "a validation") from e
        self.policy_model.train()
        seconds = time.perf_counter() - tic
        self.ui.report_val(it, metrics, seconds)
        if self.callback is not None:
            named = {f"val_{k}": v for k, v in metrics.items()}
            info = {"iteration": it, **named, "val_time": seconds}
            self.callback.on_val_loss_report(info)
        self.tell("after_validation", it, metrics)

    def ends_early(self, it: int) -> bool:
        """Tell whether a run ends early after a step, and report the rest then."""
        if it < self.last or it >= self.args.iters:
            return False
        if it % self.args.steps_per_report:
            self._report(it)
        self.tell("ends_early", it)
        return True

    def _report(self, it):
        """Average what happened since the last report, show and report it."""
        self.metrics = metrics = self.window.report(self.world)
        with suppress(KeyError):  # Adafactor may have one for each weight.
            metrics["learning_rate"] = self.optimizer.learning_rate.item()
        metrics["grad_norm"] = self.gradient.norm.item()
        metrics["skipped_steps"] = self.skipped.total
        self.tell("after_report", it, metrics)
        self.ui.report_train(it, metrics)
        if self.callback is not None:
            info = {"iteration": it, "train_loss": metrics["loss"], **metrics}
            for more in tell(self.parts, "reports"):
                info |= more
            self.callback.on_train_loss_report(info)

    def save(self, it: int) -> None:
        """Write the adapter, and what parts keep beside it."""
        self.put_off = False
        self.tell("before_save", it)
        if self.rank != 0:
            return
        adapter = numbered(self.folder, it, "adapters")
        save_adapter(self.policy_model, adapter)
        self.tell("after_save", it)
        copy_adapter(adapter, self.args.adapter_file)
        self.ui.report_save(adapter)
