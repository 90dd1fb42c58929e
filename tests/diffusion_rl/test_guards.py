"""Guard statistics fall when a clip is frozen, blurred, greyed or copied; guards charge for it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as functional

from diffusion_rl.guards import (
    STATISTICS,
    GuardSettings,
    apply_guards,
    contrast,
    diversity,
    measure_reference,
    motion,
    sharpness,
)

GROUP = torch.tensor([0, 0, 1, 1])


def sample_videos(size: int = 12) -> torch.Tensor:
    return torch.rand(4, 5, 3, size, size, generator=torch.Generator().manual_seed(0))


def blurred(videos: torch.Tensor) -> torch.Tensor:
    return functional.avg_pool2d(videos.flatten(0, 1), 3, 1, 1).reshape(videos.shape)


def test_motion_is_the_mean_change():
    videos = torch.zeros(2, 3, 3, 4, 4)
    videos[0, 1] = 0.5  # two changes of 0.5 in two steps
    videos[1, 2, :, :, :2] = 1.0  # one change of 1 in half of the pixels in one of two steps
    torch.testing.assert_close(motion(videos), torch.tensor([0.5, 0.25]))
    assert motion(videos[:, :1]).eq(0).all()


def test_a_frozen_clip_does_not_move():
    videos = sample_videos()
    frozen = videos[:, :1].expand_as(videos)
    assert motion(videos).min() > 0.2
    assert motion(frozen).eq(0).all()


def test_blur_takes_sharpness_and_contrast():
    videos = sample_videos()
    assert (sharpness(blurred(videos)) < 0.5 * sharpness(videos)).all()
    assert (contrast(blurred(videos)) < 0.8 * contrast(videos)).all()


def test_sharpness_of_one_bright_pixel():
    videos = torch.zeros(1, 1, 3, 5, 5)
    videos[..., 2, 2] = 1.0  # 4 at the pixel, 1 at its four neighbours, over 9 inner pixels
    torch.testing.assert_close(sharpness(videos), torch.tensor([8 / 9]))


def test_an_even_brightness_change_leaves_sharpness_and_contrast():
    videos = sample_videos() / 2
    torch.testing.assert_close(sharpness(videos + 0.3), sharpness(videos))
    torch.testing.assert_close(contrast(videos + 0.3), contrast(videos))
    ramp = torch.arange(12.0).expand(1, 1, 3, 12, 12) / 12
    assert sharpness(ramp) < 1e-6


def test_contrast_is_the_spread_of_pixels():
    videos = torch.zeros(1, 2, 3, 4, 4)
    videos[:, 0, :, :2] = 1.0  # half black, half white: spread 0.5; second frame empty
    torch.testing.assert_close(contrast(videos), torch.tensor([0.25]))


def test_diversity_is_the_distance_to_the_others_of_the_group():
    levels = torch.tensor([0.0, 0.2, 0.6, 0.9, 0.9])
    videos = levels.reshape(5, 1, 1, 1, 1).expand(5, 2, 3, 4, 4)
    group = torch.tensor([7, 7, 7, 2, 2])
    torch.testing.assert_close(diversity(videos, group), torch.tensor([0.4, 0.3, 0.5, 0.0, 0.0]))
    assert math.isnan(diversity(videos[:1], group[:1])[0])


def test_diversity_of_large_videos_is_that_of_their_thumbnails():
    videos = torch.zeros(2, 1, 3, 128, 256)
    videos[1, ..., ::2, ::2] = 1.0  # finer than the thumbnail: a quarter of every cell
    torch.testing.assert_close(diversity(videos, torch.zeros(2).long()), torch.tensor([0.25, 0.25]))


def test_the_base_policy_itself_raises_no_alarm():
    guards = [GuardSettings(statistic=name, floor=0.9) for name in STATISTICS]
    videos = sample_videos()
    report = apply_guards(guards, measure_reference(guards, videos, GROUP), videos, GROUP)
    assert report.alarms == ()
    assert report.penalty.max() == 0
    assert set(report.levels) == set(report.running) == set(STATISTICS)


def test_a_frozen_batch_pays_the_whole_weight_and_raises_the_alarm(caplog):
    guards = [GuardSettings(statistic="motion", weight=0.7, floor=0.9)]
    videos = sample_videos()
    reference = measure_reference(guards, videos, GROUP)
    frozen = videos[:, :1].expand_as(videos)
    report = apply_guards(guards, reference, frozen, GROUP)
    torch.testing.assert_close(report.penalty, torch.full((4,), 0.7))
    assert report.alarms == ("motion",)
    assert "motion has fallen to 80% of the base policy's level" in caplog.text


def test_a_video_below_the_mean_is_not_charged_while_the_policy_holds_its_level():
    guards = [GuardSettings(statistic="motion", floor=0.9)]
    videos = torch.zeros(2, 2, 3, 4, 4)
    videos[0, 1], videos[1, 1] = 0.1, 0.9  # motions 0.1 and 0.9
    holds = apply_guards(guards, {"motion": 0.55}, videos, torch.zeros(2).long())
    assert holds.alarms == ()
    assert holds.penalty.tolist() == [0, 0]
    falls = apply_guards(guards, {"motion": 0.55}, videos, torch.zeros(2).long(), {"motion": 0.45})
    assert falls.alarms == ("motion",)
    torch.testing.assert_close(falls.penalty, torch.tensor([(0.495 - 0.1) / 0.495, 0.0]))


def test_the_alarm_comes_when_the_running_mean_falls_below_the_floor():
    guards = [GuardSettings(statistic="motion", floor=0.6)]
    still = torch.zeros(2, 2, 3, 4, 4)
    running, alarms = None, []
    for _ in range(4):
        report = apply_guards(guards, {"motion": 0.5}, still, torch.zeros(2).long(), running)
        running = report.running
        alarms.append(report.alarms)
    # 0.8, 0.64, 0.51, 0.41 of the reference level.
    assert alarms == [(), (), ("motion",), ("motion",)]
    assert running["motion"] == pytest.approx(0.5 * 0.8**4)


def test_the_shortfall_is_relative_to_the_floor():
    guards = [
        GuardSettings(statistic="motion", weight=2.0, floor=0.5),
        GuardSettings(statistic="contrast", weight=0.0),
    ]
    videos = torch.zeros(2, 2, 3, 4, 4)
    videos[0, 1], videos[1, 1] = 0.3, 0.9
    reference = {"motion": 1.0, "contrast": 0.1}
    running = {"motion": 0.3, "contrast": 0.1}
    report = apply_guards(guards, reference, videos, torch.zeros(2).long(), running)
    torch.testing.assert_close(report.penalty, torch.tensor([2 * 0.2 / 0.5, 0.0]))
    assert report.alarms == ("motion", "contrast")
    assert report.running == {"motion": pytest.approx(0.36), "contrast": pytest.approx(0.08)}
    assert report.levels["motion"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": "moton"}, "statistic must be one of .*, got 'moton'; did you mean 'motion'"),
        ({"statistic": "xyz"}, "statistic must be one of .*, got 'xyz'$"),
        ({"statistic": "motion", "weight": -1.0}, "weight must be a finite number >= 0, got -1.0"),
        ({"statistic": "motion", "floor": 0.0}, r"floor must be in \(0, 1\], got 0.0"),
        ({"statistic": "motion", "floor": 1.1}, r"floor must be in \(0, 1\], got 1.1"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GuardSettings(**options)


def test_bad_input_is_refused():
    motion_guard = GuardSettings(statistic="motion")
    videos = sample_videos()
    with pytest.raises(ValueError, match="guards must watch different statistics"):
        measure_reference([motion_guard, motion_guard], videos, GROUP)
    with pytest.raises(ValueError, match="reference level of motion must be above 0, got 0.0"):
        measure_reference([motion_guard], videos[:, :1], GROUP)
    with pytest.raises(ValueError, match="reference must hold a level of motion"):
        apply_guards([motion_guard], {"contrast": 1.0}, videos, GROUP)
    with pytest.raises(ValueError, match="at least 2 videos per prompt; it is NaN for 1 of 4"):
        measure_reference(
            [GuardSettings(statistic="diversity")], videos, torch.tensor([0, 0, 0, 1])
        )
    with pytest.raises(ValueError, match="at least 3 pixels high and wide, got 2x12"):
        sharpness(videos[..., :2, :])
    with pytest.raises(ValueError, match="videos has shape .* need 5 axes, not 4"):
        motion(videos[0])
