"""Advantages by their properties and by numbers derived by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusion_rl.advantages import (
    best_advantages,
    group_advantages,
    history_advantages,
    missing_share,
    separate_advantages,
    tied_share,
)

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


@pytest.mark.parametrize("std", ["group", "batch", "largest"])
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
    std=st.sampled_from(["group", "batch", "largest"]),
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
    for std in ("group", "batch", "largest"):
        advantages = group_advantages(scores, group, std=std)
        alone = group_advantages(scores[judged], group[judged], std=std)
        assert torch.equal(advantages[judged], alone)
        assert torch.equal(advantages[~judged], torch.zeros(int((~judged).sum())))


def test_a_video_alone_in_its_group_or_an_unjudged_group_teaches_nothing():
    scores = torch.tensor([3.0, NAN, NAN, NAN, 1.0, 2.0])
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    for std in ("group", "batch", "largest"):
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


def test_the_largest_spread_of_any_group_by_hand():
    """That of 2, 2, 2.5, 9 is sqrt(8.796875), and larger than that of 1..4."""
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 2.0, 2.0, 2.5, 9.0])
    expected = torch.tensor([-1.5, -0.5, 0.5, 1.5, -1.875, -1.875, -1.375, 5.125])
    found = group_advantages(scores, PAIR, std="largest")
    torch.testing.assert_close(found, expected / 8.796875**0.5)


def brute_history(scores, prompts, history, capacity, min_count):
    """One video after another, in plain Python."""
    after = {key: list(past) for key, past in history.items()}
    judged = [score for score in scores if score == score]
    for score, prompt in zip(scores, prompts, strict=True):
        if score == score:
            after.setdefault(prompt, []).append(score)
            after[prompt] = after[prompt][-capacity:]
    advantages = []
    for score, prompt in zip(scores, prompts, strict=True):
        if score != score:
            advantages.append(0.0)
            continue
        pool = after[prompt] if len(after[prompt]) >= min_count else judged
        mean = sum(pool) / len(pool)
        spread = (sum((one - mean) ** 2 for one in pool) / len(pool)) ** 0.5
        advantages.append(min(max((score - mean) / max(spread, 1e-4), -5.0), 5.0))
    return advantages, after


def test_the_history_is_that_of_a_direct_implementation():
    source = torch.Generator().manual_seed(0)
    history, expected_history = {}, {}
    used_history = False
    for _ in range(6):
        scores = torch.randn(9, generator=source, dtype=torch.float64)
        scores[torch.rand(9, generator=source) < 0.2] = NAN
        prompts = torch.randint(4, (9,), generator=source)
        found, history = history_advantages(scores, prompts, history, capacity=7, min_count=4)
        expected, expected_history = brute_history(
            scores.tolist(), prompts.tolist(), expected_history, 7, 4
        )
        torch.testing.assert_close(found, torch.tensor(expected))
        assert history == expected_history
        used_history |= any(len(past) == 7 for past in history.values())
    assert used_history


def test_a_history_of_ties_is_exactly_zero_and_an_old_one_is_not_changed():
    before = {3: [0.1, 0.1]}
    scores, prompt = torch.full((3,), 0.1, dtype=torch.float64), torch.full((3,), 3)
    found, after = history_advantages(scores, prompt, before, min_count=2)
    assert torch.equal(found, torch.zeros(3))
    assert before == {3: [0.1, 0.1]}
    assert after == {3: [0.1] * 5}
    # Ties within the group differ from what the prompt scored before.
    found, _ = history_advantages(scores + 1, prompt, before, min_count=2)
    assert found.min() > 0


def test_without_enough_history_the_batch_is_the_measure():
    scores, prompt = torch.tensor([1.0, 2.0, 4.0, NAN]), torch.tensor([0, 0, 1, 1])
    found, after = history_advantages(scores, prompt, {})
    expected = (scores[:3] - 7 / 3) / (14 / 9) ** 0.5
    torch.testing.assert_close(found, torch.cat([expected, torch.zeros(1)]))
    assert after == {0: [1.0, 2.0], 1: [4.0]}
    assert history_advantages(torch.full((2,), NAN), torch.zeros(2).long(), {})[1] == {}


def test_separate_rewards_have_the_same_say_whatever_their_scale():
    source = torch.Generator().manual_seed(0)
    scores, group = torch.randn(2, 40, generator=source), torch.arange(5).repeat_interleave(8)
    weights = [1.0, 0.5]
    found = separate_advantages(scores, weights, group)
    scaled = scores * torch.tensor([[100.0], [0.01]]) + 3
    torch.testing.assert_close(separate_advantages(scaled, weights, group), found)
    summed = (torch.tensor(weights)[:, None] * scores).sum(0)
    scaled_sum = (torch.tensor(weights)[:, None] * scaled).sum(0)
    assert not torch.allclose(
        group_advantages(scaled_sum, group), group_advantages(summed, group), atol=1e-2
    )


def test_separate_rewards_by_hand():
    """Each pair gives -1 and 1; the second reward speaks against the first with half the weight."""
    scores = torch.tensor([[0.0, 1.0, 5.0, 5.0], [9.0, 2.0, 1.0, 2.0]])
    group = torch.tensor([0, 0, 1, 1])
    summed = torch.tensor([-0.5, 0.5, -0.5, 0.5])
    found = separate_advantages(scores, [1.0, 0.5], group)
    torch.testing.assert_close(found, summed / 0.5)
    clipped = separate_advantages(scores, [1.0, 0.5], group, clip=0.3)
    torch.testing.assert_close(clipped, 0.3 * summed.sign())


def test_separate_rewards_tie_to_exactly_zero_and_skip_what_one_could_not_judge():
    scores = torch.tensor([[0.1, 0.1, 0.1, 1.0, 2.0, 7.0], [0.3, 0.3, 0.3, 1.0, 3.0, NAN]])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    found = separate_advantages(scores, [1.0, 1.0], group)
    assert torch.equal(found[:3], torch.zeros(3))
    assert found[5] == 0
    alone = separate_advantages(scores[:, :5], [1.0, 1.0], group[:5])
    assert torch.equal(found[:5], alone)
    assert alone[4] > 0 > alone[3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, g: history_advantages(s, g, {}, min_count=1), "min_count must be at least 2"),
        (
            lambda s, g: history_advantages(s, g, {}, capacity=3, min_count=4),
            "capacity must be at least min_count=4, got 3",
        ),
        (lambda s, g: history_advantages(s, g, {}, clip=0.0), "clip must be above 0, got 0.0"),
        (
            lambda s, g: separate_advantages(s[None], [1.0, 2.0], g),
            r"weights must be 1 factors, not all 0, got \[1.0, 2.0\]",
        ),
        (lambda s, g: separate_advantages(s[None], [0.0], g), "weights must be 1 factors, not all"),
        (lambda s, g: separate_advantages(s, [1.0], g), "scores has shape .* need 2 axes, not 1"),
        (
            lambda s, g: separate_advantages(s[None], [1.0], g, min_std=0.0),
            "min_std must be above 0, got 0.0",
        ),
    ],
)
def test_bad_input_of_the_other_comparisons_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]))


def brute_best(scores, group, keep):
    """Kept videos by sorting places: better than the worst, fewer than `keep` strictly better."""
    found = []
    for own, index in zip(scores, group, strict=True):
        rivals = [s for s, i in zip(scores, group, strict=True) if i == index and s == s]
        kept = [s for s in rivals if sum(other > s for other in rivals) < keep and s > min(rivals)]
        found.append(len(rivals) / len(kept) if own in kept else 0.0)
    return found


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_the_best_of_each_group_are_kept_and_weigh_alike(keep):
    source = torch.Generator().manual_seed(keep)
    for _ in range(20):
        scores = torch.randint(0, 5, (18,), generator=source).float()
        scores[torch.rand(18, generator=source) < 0.2] = NAN
        group = torch.randint(0, 4, (18,), generator=source)
        found = best_advantages(scores, group, keep=keep)
        expected = brute_best(scores.tolist(), group.tolist(), keep)
        torch.testing.assert_close(found, torch.tensor(expected))
        for index in group.unique():
            members = (group == index) & ~scores.isnan()
            if found[members].any():
                torch.testing.assert_close(found[members].mean(), torch.tensor(1.0))


def test_keeping_the_best_needs_at_least_one():
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        best_advantages(torch.zeros(2), torch.zeros(2).long(), keep=0)
