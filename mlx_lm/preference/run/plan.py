# Copyright © 2026 MLX Contributors

"""What a run will do, before it does it: its batches and its memory."""

from typing import Any

import mlx.core as mx

from ...tuner.trainer import DPOTrainingArgs
from ..batch.buckets import LAYOUTS, other_shapes, plan_batches
from ..batch.shape import (
    FREE_SHAPES,
    PLACED,
    BatchShape,
    Bucket,
    padded_tokens,
    pair_lengths,
)
from ..device import compiles

# Every batch shape is compiled once, which takes as long as ten steps of a small model,
# and its program is never dropped. More of them save little padding.
FEWEST_SHAPES, MOST_SHAPES = 4, 16
BATCHES_A_SHAPE = 12
# A launch costs as much for few tokens as for many: so many more may be no slower.
MOST_TOKENS = 1.6


def _options(
    dataset: Any, args: DPOTrainingArgs, in_order: bool = False
) -> dict[str, Any]:
    """How finely batches are cut, where it costs something and where not."""
    options = {
        "max_length": args.max_seq_length,
        "ranks": mx.distributed.init().size(),
    }
    if not compiles(args.compile):
        # A shape costs nothing, so that padding decides.
        least = 1 if in_order else 2
        return {"max_shapes": FREE_SHAPES, "min_batches": least, **options}
    # A validation is too short to make up for a program.
    batches = 0 if in_order else len(pair_lengths(dataset)) // args.batch_size
    shapes = min(max(batches // BATCHES_A_SHAPE, FEWEST_SHAPES), MOST_SHAPES)
    if args.grad_accumulation_steps > 1:
        # The step has two forms then.
        shapes = max(shapes // 2, FEWEST_SHAPES)
    options |= {"max_shapes": shapes, "min_batches": 1 if in_order else 4, "pad": 8}
    if args.try_layouts:
        # Batches that are cut for whole rows suit both, the others sharing alone.
        options["shared_price"] = 1.15
    if mx.cuda.is_available():
        # Attention has a fused gradient for queries of such a length.
        options["prompt_pad"] = 128
    return options


def training_plan(
    dataset: Any, args: DPOTrainingArgs, in_order: bool = False
) -> list[Bucket]:
    """The buckets that a run makes batches of."""
    options = _options(dataset, args, in_order)
    return plan_batches(dataset, args.batch_size, args.sharing, **options)


def possible_layouts(
    dataset: Any, args: DPOTrainingArgs, buckets: list[Bucket]
) -> dict[str, dict[BatchShape, BatchShape]]:
    """Layouts in which a plan's batches may be quickest: their shapes by the plan's."""
    own = buckets[0].shape.layout
    layouts = {own: {bucket.shape: bucket.shape for bucket in buckets}}
    if not args.try_layouts or own in PLACED:
        return layouts
    lengths, options = pair_lengths(dataset), _options(dataset, args)
    names = ("pad", "max_length", "ranks")
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


def describe_plan(buckets: list[Bucket], batch_size: int) -> list[str]:
    """Write a run's batches as a table."""
    lines = ["batches   pairs  prompt  answers  scored"]
    for shape, indices in buckets:
        count = -(-len(indices) // batch_size)
        lines.append(
            f"{count:>7}{len(indices):>8}{shape.prompt:>8}{shape.width:>9}"
            f"{shape.scored:>8}"
        )
    return lines
