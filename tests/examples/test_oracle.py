"""The oracle: finds what was planted, holds its peace on clean clips, is not fooled by hacks."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from examples.toy_world import blobs, oracle, tracks
from examples.toy_world.oracle import (
    anomaly_rate,
    diversity,
    error_rates,
    judge_clip,
    judge_clips,
    judge_videos,
    mean_motion,
    prompt_match,
    read_prompt,
)
from examples.toy_world.world import (
    FAULTS,
    WorldSettings,
    render_clip,
    sample_prompts,
    write_prompt,
)

SEED = 1_500_000_000
CLEAN = [render_clip(SEED + i, fault="none") for i in range(60)]
FRAMES = np.stack([clip.frames for clip in CLEAN]).astype(np.float32)
PROMPTS = [clip.prompt for clip in CLEAN]


def generated_texture(clips: np.ndarray, seed: int = 0) -> np.ndarray:
    """Soft edges and small colour deviations, as a generator's decoder leaves them."""
    random = np.random.default_rng(seed)
    soft = ndimage.gaussian_filter(clips.astype(np.float32), (0, 0, 0.6, 0.6, 0))
    return np.clip(soft + random.normal(0, 4, soft.shape), 0, 255).astype(np.uint8)


def overlap(one, other):
    """IoU by counting cells of a hundredth of a frame."""
    cells = [set(range(round(800 * start), round(800 * end))) for start, end in (one, other)]
    return len(cells[0] & cells[1]) / len(cells[0] | cells[1])


@pytest.mark.parametrize("texture", [lambda clips: clips.astype(np.uint8), generated_texture])
def test_clean_clips_pass_and_follow_their_prompts(texture):
    reports = judge_clips(texture(FRAMES), 8.0, PROMPTS)
    assert [r for r in reports if r.broken] == []
    assert prompt_match(reports) == 1
    assert 0.04 < mean_motion(reports) < 0.08


@pytest.mark.parametrize("kind", FAULTS)
def test_planted_faults_are_found_where_they_are(kind):
    clips = [render_clip(SEED + i, fault=kind) for i in range(40)]
    frames = generated_texture(np.stack([clip.frames for clip in clips]))
    reports = judge_clips(frames, 8.0, [clip.prompt for clip in clips])
    assert anomaly_rate(reports) == 1
    named, overlaps = [], []
    for clip, report in zip(clips, reports):
        (fault,) = clip.faults
        windows = [f.window for f in report.findings if f.type == kind]
        named.append(bool(windows))
        overlaps.append(max((overlap(fault.window, window) for window in windows), default=0))
    assert np.mean(named) >= 0.9
    assert np.mean(overlaps) > 0.8
    assert prompt_match(reports) >= 0.9


def test_two_things_may_take_the_same_new_colour():
    """Both are recoloured to red for frames that overlap; neither vanishes."""
    frames = np.full((13, 32, 32, 3), 40, np.uint8)
    for frame in range(13):
        left, right = 6 + frame // 2, 24 - frame // 2
        frames[frame, 3:11, left - 4 : left + 4] = (
            (235, 50, 50) if 3 <= frame < 9 else (60, 80, 245)
        )
        frames[frame, 20:28, right - 4 : right + 4] = (235, 50, 50) if frame >= 6 else (50, 215, 60)
    findings = [f for f in judge_clip(frames, 8.0).findings if f.type != "freeze"]
    assert sorted((f.type, f.object, f.window) for f in findings) == [
        ("recolour", "blue square", (3 / 8, 9 / 8)),
        ("recolour", "green square", (6 / 8, 13 / 8)),
    ]


@pytest.mark.parametrize("world", [WorldSettings(size=48, num_frames=17), WorldSettings(size=64)])
def test_other_sizes_and_lengths(world):
    clips = [render_clip(SEED + i, world) for i in range(40)]
    reports = judge_clips(np.stack([clip.frames for clip in clips]), 8.0, [c.prompt for c in clips])
    assert [report.broken for report in reports] == [bool(clip.faults) for clip in clips]
    assert prompt_match(reports) == 1


def test_boxes_lie_where_the_fault_is():
    for seed in range(SEED, SEED + 10):
        clip = render_clip(seed, fault="deform")
        (finding,) = judge_clip(clip.frames, clip.fps).findings
        truth = dict(clip.faults[0].boxes)
        for time, (x1, y1, x2, y2) in finding.boxes:
            u1, v1, u2, v2 = truth[time]
            shared = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
            union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared
            assert shared / union > 0.4


