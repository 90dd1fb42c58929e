"""Temperature scaling: make P(clean) mean what it says on labelled clips.

Axes: N clips.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from reprlib import repr as short

import torch
from torch import Tensor

from cac_reward.plain import read_table, read_text
from cac_reward.whole_files import whole_file

FILE = "calibration.json"
VERSION = 1
MIN_CLIPS = 10
BINS = 15
# A verdict of exactly 0 or 1 has no finite logit; float32 probabilities come no closer.
_EPSILON = 1e-7
_LIMITS = (-3.0, 3.0)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a judge's verdicts are read: P = sigmoid(logit(P of the judge) / temperature)."""

    temperature: float = 1.0
    """Above 1 makes verdicts less sure, below 1 surer; above 0."""
    num_clips: int = 0
    """Clips it was fitted on."""
    error_before: float = math.nan
    """Expected calibration error on those clips, as the judge said it; in [0, 1]."""
    error_after: float = math.nan
    """The same with the temperature applied."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    def apply(self, p_clean: float) -> float:
        """The calibrated P(clean); order, 0.5 and NaN stay as they are."""
        return _scale(torch.tensor([p_clean], dtype=torch.double), self.temperature).item()

    def save(self, folder: str | Path) -> Path:
        """Write it beside a checkpoint, whole or not at all."""
        path = Path(folder) / FILE
        with whole_file(path) as opened:
            opened.write(json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Calibration:
        """Read what `save` wrote; a folder without one leaves verdicts as they are.

        Raises:
            ValueError: The file is no calibration of this version.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            return cls()
        try:
            record = dict(json.loads(path.read_bytes()))
            version = record.pop("version")
            if version != VERSION:
                raise ValueError(f"version {short(version)}")
            return cls(**record)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"calibration must be a file of version {VERSION} written by cac-reward "
                f"calibrate, got {path} ({str(error)[:200]}); delete it or calibrate again"
            ) from error


def read_labels(path: str | Path) -> dict[str, bool]:
    """Whether each clip is clean, by its path, from a CSV with the columns path and clean (0 or 1).

    Raises:
        ValueError: The columns are others, a label is no 0 or 1, or a path comes twice.
    """
    labels: dict[str, bool] = {}
    rows = read_table(f"labels in {path}", read_text("labels", path), ("path", "clean"))
    for line, row in rows:
        name = row["path"]
        if not name or row["clean"] not in ("0", "1") or name in labels:
            rule = "come once" if name in labels else "have a path and be labelled 0 or 1"
            raise ValueError(
                f"each clip must {rule}, got {short(name)} with {short(row['clean'])} in line "
                f"{line} of {path}"
            )
        labels[name] = row["clean"] == "1"
    return labels


def fit_calibration(p_clean: Tensor, clean: Tensor) -> Calibration:
    """Find the temperature under which the verdicts explain the labels best.

    temperature = argmin over T in [e^-3, e^3] of
        mean over N of  -log P(label | sigmoid(logit(p_clean) / T))

    The objective is convex in 1 / T, so a ternary search finds its only minimum.

    Args:
        p_clean: [N] verdicts in [0, 1]; NaN for clips that were not judged, which are left out.
        clean: [N] whether each clip is clean; both kinds must occur.

    Raises:
        ValueError: Shapes differ, a verdict is outside [0, 1], fewer than 10 clips were judged,
            or they are all of one kind.

    Source:
        On Calibration of Modern Neural Networks, arXiv:1706.04599, section 4.2.
    """
    p_clean, clean = _check(p_clean, clean)
    if len(p_clean) < MIN_CLIPS:
        raise ValueError(
            f"p_clean must hold at least {MIN_CLIPS} judged clips, got {len(p_clean)}; label more"
        )
    if bool(clean.all()) or not bool(clean.any()):
        kind = "clean" if bool(clean.all()) else "faulty"
        raise ValueError(f"clean must hold clean and faulty clips, got {kind} ones alone")
    # In 1 / T, whose logarithm has the same limits.
    low, high = math.exp(_LIMITS[0]), math.exp(_LIMITS[1])
    while high - low > 1e-6 * low:
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if _surprise(p_clean, clean, 1 / left) < _surprise(p_clean, clean, 1 / right):
            high = right
        else:
            low = left
    temperature = 2 / (low + high)
    return Calibration(
        temperature=temperature,
        num_clips=len(p_clean),
        error_before=expected_calibration_error(p_clean, clean),
        error_after=expected_calibration_error(_scale(p_clean, temperature), clean),
    )


def expected_calibration_error(p_clean: Tensor, clean: Tensor, bins: int = BINS) -> float:
    """Measure how far verdicts are from the share of clean clips among those that got them.

    error = sum over bins of  (clips in bin / N) * |mean verdict of bin - share clean in bin|

    with bins of equal width over [0, 1]; empty ones count nothing.

    Args:
        p_clean: [N] in [0, 1]; NaN is left out.
        clean: [N] whether each clip is clean.
        bins: at least 1.

    Returns:
        In [0, 1]; NaN where no clip was judged.

    Source:
        arXiv:1706.04599, equation 3, for the probability of one class instead of the top one.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    p_clean, clean = _check(p_clean, clean)
    if not len(p_clean):
        return math.nan
    place = (p_clean * bins).long().clamp(max=bins - 1)
    total = 0.0
    for index in place.unique():
        inside = place == index
        gap = (p_clean[inside].mean() - clean[inside].double().mean()).abs().item()
        total += inside.double().mean().item() * gap
    return total


def _check(p_clean: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Judged clips alone, in double precision."""
    if p_clean.ndim != 1 or p_clean.shape != clean.shape:
        raise ValueError(
            "p_clean and clean must be one number for each clip, "
            f"got shapes {tuple(p_clean.shape)} and {tuple(clean.shape)}"
        )
    judged = ~p_clean.isnan()
    p_clean, clean = p_clean[judged].double(), clean[judged].bool()
    outside = p_clean[(p_clean < 0) | (p_clean > 1)]
    if len(outside):
        raise ValueError(f"p_clean must be in [0, 1], got {outside[0].item()}")
    return p_clean, clean


def _scale(p_clean: Tensor, temperature: float) -> Tensor:
    if temperature == 1:
        return p_clean
    return torch.sigmoid(torch.logit(p_clean, eps=_EPSILON) / temperature)


def _surprise(p_clean: Tensor, clean: Tensor, temperature: float) -> float:
    """Mean negative log-likelihood of the labels, in nats."""
    logit = torch.logit(p_clean, eps=_EPSILON) / temperature
    sign = clean.double() * 2 - 1
    return torch.nn.functional.softplus(-sign * logit).mean().item()
