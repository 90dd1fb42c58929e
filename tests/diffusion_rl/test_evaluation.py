"""Measuring two generators on the same prompts and seeds, and auditing the judge."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion_rl.evaluation import (
    audit_judge,
    audit_table,
    blurred_copy,
    broken,
    compare_all,
    darkened_copy,
    frozen_copy,
    gather,
    measure_generator,
    prompt_groups,
    statistic_measures,
    summarise,
)
from diffusion_rl.guards import diversity, motion, sharpness
from diffusion_rl.page import markdown_table
from diffusion_rl.rewards import Calls, Reward

NAN = float("nan")
PROMPTS = ["a", "a", "b", "b", "b", "c", "c"]
SEEDS = [1, 2, 3, 4, 5, 6, 7]


def sample(prompts, seeds, *, dim: float = 1.0):
    videos = [
        torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    return torch.stack(videos) * dim


def brightness(videos, prompts, *, fps):
    return {
        "score": videos.flatten(1).mean(1),
        "reports": [f"{prompt} at {fps}" for prompt in prompts],
    }


def measured(dim: float = 1.0, batch_size: int = 4):
    measures = {"brightness": brightness, **statistic_measures("motion", "diversity")}
    return list(
        measure_generator(
            lambda prompts, seeds: sample(prompts, seeds, dim=dim),
            measures,
            PROMPTS,
            SEEDS,
            fps=8.0,
            batch_size=batch_size,
        )
    )


def test_a_reward_is_asked_its_own_way():
    """Batches, repeats and the share that may be missing are those of the run."""
    asked = []

    def busy(videos, prompts, *, fps):
        asked.append(len(videos))
        if len(asked) == 2:
            raise OSError("busy")
        score = videos.flatten(1).mean(1)
        score[0] = NAN
        return score

    calls = Calls(retries=1, retry_seconds=0.0, videos_per_call=1)
    reward = Reward("busy", busy, calls=calls)
    with pytest.raises(RuntimeError, match="'own' returned NaN for 2 of 2 videos"):
        list(measure_generator(sample, {"own": reward}, ["a", "a"], [1, 2], fps=8.0))
    assert asked == [1, 1, 1]
    ways = {"fps": 8.0, "missing_limit": 0.99}
    reward = Reward("busy", busy, calls=Calls(videos_per_call=2))
    (found,) = measure_generator(sample, {"own": reward}, ["a"] * 3, [1, 2, 3], **ways)
    assert asked[3:] == [2, 1]
    assert found.values["own"].isnan().tolist() == [True, False, True]


def test_measures_that_miss_different_videos_do_not_stop_one_another():
    def missing(*places):
        def judge(videos, prompts, *, fps):
            score = videos.flatten(1).mean(1)
            score[list(places)] = NAN
            return score

        return judge

    measures = {"even": missing(0, 2), "odd": missing(1, 3)}
    draw = (["a"] * 4, [1, 2, 3, 4])
    (found,) = measure_generator(sample, measures, *draw, fps=8.0, missing_limit=0.5)
    assert found.values["even"].isnan().tolist() == [True, False, True, False]
    assert found.values["odd"].isnan().tolist() == [False, True, False, True]
    with pytest.raises(RuntimeError, match="'odd' returned NaN for 3 of 4 videos"):
        list(measure_generator(sample, {"odd": missing(1, 2, 3)}, *draw, fps=8.0))


def test_the_audit_asks_about_as_many_at_once_as_it_is_told():
    asked = []

    def judge(videos, prompts, *, fps):
        asked.append((len(videos), tuple(prompts)))
        return videos.flatten(1).mean(1)

    videos = sample(PROMPTS, SEEDS)
    whole = audit_judge(judge, videos, PROMPTS, fps=8.0)
    assert [count for count, _ in asked] == [7] * 4
    asked.clear()
    parts = audit_judge(judge, videos, PROMPTS, fps=8.0, batch_size=3)
    assert parts == whole
    assert asked[:3] == [(3, ("a", "a", "b")), (3, ("b", "b", "c")), (1, ("c",))]
    assert len(asked) == 4 * 3
    whole_numbers = audit_judge(judge, (videos * 255).round().to(torch.uint8), PROMPTS, fps=8.0)
    for one, other in zip(whole_numbers, whole, strict=True):
        assert one.mean_score == pytest.approx(other.mean_score, abs=0.003)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        audit_judge(judge, videos, PROMPTS, fps=8.0, batch_size=0)


def test_batches_join_to_what_one_call_measures():
    whole = gather(measured())
    videos = sample(PROMPTS, SEEDS)
    assert whole.prompts == tuple(PROMPTS)
    assert whole.seeds == tuple(SEEDS)
    torch.testing.assert_close(whole.values["brightness"], videos.flatten(1).mean(1))
    torch.testing.assert_close(whole.values["motion"], motion(videos))
    torch.testing.assert_close(
        whole.values["diversity"], diversity(videos, torch.tensor([0, 0, 1, 1, 1, 2, 2]))
    )
    assert whole.reports == {"brightness": [f"{prompt} at 8.0" for prompt in PROMPTS]}
    assert torch.equal(whole.videos, (videos * 255).round().byte())


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(1, [2, 3, 2]), (4, [2, 3, 2]), (5, [5, 2]), (99, [7])]
)
def test_the_videos_of_a_prompt_share_a_batch(batch_size, sizes):
    assert [len(part.prompts) for part in measured(batch_size=batch_size)] == sizes


def test_videos_may_be_dropped_on_the_way():
    assert len(gather(measured(), keep_videos=False).videos) == 0


def test_the_summary_holds_means_over_what_was_measured():
    whole = gather(measured())
    summary = summarise(whole)
    assert summary["videos"] == 7
    assert summary["motion"] == pytest.approx(motion(sample(PROMPTS, SEEDS)).mean().item())
    whole.values["motion"][0] = NAN
    assert summarise(whole)["motion"] == pytest.approx(
        motion(sample(PROMPTS, SEEDS))[1:].mean().item()
    )


def test_two_generators_are_compared_pair_by_pair():
    base, tuned = gather(measured()), gather(measured(dim=0.5))
    result = compare_all(base.values, tuned.values, prompt_groups(base.prompts))
    assert result["motion"].ratio.value == pytest.approx(0.5)
    assert result["motion"].ratio.high < 0.51
    assert result["brightness"].difference.excludes_zero


def test_prompts_are_numbered_by_text():
    assert prompt_groups(["x", "y", "x", "z"]).tolist() == [0, 1, 0, 2]


def test_scores_become_faults():
    faults = broken(torch.tensor([0.2, 0.5, 0.9, NAN]))
    assert faults[:3].tolist() == [1.0, 0.0, 0.0]
    assert faults[3].isnan()
    assert broken(torch.tensor([0.7]), threshold=0.8).item() == 1.0


def test_copies_are_spoilt_as_they_say():
    videos = sample(PROMPTS, SEEDS)
    frozen, blurred = frozen_copy(videos), blurred_copy(videos)
    assert motion(frozen).eq(0).all()
    assert torch.equal(frozen[:, 0], videos[:, 0])
    assert (sharpness(blurred) < 0.7 * sharpness(videos)).all()
    torch.testing.assert_close(darkened_copy(videos), videos / 10)
    even = torch.full((1, 2, 3, 8, 12), 0.3)
    torch.testing.assert_close(blurred_copy(even), even)


def test_the_audit_tells_what_a_blind_judge_lets_pass():
    """A judge of stillness prefers every frozen copy to its original."""
    videos = sample(PROMPTS, SEEDS)
    rows = audit_judge(
        lambda videos, prompts, *, fps: 1 - 2 * motion(videos), videos, PROMPTS, fps=8.0
    )
    original, frozen, blurred, darkened = rows
    assert [row.copy for row in rows] == ["original", "frozen", "blurred", "darkened"]
    assert original.preferred == 0.0
    assert (frozen.mean_score, frozen.passed, frozen.preferred) == (1.0, 1.0, 1.0)
    assert original.mean_score < blurred.mean_score < 1.0
    # A tenth of the light is a tenth of the motion.
    moved = 1 - original.mean_score
    assert darkened.mean_score == pytest.approx(1 - moved / 10, abs=1e-5)
    assert audit_table(rows).rows[1] == ["frozen", 1.0, "100.0%", "100.0%", "0.0%"]


def test_the_audit_leaves_unjudged_videos_out():
    def judge(videos, prompts, *, fps):
        score = torch.tensor([NAN, 0.2, 0.8, 0.9, 0.1, 0.6, 0.7])
        still = motion(videos).eq(0).all()
        return torch.where(torch.arange(7) == 1, NAN, score + 0.05) if still else score

    original, frozen, *_ = audit_judge(judge, sample(PROMPTS, SEEDS), PROMPTS, fps=8.0)
    assert original.passed == pytest.approx(4 / 6)
    assert (original.unjudged, frozen.unjudged) == pytest.approx((1 / 7, 2 / 7))
    assert frozen.preferred == 1.0
    assert not math.isnan(frozen.mean_score)


def test_a_judge_that_sees_nothing_in_the_dark_is_audited_all_the_same():
    def judge(videos, prompts, *, fps):
        score = videos.flatten(1).mean(1)
        return torch.where(score < 0.1, NAN, score)

    rows = audit_judge(judge, sample(PROMPTS, SEEDS), PROMPTS, fps=8.0, batch_size=3)
    darkened = rows[-1]
    assert [row.unjudged for row in rows] == [0.0, 0.0, 0.0, 1.0]
    assert all(math.isnan(one) for one in (darkened.mean_score, darkened.passed))
    assert math.isnan(darkened.preferred)
    text = markdown_table(audit_table(rows))
    assert "| darkened | - | - | - | 100.0% |" in text
    assert "| copy of each clip | mean score | passed as clean |" in text


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda: list(measure_generator(sample, {"b": brightness}, ["a"], [], fps=8.0)),
            "seeds must be one for each of at least one prompt, got 0 for 1 prompts",
        ),
        (
            lambda: list(measure_generator(sample, {"b": brightness}, [], [], fps=8.0)),
            "seeds must be one for each of at least one prompt, got 0 for 0 prompts",
        ),
        (
            lambda: list(
                measure_generator(sample, {"b": brightness}, ["a"], [1], fps=8.0, batch_size=0)
            ),
            "batch_size must be at least 1, got 0",
        ),
        (lambda: gather([]), "batches must be at least one, got none"),
        (lambda: statistic_measures("motio"), "names must be among motion, .*, got 'motio'"),
        (lambda: frozen_copy(torch.zeros(2, 3)), "videos has shape .* need 5 axes, not 2"),
    ],
)
def test_bad_input_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        function()
