"""Bootstrap intervals: known spread, groups, seeds, and values without a base."""

import math

import pytest
import torch
from torch import Tensor

from cac_reward.evaluation.intervals import bootstrap

VALUES = torch.randn(200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def mean(weights: Tensor) -> dict[str, float]:
    return {"mean": ((weights * VALUES).sum() / weights.sum()).item()}


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    names = [str(row) for row in range(200)]
    found = bootstrap(mean, names, draws=2000)["mean"]
    half = 1.96 * VALUES.std(correction=0).item() / math.sqrt(200)
    assert found.value == pytest.approx(VALUES.mean().item())
    # The ends of 2,000 draws are known to a few percent.
    assert 0.9 < (found.high - found.low) / (2 * half) < 1.1
    assert found.low < found.value < found.high


def test_seeds_repeat_the_draws() -> None:
    names = [str(row) for row in range(200)]
    first, again = (bootstrap(mean, names, draws=50, seed=1) for _ in range(2))
    assert first == again
    assert first != bootstrap(mean, names, draws=50, seed=2)


def test_clips_of_one_recording_are_drawn_together() -> None:
    seen: list[Tensor] = []

    def watch(weights: Tensor) -> dict[str, float]:
        seen.append(weights)
        return {"sum": weights.sum().item()}

    bootstrap(watch, ["a", "b", "a", "b", "c", "a"], draws=30)
    for weights in seen:
        assert weights[0] == weights[2] == weights[5]
        assert weights[1] == weights[3]
        assert weights[0] + weights[1] + weights[4] == 3
    assert len({tuple(weights.tolist()) for weights in seen}) > 3


def test_a_value_that_most_draws_lack_has_no_interval() -> None:
    def rare(weights: Tensor) -> dict[str, float]:
        return {"rare": 1.0 if (weights == 1).all() else math.nan, "never": math.nan}

    found = bootstrap(rare, ["a", "b", "c", "d", "e", "f"], draws=40)
    assert found["rare"].value == 1
    assert math.isnan(found["rare"].low)
    assert math.isnan(found["never"].value)
    none = bootstrap(mean, [str(row) for row in range(200)], draws=0)["mean"]
    assert math.isnan(none.low)
    assert math.isnan(none.high)


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ([], {}, "at least one clip"),
        (["a"], {"draws": -1}, "draws must be at least 0"),
        (["a"], {"level": 1.0}, r"level must be in \(0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(groups, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap(lambda weights: {"sum": weights.sum().item()}, groups, **options)