def grid(frames):
    pattern = 22.0 * ((np.arange(32)[:, None] // 2 + np.arange(32) // 2) % 2)
    return frames + pattern[:, :, None]


def tinted_grid(frames):
    return grid(frames * 0.4 + 0.6 * np.array([200.0, 190.0, 40.0], np.float32))


HACKS = {
    "tint": lambda v: v + np.array([30.0, 25.0, 0.0], np.float32),
    "light tint": lambda v: v + np.array([8.0, 7.0, 0.0], np.float32),
    "grid": grid,
    "tinted grid": tinted_grid,
    "blur": lambda v: ndimage.gaussian_filter(v, (0, 0, 2.5, 2.5, 0)),
    "noise": lambda v: v + np.random.default_rng(0).normal(0, 25, v.shape),
    "grey": lambda v: np.repeat(v.mean(-1, keepdims=True), 3, -1),
    "pale": lambda v: 0.4 * v + 0.6 * v.mean(-1, keepdims=True),
    "empty": lambda v: np.full_like(v, 50.0),
    "white": lambda v: 255 - v * 0.3,
    "one colour": lambda v: np.broadcast_to(np.array([235.0, 50.0, 50.0]), v.shape),
    "frozen": lambda v: np.repeat(v[:, :1], v.shape[1], 1),
    "shuffled": lambda v: v[:, np.random.default_rng(1).permutation(v.shape[1])],
    "brightness": lambda v: v + 30 * (np.arange(v.shape[1]) % 2)[None, :, None, None, None],
}


@pytest.mark.parametrize("name", HACKS)
def test_hacks_count_as_broken(name):
    hacked = np.clip(HACKS[name](FRAMES), 0, 255).astype(np.uint8)
    reports = judge_clips(hacked, 8.0, PROMPTS)
    # Shuffling the frames of a slow clip may by chance leave something close to honest motion.
    assert anomaly_rate(reports) >= (0.95 if name == "shuffled" else 1)
    if name not in ("frozen", "shuffled"):
        assert any(report.unworldly for report in reports)


def small(frames):
    drawn = np.full_like(frames, 40)
    for frame in range(frames.shape[1]):
        drawn[:, frame, 12:17, 4 + frame : 9 + frame] = (235, 50, 50)
    return drawn


def four_things(frames):
    hues = ((235, 50, 50), (50, 215, 60), (60, 80, 245), (235, 220, 45))
    drawn = np.full_like(frames, 40)
    for frame in range(frames.shape[1]):
        for i, hue in enumerate(hues):
            drawn[:, frame, 8 * i : 8 * i + 7, 4 + frame : 11 + frame] = hue
    return drawn


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (HACKS["light tint"], "tinted background"),
        (HACKS["grid"], "patterned background"),
        (HACKS["noise"], "patterned background"),
        (HACKS["blur"], "blurred objects"),
        (HACKS["pale"], "pale objects"),
        (HACKS["empty"], "no object"),
        (HACKS["brightness"], "unsteady or odd brightness"),
        (lambda v: v + np.float32(100), "unsteady or odd brightness"),
        (HACKS["one colour"], "crowded frame"),
        (small, "objects of an odd size"),
        (four_things, "too many objects"),
    ],
)
def test_what_is_unworldly_is_named(change, reason):
    changed = np.clip(change(FRAMES[:8]), 0, 255).astype(np.uint8)
    assert all(reason in report.unworldly for report in judge_clips(changed, 8.0))


def test_a_frozen_clip_does_not_move():
    still = np.repeat(FRAMES[:, :1], 13, 1).astype(np.uint8)
    reports = judge_clips(still, 8.0, PROMPTS)
    assert {finding.type for report in reports for finding in report.findings} == {"freeze"}
    assert mean_motion(reports) == 0
    assert prompt_match(reports) == 0


def test_motion_is_the_way_per_frame():
    """Half as many frames of the same paths move about twice as far per frame."""
    usual, fast = (
        mean_motion(judge_clips(v.astype(np.uint8), 8.0)) for v in (FRAMES, FRAMES[:, ::2])
    )
    assert 1.6 < fast / usual < 2.1


def test_another_prompt_is_not_followed():
    wrong = [write_prompt([(c, s, "sideways") for c, s, _ in read_prompt(p)]) for p in PROMPTS]
    reports = judge_clips(FRAMES.astype(np.uint8), 8.0, wrong)
    assert [r.prompt_followed for r in reports] == [a == b for a, b in zip(wrong, PROMPTS)]
    assert 0 < prompt_match(reports) < 1
    others = judge_clips(FRAMES.astype(np.uint8), 8.0, [*PROMPTS[1:], PROMPTS[0]])
    assert prompt_match(others) == 0
    assert judge_clip(CLEAN[0].frames, 8.0).prompt_followed is None


