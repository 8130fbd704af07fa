# Copyright © 2026 MLX Contributors

"""What a run will do, before it does it: its batches and its memory."""

from typing import Any

import mlx.core as mx

from ...tuner.trainer import DPOTrainingArgs
from ..batch.buckets import FREE_SHAPES, plan_batches
from ..batch.shape import Bucket
from ..device import compiles

# Every batch shape is compiled once, and its program is never dropped.
MAX_SHAPES = 32


def training_plan(
    dataset: Any, args: DPOTrainingArgs, in_order: bool = False
) -> list[Bucket]:
    """The buckets that a run makes batches of."""
    shapes = {"max_shapes": MAX_SHAPES, "min_batches": 4, "pad": 8}
    if args.grad_accumulation_steps > 1:
        # The step has two forms then.
        shapes["max_shapes"] //= 2
    if mx.cuda.is_available():
        # Attention has a fused gradient for queries of such a length.
        shapes["prompt_pad"] = 128
    if not compiles(args.compile):
        # A shape costs nothing, so that padding decides.
        shapes = {"max_shapes": FREE_SHAPES, "min_batches": 2}
    if in_order:
        shapes["min_batches"] = 1
    return plan_batches(
        dataset,
        args.batch_size,
        args.sharing,
        max_length=args.max_seq_length,
        ranks=mx.distributed.init().size(),
        **shapes,
    )


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
