# Copyright © 2026 MLX Contributors

"""The shapes that batches of the same pairs have in another layout."""

import numpy as np

from .buckets import batch_shape, two_lengths, with_scored
from .shape import BatchShape, Bucket, input_lengths


def other_shapes(
    buckets: list[Bucket],
    lengths: np.ndarray,
    batch_size: int,
    layout: str,
    *,
    pad: int = 1,
    fused_pad: int = 1,
    max_length: int | None = None,
    ranks: int = 1,
) -> dict[BatchShape, BatchShape]:
    """The shapes that batches of the same pairs have in another layout."""
    features, _ = two_lengths(input_lengths(lengths), layout)
    longest = np.iinfo(np.int32).max if max_length is None else max_length - 1
    pads = pad, pad if layout == "ragged" else 1, fused_pad
    parts: dict[BatchShape, list] = {}
    for shape, indices in buckets:
        parts.setdefault(shape, []).append(indices)
    found = {}
    for shape, indices in parts.items():
        part = np.concatenate(indices)
        other = Bucket(batch_shape(features[part], layout, *pads, longest), part)
        found[shape] = with_scored(other, lengths, -(-batch_size // ranks)).shape
    return found