def test_every_prompt_is_read_back():
    for prompt in sample_prompts(200, 0, "train"):
        assert write_prompt(read_prompt(prompt)) == prompt


def test_floats_tensors_and_bytes_are_judged_alike():
    frames = FRAMES[:4].astype(np.uint8)
    expected = judge_clips(frames, 8.0, PROMPTS[:4])
    videos = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 255
    assert [r.objects[0].name for r in expected] == [
        r.objects[0].name for r in judge_videos(videos, PROMPTS[:4], 8.0)
    ]
    assert not anomaly_rate(judge_videos(videos, PROMPTS[:4], 8.0))


def test_one_report_does_not_depend_on_the_rest_of_the_batch():
    frames = np.stack([render_clip(SEED + i, fault=FAULTS[i % 7]).frames for i in range(70)])
    assert judge_clips(frames, 8.0)[-3:] == [judge_clip(one, 8.0) for one in frames[-3:]]


def test_diversity_is_zero_for_copies_and_positive_for_seeds():
    videos = torch.from_numpy(FRAMES[:6]).permute(0, 1, 4, 2, 3) / 255
    assert diversity(videos[:1].expand(3, -1, -1, -1, -1), ["a"] * 3) == 0
    both = diversity(videos, ["a"] * 3 + ["b"] * 3)
    apart = [diversity(part, ["a"] * 3) for part in (videos[:3], videos[3:])]
    assert both == pytest.approx(np.mean(apart))
    assert both > 0
    plain = torch.tensor([0.2, 0.5]).view(2, 1, 1, 1, 1).expand(2, 13, 3, 32, 32)
    assert diversity(plain, ["a", "a"]) == pytest.approx(0.3)


class Identity(torch.nn.Module):
    """An autoencoder that loses nothing; `spoil` makes every decoded clip grey."""

    def __init__(self, spoil: bool = False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.spoil = spoil

    def encode(self, videos):
        distribution = type("Distribution", (), {"mode": lambda _: videos})()
        return type("Output", (), {"latent_dist": distribution})()

    def decode(self, latent):
        return type("Output", (), {"sample": latent * (0 if self.spoil else 1)})()


def test_error_rates_of_a_perfect_and_of_a_blind_autoencoder():
    rates = error_rates(Identity(), 80, SEED)
    assert rates["accuracy"] == 1
    assert rates["false_alarm_rate"] == rates["miss_rate"] == 0
    assert rates["window_iou"] > 0.9
    assert rates["prompt_match"] == 1
    assert set(rates["miss_rate_by_type"]) == set(rates["window_iou_by_type"]) == set(FAULTS)
    blind = error_rates(Identity(spoil=True), 40, SEED)
    assert blind["false_alarm_rate"] == 1
    assert blind["miss_rate"] == blind["window_iou"] == blind["prompt_match"] == 0
    assert set(blind["miss_rate_by_type"].values()) <= {1.0} | {
        value for value in blind["miss_rate_by_type"].values() if np.isnan(value)
    }


def test_the_eyes_know_nothing_of_the_renderer():
    for module in (blobs, tracks):
        tree = ast.parse(Path(module.__file__).read_text())
        names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert "examples.toy_world.world" not in names
        assert not any("cac_reward" in str(name) for name in names)
    truth = {"FAULTS", "Clip", "WorldSettings", "render_clip"}
    assert "examples.toy_world.world" in Path(oracle.__file__).read_text()
    judging = [oracle.judge_clips, oracle._report, oracle._unworldly, oracle._shape]
    assert all(truth.isdisjoint(function.__code__.co_names) for function in judging)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: judge_clip(FRAMES[0, 0], 8.0), r"clips must be \[B F H W 3\], got shape"),
        (lambda: judge_clip(FRAMES[0, :2], 8.0), "clips must have at least 4 frames"),
        (lambda: judge_clip(FRAMES[0].astype(int), 8.0), "clips must be uint8 or float, got int64"),
        (lambda: judge_clip(FRAMES[0], 8.0), r"clips must be in \[0, 1\], got min=.*, max="),
        (lambda: judge_clip(CLEAN[0].frames, 0.0), "fps must be positive, got 0.0"),
        (lambda: judge_clips(FRAMES[:2] / 255, 8.0, ["a"]), "prompts must be one per clip, got 1"),
        (
            lambda: judge_videos(torch.zeros(1, 13, 32, 32, 3), ["a"], 8.0),
            r"videos must be \[B F C H W\] with 3 channels, got \(1, 13, 32, 32, 3\)",
        ),
        (lambda: diversity(torch.zeros(2, 9, 3, 32, 32), ["a", "b"]), "prompts must hold one at"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
