"""Measures that are one sum over another, so that a bootstrap draw only weighs their parts.

Axes: N clips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Mean = tuple[Tensor, Tensor]
"""Numerators and denominators of the clips, [N] each; a clip with denominator 0 does not count."""


def mean_of(values: Sequence[float]) -> Mean:
    """The plain average of [N] numbers; NaN does not count."""
    return ratio([(0.0, 0.0) if math.isnan(one) else (one, 1.0) for one in values])


def ratio(parts: Sequence[tuple[float, float]]) -> Mean:
    """The sum of the first over the sum of the second of [N] pairs."""
    above, below = zip(*parts, strict=True)
    return torch.tensor(above, dtype=torch.float64), torch.tensor(below, dtype=torch.float64)


def weighed(mean: Mean, weights: Tensor) -> float:
    """The value for weights [N] of the clips; NaN where nothing counts."""
    above, below = mean
    whole = (weights * below).sum().item()
    return (weights * above).sum().item() / whole if whole else math.nan
