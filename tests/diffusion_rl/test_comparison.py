"""Paired statistics against scipy, closed forms and their own coverage."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from diffusion_rl import comparison
from diffusion_rl.comparison import compare, compare_all, mcnemar, relative_reduction

NAN = float("nan")


def rates(count: int, base_rate: float, keep: float, seed: int = 0):
    """Faults of a base generator, and of a tuned one that keeps each with a probability."""
    source = torch.Generator().manual_seed(seed)
    base = (torch.rand(count, generator=source) < base_rate).float()
    return base, base * (torch.rand(count, generator=source) < keep)


def test_the_reduction_is_one_minus_the_ratio_of_rates():
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    tuned = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    assert relative_reduction(base, tuned).value == 0.75
    worse = relative_reduction(tuned, base)
    assert worse.value == -3.0
    assert worse.low == -math.inf  # some samples hold no base fault at all


def test_an_unchanged_rate_has_an_interval_of_no_width():
    base, _ = rates(200, 0.5, 0.5)
    estimate = relative_reduction(base, base)
    assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)
    assert not estimate.excludes_zero


def test_the_interval_is_scipys_paired_bootstrap():
    base, tuned = rates(256, 0.55, 0.4)
    ours = relative_reduction(base, tuned, samples=20_000)

    def reduction(before, after, axis):
        return 1 - after.mean(axis=axis) / before.mean(axis=axis)

    theirs = stats.bootstrap(
        (base.numpy(), tuned.numpy()),
        reduction,
        paired=True,
        method="percentile",
        n_resamples=20_000,
        random_state=0,
    ).confidence_interval
    # Two independent Monte Carlo estimates: their ends differ by about 0.002.
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)
    assert ours.low < ours.value < ours.high


def test_the_interval_of_a_mean_difference_is_near_the_t_interval():
    source = torch.Generator().manual_seed(4)
    base = torch.randn(400, generator=source)
    tuned = base + 0.3 + 0.5 * torch.randn(400, generator=source)
    ours = compare(base, tuned).difference
    theirs = stats.ttest_rel(tuned.double(), base.double()).confidence_interval(0.95)
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)
    assert ours.excludes_zero


def test_intervals_cover_the_truth_as_often_as_they_say():
    """500 experiments with a true reduction of 0.6: 95% +- 3 standard errors."""
    covered = 0
    for seed in range(500):
        estimate = relative_reduction(*rates(200, 0.5, 0.4, seed), samples=400, seed=seed)
        covered += estimate.low <= 0.6 <= estimate.high
    assert 0.92 < covered / 500 < 0.98


def test_drawing_whole_prompts_widens_the_interval_when_seeds_are_alike():
    base, tuned = rates(64, 0.5, 0.4)
    base, tuned = base.repeat_interleave(4), tuned.repeat_interleave(4)
    group = torch.arange(64).repeat_interleave(4)
    single = relative_reduction(base, tuned)
    grouped = relative_reduction(base, tuned, group=group)
    assert grouped.value == single.value
    assert grouped.high - grouped.low > 1.6 * (single.high - single.low)  # expected: factor 2
    one_each = relative_reduction(base[::4], tuned[::4])
    assert grouped == one_each


def test_groups_of_different_size_weigh_by_their_videos():
    base = torch.tensor([1.0, 1.0, 1.0, 0.0])
    tuned = torch.tensor([0.0, 0.0, 1.0, 0.0])
    result = compare(base, tuned, group=torch.tensor([5, 5, 5, 9]))
    assert result.base == 0.75
    # Drawn: prompt 5 twice (1, 1/3), both (3/4, 1/4) or prompt 9 twice (0, 0).
    assert result.difference.low == pytest.approx(-2 / 3)
    assert result.difference.high == 0.0


def test_the_bootstrap_is_seeded_and_independent_of_its_chunks(monkeypatch):
    base, tuned = torch.rand(2, 100, generator=torch.Generator().manual_seed(0))
    once = relative_reduction(base, tuned, seed=3)
    assert once == relative_reduction(base, tuned, seed=3)
    assert once != relative_reduction(base, tuned, seed=4)
    monkeypatch.setattr(comparison, "_MAX_DRAWS", 1000)
    assert relative_reduction(base, tuned, seed=3) == once


def test_pairs_without_both_values_are_left_out_and_counted():
    base = torch.tensor([1.0, NAN, 1.0, 0.0, 1.0])
    tuned = torch.tensor([0.0, 1.0, NAN, 0.0, 1.0])
    result = compare(base, tuned)
    assert (result.pairs, result.missing) == (3, 2)
    assert (result.base, result.tuned) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert result.ratio is not None
    assert result.ratio.value == pytest.approx(0.5)
    assert relative_reduction(base, tuned).value == pytest.approx(0.5)


def test_there_is_no_ratio_to_something_that_can_be_negative():
    assert compare(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 2.0])).ratio is None
    assert compare(torch.zeros(2), torch.tensor([1.0, 2.0])).ratio is None


@pytest.mark.parametrize(("only_base", "only_tuned"), [(9, 2), (2, 9), (5, 5), (0, 7), (0, 0)])
def test_mcnemar_is_scipys_binomial_test(only_base, only_tuned):
    base = torch.tensor([1.0] * only_base + [0.0] * only_tuned + [1.0, 0.0])
    tuned = torch.tensor([0.0] * only_base + [1.0] * only_tuned + [1.0, 0.0])
    result = mcnemar(base, tuned)
    assert (result.only_base, result.only_tuned) == (only_base, only_tuned)
    count = only_base + only_tuned
    expected = stats.binomtest(only_base, count, 0.5).pvalue if count else 1.0
    assert result.p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemar_survives_thousands_of_pairs():
    base, tuned = rates(5000, 0.9, 0.1)
    assert 0 <= mcnemar(base, tuned).p_value < 1e-300


def test_all_measures_are_compared_by_name():
    base = {"motion": torch.tensor([1.0, 2.0]), "match": torch.tensor([1.0, 0.0])}
    tuned = {"match": torch.tensor([1.0, 1.0]), "motion": torch.tensor([1.0, 1.0])}
    result = compare_all(base, tuned)
    assert result["motion"].difference.value == -0.5
    assert result["match"] == compare(base["match"], tuned["match"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: compare(torch.zeros(2, 2), torch.zeros(2)), "base has shape .* need 1 axes"),
        (lambda: compare(torch.zeros(3), torch.zeros(2)), "tuned has shape .* need N=3, not 2"),
        (
            lambda: compare(torch.zeros(3), torch.zeros(3), group=torch.zeros(2)),
            "group has shape .* need N=3, not 2",
        ),
        (lambda: compare(torch.tensor([torch.inf]), torch.zeros(1)), "must be finite, or NaN"),
        (
            lambda: compare(torch.tensor([NAN, 1.0]), torch.tensor([1.0, NAN])),
            "must share a pair with both values, got none of 2",
        ),
        (lambda: compare(torch.ones(2), torch.ones(2), samples=0), "samples must be at least 1"),
        (
            lambda: relative_reduction(torch.zeros(2), torch.ones(2)),
            "base must have a mean above 0, got 0; there is nothing to reduce",
        ),
        (
            lambda: relative_reduction(torch.tensor([1.0, -1.0]), torch.ones(2)),
            "base and tuned must be at least 0 for a relative reduction",
        ),
        (lambda: mcnemar(torch.tensor([0.5]), torch.ones(1)), "base must be 0 or 1, got 0.5"),
        (lambda: mcnemar(torch.ones(1), torch.tensor([2.0])), "tuned must be 0 or 1, got 2.0"),
        (
            lambda: compare_all({"a": torch.ones(1)}, {"b": torch.ones(1)}),
            r"tuned must have the measures of base \['a'\], got \['b'\]",
        ),
    ],
)
def test_bad_input_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        function()
