"""Anomalous or clean: rates at a threshold, and ranking over all thresholds.

The positive class is 'anomalous'. Every measure takes a weight for each sample, so that frames of
one score count as one sample of their number, and so that a bootstrap draw is a vector of weights.
Axes: N samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cac_reward.calibration import expected_calibration_error

RATES = ("accuracy", "balanced_accuracy", "precision", "recall", "f1")


def rates(p_anomalous: Tensor, anomalous: Tensor, weights: Tensor) -> dict[str, float]:
    """Count right and wrong verdicts.

    A verdict is 'anomalous' above 0.5 and 'clean' up to it, as in `AnomalyReport.verdict`.

    precision = TP / (TP + FP),  recall = TP / (TP + FN),  f1 = 2 TP / (2 TP + FP + FN)
    accuracy = (TP + TN) / N,    balanced_accuracy = (recall + TN / (TN + FP)) / 2

    Args:
        p_anomalous: [N] in [0, 1].
        anomalous: [N] bool, the truth.
        weights: [N] at least 0.

    Returns:
        Each of `RATES` in [0, 1]; NaN where its denominator is 0.

    Raises:
        ValueError: If shapes differ or a number leaves its range.
    """
    p_anomalous, anomalous, weights = _check(p_anomalous, anomalous, weights)
    said = p_anomalous > 0.5
    tp, fp = weights[said & anomalous].sum().item(), weights[said & ~anomalous].sum().item()
    fn, tn = weights[~said & anomalous].sum().item(), weights[~said & ~anomalous].sum().item()
    recall = _share(tp, tp + fn)
    return {
        "accuracy": _share(tp + tn, tp + tn + fp + fn),
        "balanced_accuracy": (recall + _share(tn, tn + fp)) / 2,
        "precision": _share(tp, tp + fp),
        "recall": recall,
        "f1": _share(2 * tp, 2 * tp + fp + fn),
    }


def roc_auc(p_anomalous: Tensor, anomalous: Tensor, weights: Tensor) -> float:
    """Measure how often an anomalous sample ranks above a clean one; a tie counts half.

    Args:
        p_anomalous: [N] in [0, 1].
        anomalous: [N] bool, the truth.
        weights: [N] at least 0.

    Returns:
        In [0, 1]; NaN where one class is missing.

    Source:
        The Mann-Whitney statistic over the number of pairs.
    """
    positive, negative = _by_score(*_check(p_anomalous, anomalous, weights))
    below = negative.cumsum(0) - negative
    pairs = (positive.sum() * negative.sum()).item()
    return _share((positive * (below + negative / 2)).sum().item(), pairs)


def average_precision(p_anomalous: Tensor, anomalous: Tensor, weights: Tensor) -> float:
    """Average the precision over the recall that each threshold adds.

    result = sum over distinct scores, falling, of  (R_k - R_(k-1)) * P_k

    Args:
        p_anomalous: [N] in [0, 1].
        anomalous: [N] bool, the truth.
        weights: [N] at least 0.

    Returns:
        In [0, 1]; NaN where nothing is anomalous.

    Source:
        The step-wise sum of scikit-learn's `average_precision_score`.
    """
    positive, negative = _by_score(*_check(p_anomalous, anomalous, weights))
    positive, negative = positive.flip(0), negative.flip(0)
    found = positive.cumsum(0)
    precision = found / (found + negative.cumsum(0)).clamp(min=torch.finfo(found.dtype).tiny)
    return _share((positive * precision).sum().item(), positive.sum().item())


def pr_auc(p_anomalous: Tensor, anomalous: Tensor, weights: Tensor) -> float:
    """Measure the area under the straight lines between the points of precision over recall.

    result = sum over distinct scores, falling, of  (R_k - R_(k-1)) * (P_k + P_(k-1)) / 2,  P_0 = 1

    More than `average_precision` where many samples share a score.

    Args:
        p_anomalous: [N] in [0, 1].
        anomalous: [N] bool, the truth.
        weights: [N] at least 0.

    Returns:
        In [0, 1]; NaN where nothing is anomalous.

    Source:
        What XD-Violence's published code reports as AP: scikit-learn's `auc` of
        `precision_recall_curve`.
    """
    positive, negative = _by_score(*_check(p_anomalous, anomalous, weights))
    # Scores that no weight falls on are no points of the curve.
    positive, negative = (one[positive + negative > 0].flip(0) for one in (positive, negative))
    found = positive.cumsum(0)
    precision = found / (found + negative.cumsum(0))
    before = torch.cat([torch.ones(1, dtype=precision.dtype), precision])[:-1]
    return _share((positive * (precision + before) / 2).sum().item(), positive.sum().item())


def anchored_roc_auc(p_anomalous: Tensor, anomalous: Tensor, weights: Tensor) -> float:
    """`roc_auc` with one more clean sample of score 0 and one more anomalous one of score 1.

    So that the frames of a video that are all clean, or all anomalous, have a value.

    Args:
        p_anomalous: [N] in [0, 1].
        anomalous: [N] bool, the truth.
        weights: [N] at least 0.

    Returns:
        In [0, 1].
    """
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return roc_auc(
        torch.cat([ends, p_anomalous.double()]),
        torch.cat([ends.bool(), anomalous.bool()]),
        torch.cat([torch.ones(2, dtype=torch.float64), weights.double()]),
    )


def calibration_error(p_anomalous: Tensor, anomalous: Tensor, weights: Tensor) -> float:
    """Repeat each sample by its weight, a whole number, and take `expected_calibration_error`.

    Args:
        p_anomalous: [N] in [0, 1].
        anomalous: [N] bool, the truth.
        weights: [N] whole numbers, at least 0.

    Returns:
        In [0, 1]; NaN where no sample has weight.
    """
    p_anomalous, anomalous, weights = _check(p_anomalous, anomalous, weights)
    times = weights.round().long()
    if (times != weights).any():
        raise ValueError("weights must be whole numbers for a calibration error, got fractions")
    return expected_calibration_error(
        p_anomalous.repeat_interleave(times), anomalous.repeat_interleave(times)
    )


def _by_score(p_anomalous: Tensor, anomalous: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weight of anomalous and of clean samples at each distinct score, rising."""
    scores, place = p_anomalous.unique(return_inverse=True)
    empty = torch.zeros(len(scores), dtype=torch.float64)
    positive = empty.index_add(0, place, weights * anomalous)
    return positive, empty.index_add(0, place, weights * ~anomalous)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _check(
    p_anomalous: Tensor, anomalous: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [tuple(one.shape) for one in (p_anomalous, anomalous, weights)]
    if p_anomalous.ndim != 1 or len(set(shapes)) != 1:
        raise ValueError(
            "p_anomalous, anomalous and weights must be one number for each sample, got shapes "
            f"{shapes}"
        )
    if not ((p_anomalous >= 0) & (p_anomalous <= 1)).all():
        raise ValueError(
            "p_anomalous must be in [0, 1], got a number outside or NaN; leave out what was not "
            "judged, and count it"
        )
    if not ((weights >= 0) & weights.isfinite()).all():
        raise ValueError("weights must be at least 0 and finite, got others")
    return p_anomalous.double(), anomalous.bool(), weights.double()
