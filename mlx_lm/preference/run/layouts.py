# Copyright © 2026 MLX Contributors

"""How a run lays its batches out: measured on its first steps, then kept.

No count of tokens tells what is quickest: launches bound small batches, arithmetic
bounds large ones, masks cost what they cost. So some of the first batches, all of one
shape, are laid out in turn in each way that may win. Every one is a real step: the
pairs of a batch never depend on it, and its numbers agree within rounding.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...tuner.trainer import DPOTrainingArgs
from ..batch.buckets import LAYOUTS
from ..batch.relaid import other_shapes
from ..batch.shape import PLACED, BatchShape, Bucket, padded_tokens, pair_lengths
from ..device import compiles
from ..features import Feature
from ..forward.probe import Sharing, check_packing, check_sharing
from ..setting import Setting
from ..terminal import rprint
from .plan import plan_options

NAMES = {
    "plain": "whole rows",
    "equal": "prompts shared as far as all of a batch go",
    "ragged": "prompts shared",
}
# A launch costs as much for few tokens as for many: so many more may be no slower.
MOST_TOKENS = 1.6
# The first turn of each layout compiles.
TURNS = 3
# A run of fewer batches an epoch gains less than it costs.
FEWEST_BATCHES = 24
# The other layout has to be quicker by more than a clock's noise.
MARGIN = 0.97


def possible_layouts(
    dataset: Any, args: DPOTrainingArgs, buckets: list[Bucket]
) -> dict[str, dict[BatchShape, BatchShape]]:
    """Layouts in which a plan's batches may be quickest: their shapes by the plan's."""
    own = buckets[0].shape.layout
    layouts = {own: {bucket.shape: bucket.shape for bucket in buckets}}
    if not args.try_layouts or own in PLACED:
        return layouts
    lengths, options = pair_lengths(dataset), plan_options(dataset, args)
    names = ("pad", "fused_pad", "max_length", "ranks")
    options = {name: options[name] for name in names if name in options}
    for name in LAYOUTS[LAYOUTS.index(args.sharing) :]:
        given = buckets, lengths, args.batch_size, name
        layouts.setdefault(name, other_shapes(*given, **options))

    def tokens(name):
        relaid = [b._replace(shape=layouts[name][b.shape]) for b in buckets]
        return padded_tokens(relaid, args.batch_size, lengths)

    counts = {name: tokens(name) for name in layouts}
    most = min(counts.values()) * (MOST_TOKENS if compiles(args.compile) else 1.2)
    plain = counts.get("plain", 0)
    # What neither saves tokens nor is simpler is not worth a try.
    useful = lambda n: n in (own, "plain") or counts[n] < 0.98 * plain
    kept = [n for n in counts if n == own or counts[n] <= most and useful(n)]
    return {name: layouts[name] for name in kept}


class LayoutTrial:
    """Which layout is next, what each took, and which one a run keeps."""

    def __init__(
        self,
        buckets: list[Bucket],
        batch_size: int,
        layouts: dict[str, dict[BatchShape, BatchShape]],
        steps_a_turn: int = 1,
    ):
        self.layouts, self.steps_a_turn = layouts, steps_a_turn
        self.names = [*layouts]
        self.chosen: str | None = None
        self.seconds: dict[str, list[float]] = {name: [] for name in self.names}
        self.taken = 0
        self._turn, self._in_trial = 0.0, False
        counts: Counter = Counter()
        for bucket in buckets:
            counts[bucket.shape] += -(-len(bucket.indices) // batch_size)
        self.steps = TURNS * len(self.names) * steps_a_turn
        self.shape = self._middle(counts)
        if len(self.names) < 2 or counts.total() < FEWEST_BATCHES or not self.shape:
            self.chosen, self.steps = self.names[0], 0

    def _middle(self, counts):
        """The shape in the middle of all that is computed, with enough batches."""
        cost = lambda s: counts[s] * (s.prompt + 2 * s.width)
        shapes = sorted(counts, key=lambda s: s.prompt + 2 * s.width)
        half, before = sum(map(cost, shapes)) / 2, [0.0]
        for shape in shapes:
            before.append(before[-1] + cost(shape))
        far = {
            s: abs((a + b) / 2 - half) for s, a, b in zip(shapes, before, before[1:])
        }
        enough = [s for s in shapes if counts[s] >= self.steps]
        return min(enough, key=lambda s: far[s], default=None)

    @property
    def lead(self) -> tuple[BatchShape, int] | None:
        """The shape of the run's first batches, and how many of them there are."""
        return (self.shape, self.steps) if self.steps else None

    def batches(self) -> dict[str, Any]:
        """What the run's batches are made with."""
        return {"lead": self.lead, "reshape": self.reshape}

    def after_step(self, run: Any, it: int) -> None:
        """Time a step of the run."""
        if (found := self.time(run.seconds)) and run.rank == 0:
            rprint(found)

    def reshape(self, shape: BatchShape) -> BatchShape:
        """The shape of the next batch, whose pairs the plan gave this one."""
        self._in_trial = self.chosen is None and shape == self.shape
        name = self.chosen or self.names[0]
        if self._in_trial:
            turn = self.taken // self.steps_a_turn
            name = self.names[turn % len(self.names)]
        return self.layouts[name][shape]

    def time(self, seconds: float) -> str | None:
        """Count a step; once all are taken, decide, and say what was found."""
        if not self._in_trial:
            return None
        turn, place = divmod(self.taken, self.steps_a_turn)
        self.taken += 1
        self._turn = seconds + (self._turn if place else 0.0)
        if place == self.steps_a_turn - 1 and turn >= len(self.names):
            self.seconds[self.names[turn % len(self.names)]].append(self._turn)
        return self._decide() if self.taken == self.steps else None

    def _decide(self):
        # Ranks wait for the slowest, and all have to choose alike.
        best = mx.array([min(self.seconds[name]) for name in self.names])
        best = mx.distributed.all_max(best, group=mx.distributed.init()).tolist()
        times = dict(zip(self.names, best))
        first, quickest = self.names[0], min(times, key=lambda name: times[name])
        is_quicker = times[quickest] < MARGIN * times[first]
        self.chosen = quickest if is_quicker else first
        found = ", ".join(f"{NAMES[n]} {t:.3f} s" for n, t in times.items())
        others = [t for name, t in times.items() if name != self.chosen]
        saved = 1 - times[self.chosen] / min(others)
        kept = (
            f"{NAMES[self.chosen]}, {abs(saved):.0%} {'less' if saved > 0 else 'more'}"
        )
        return f"A step takes with {found}: the run goes on with {kept}."

    def state_dict(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """What a checkpoint holds of it."""
        names = ("chosen", "seconds", "taken")
        return {}, {name: getattr(self, name) for name in names} | {"turn": self._turn}

    def load_state_dict(self, arrays: dict[str, mx.array], info: dict) -> None:
        """Go on as another run did, if it had the same choice."""
        if set(info.get("seconds", ())) != set(self.names):
            return
        self.chosen, self.taken = info["chosen"], info["taken"]
        self.seconds, self._turn = info["seconds"], info["turn"]


def find_sharing(
    args: SimpleNamespace, model: nn.Module, reference_model: Any
) -> Sharing:
    """Share or pack as the settings ask for, as far as policy and reference can."""
    # The reference runs on the same batches.
    models = [m for m in (model, reference_model) if isinstance(m, nn.Module)]
    if args.pack:
        return [check_packing(m, args.max_seq_length) for m in models][0]
    # Also finds out whether a model can be taken apart, shared or not.
    checked = [check_sharing(m) for m in models]
    grade, notice, _ = max(checked, key=lambda s: LAYOUTS.index(s.grade))
    warning = next((s.warning for s in checked if s.warning), "")
    if args.share_prompt is False:
        grade, notice = "plain", "" if grade == "plain" else notice
    return Sharing(grade, notice, warning)


def likely_sharing(args: SimpleNamespace) -> str:
    """What ``find_sharing`` will find, as far as the settings tell."""
    if args.pack:
        return "packed"
    # Every family but one in a hundred can, and asking would allocate the model.
    return "plain" if args.share_prompt is False else "equal"


class _Layouts(Feature):
    def settings(self) -> dict[str, Iterable[Setting]]:
        what = (
            "Compute each prompt once for both answers, where that gives the same "
            "numbers. Default: what is quicker in the first steps."
        )
        return {"What to do": [Setting("share_prompt", None, what, kind=bool)]}

    def before_weights(self, job: Any) -> None:
        job.settings = shared_settings(job.args, job.settings, likely_sharing(job.args))

    def after_weights(self, job: Any) -> None:
        sharing = find_sharing(job.args, job.model, job.reference_model)
        job.settings = shared_settings(job.args, job.settings, sharing.grade)
        job.lines += filter(None, (sharing.notice, sharing.warning))

    def parts(self, run: Any) -> dict[str, Any]:
        args, plan = run.args, run.train_buckets
        layouts = possible_layouts(run.train_set, args, plan)
        given = plan, args.batch_size, layouts
        return {"layouts": LayoutTrial(*given, args.grad_accumulation_steps)}


def shared_settings(
    args: SimpleNamespace, settings: DPOTrainingArgs, grade: str
) -> DPOTrainingArgs:
    """A run's settings, with its batches laid out in some way."""
    tries = args.share_prompt is None and not args.pack
    return replace(settings, sharing=grade, try_layouts=tries)


FEATURE = _Layouts()
