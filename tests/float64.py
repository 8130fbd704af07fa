# Copyright © 2026 MLX Contributors

"""Log-probs that the tests compare with."""

import numpy as np


def float64_logps(logits, targets, mask):
    """Summed log-probs in float64, from arrays of any framework."""
    x = np.asarray(logits, dtype=np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    x = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    x = np.take_along_axis(x, np.asarray(targets)[..., None], axis=-1)[..., 0]
    return (x * np.asarray(mask)).sum(axis=-1)
