# Copyright © 2026 MLX Contributors

"""What a run will do, before it does it: its batches and its memory."""

from typing import Any

import mlx.core as mx

from ...tuner.trainer import DPOTrainingArgs
from ..batch.buckets import plan_batches
from ..batch.shape import (
    FREE_SHAPES,
    Bucket,
    pair_lengths,
)
from ..device import compiles

# Every batch shape is compiled once, which takes as long as ten steps of a small model,
# and its program is never dropped. More of them save little padding.
FEWEST_SHAPES, MOST_SHAPES = 4, 16
BATCHES_A_SHAPE = 12


def plan_options(
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
        options |= {"prompt_pad": 128, "fused_pad": 128}
    return options


def training_plan(
    dataset: Any, args: DPOTrainingArgs, in_order: bool = False
) -> list[Bucket]:
    """The buckets that a run makes batches of."""
    options = plan_options(dataset, args, in_order)
    return plan_batches(dataset, args.batch_size, args.sharing, **options)


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
