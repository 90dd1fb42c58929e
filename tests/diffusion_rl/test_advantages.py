"""Advantages by their properties and by numbers derived by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusion_rl.advantages import group_advantages, missing_share, tied_share

NAN = float("nan")
PAIR = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def random_scores(seed: int = 0, groups: int = 5, size: int = 8):
    source = torch.Generator().manual_seed(seed)
    scores = torch.randn(groups * size, generator=source)
    group = torch.arange(groups).repeat_interleave(size)
    shuffle = torch.randperm(groups * size, generator=source)
    return scores[shuffle], group[shuffle]


def test_each_group_has_mean_zero_and_spread_one():
    scores, group = random_scores()
    advantages = group_advantages(scores, group)
    for index in range(5):
        own = advantages[group == index]
        torch.testing.assert_close(own.mean(), torch.tensor(0.0))
        torch.testing.assert_close(own.std(correction=0), torch.tensor(1.0))


@pytest.mark.parametrize("std", ["group", "batch"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_shift_and_scale_of_the_reward_change_nothing(std, unbiased):
    scores, group = random_scores()
    options = {"std": std, "unbiased": unbiased}
    expected = group_advantages(scores, group, **options)
    torch.testing.assert_close(group_advantages(scores * 7 - 3, group, **options), expected)
    torch.testing.assert_close(group_advantages(-scores, group, **options), -expected)


def test_group_spread_by_hand():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 2.0, 2.0, 2.5, 9.0])
    # Spread of 1..4 is sqrt(1.25).
    biased = group_advantages(scores, PAIR)
    torch.testing.assert_close(biased[:4], torch.tensor([-1.5, -0.5, 0.5, 1.5]) / 1.25**0.5)
    unbiased = group_advantages(scores, PAIR, unbiased=True)
    torch.testing.assert_close(unbiased[:4], torch.tensor([-1.5, -0.5, 0.5, 1.5]) / (5 / 3) ** 0.5)


def test_batch_spread_by_hand():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 2.0, 2.0, 2.5, 9.0])
    # Squares about the mean 3.1875 sum to 43.96875.
    spread = (43.96875 / 8) ** 0.5
    expected = torch.tensor([-1.5, -0.5, 0.5, 1.5, -1.875, -1.875, -1.375, 5.125]) / spread
    torch.testing.assert_close(group_advantages(scores, PAIR, std="batch"), expected)


# A busy machine is no fault of the code.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    value=st.floats(-1e6, 1e6, width=32),
    size=st.integers(1, 24),
    std=st.sampled_from(["group", "batch"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_ties_are_exactly_zero(value, size, std, dtype):
    scores = torch.cat([torch.full((size,), value), torch.tensor([0.0, 1.0])]).to(dtype)
    group = torch.tensor([0] * size + [1, 1])
    advantages = group_advantages(scores, group, std=std)
    assert torch.equal(advantages[:size], torch.zeros(size))
    assert advantages[size:].abs().min() > 0


def test_ties_are_exactly_zero_where_their_mean_is_rounded():
    scores = torch.full((3,), 0.1, dtype=torch.float64)
    assert scores.mean() != scores[0]
    assert torch.equal(group_advantages(scores, torch.zeros(3).long()), torch.zeros(3))


def test_unjudged_videos_change_nothing_for_the_others():
    scores, group = random_scores()
    scores[::7] = NAN
    judged = ~scores.isnan()
    for std in ("group", "batch"):
        advantages = group_advantages(scores, group, std=std)
        alone = group_advantages(scores[judged], group[judged], std=std)
        assert torch.equal(advantages[judged], alone)
        assert torch.equal(advantages[~judged], torch.zeros(int((~judged).sum())))


def test_a_video_alone_in_its_group_or_an_unjudged_group_teaches_nothing():
    scores = torch.tensor([3.0, NAN, NAN, NAN, 1.0, 2.0])
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    for std in ("group", "batch"):
        advantages = group_advantages(scores, group, std=std, unbiased=True)
        assert torch.equal(advantages[:4], torch.zeros(4))
        assert advantages[4] < 0 < advantages[5]


def test_all_unjudged_gives_zero():
    scores = torch.full((4,), NAN)
    assert torch.equal(group_advantages(scores, torch.zeros(4).long()), torch.zeros(4))


def test_rounding_noise_is_not_blown_up():
    scores = torch.tensor([0.5, 0.5 + 1e-7])
    group = torch.tensor([0, 0])
    assert group_advantages(scores, group).abs().max() < 1e-2
    assert group_advantages(scores, group, min_std=1e-12).abs().max() > 0.9


def test_advantages_are_clipped_on_both_sides():
    scores = torch.cat([torch.zeros(99), torch.tensor([1.0])])
    group = torch.zeros(100).long()
    assert group_advantages(scores, group).max() == 5.0
    assert group_advantages(-scores, group, clip=2.0).min() == -2.0
    assert group_advantages(scores, group, clip=50.0).max() > 9.0


def test_no_gradient_and_float32():
    scores = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    advantages = group_advantages(scores, torch.tensor([4, 4]))
    assert not advantages.requires_grad
    assert advantages.dtype == torch.float32


def test_shares_are_counted():
    scores = torch.tensor([1.0, 1.0, NAN, 2.0, NAN, NAN, 3.0, 4.0])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert tied_share(scores, group) == 0.75
    assert missing_share(scores) == 3 / 8


@pytest.mark.parametrize(
    ("scores", "group", "options", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(2), {}, "scores has shape .* need 1 axes, not 2"),
        (torch.zeros(3), torch.zeros(2).long(), {}, "group has shape .* need B=3, not 2"),
        (torch.zeros(3), torch.zeros(3), {}, "group must hold integers, got torch.float32"),
        (torch.zeros(0), torch.zeros(0).long(), {}, "scores must hold at least one video"),
        (torch.tensor([1.0, torch.inf]), torch.zeros(2).long(), {}, "scores must be finite"),
        (torch.zeros(2), torch.zeros(2).long(), {"std": "all"}, "std must be 'group', 'batch' or"),
        (torch.zeros(2), torch.zeros(2).long(), {"clip": 0.0}, "clip must be above 0, got 0.0"),
        (torch.zeros(2), torch.zeros(2).long(), {"min_std": 0.0}, "min_std must be above 0"),
    ],
)
def test_bad_input_is_refused(scores, group, options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(scores, group, **options)
