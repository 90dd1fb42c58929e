"""The held-out judge of the toy world: finds faults from pixels alone, by tracking blobs.

It never serves as a reward. A video is broken when one of the seven faults is found in it, or when
it does not look like a clip of the world at all. Legend: B videos, F frames, C channels, H height,
W width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from examples.toy_world.blobs import HUES, Backdrop, Blobs, find_blobs
from examples.toy_world.tracks import Finding, Track, build_tracks, find_faults
from examples.toy_world.world import FAULTS, Clip, WorldSettings, render_clip

_SHAPES = ("circle", "square", "triangle", "cross")
# Typical moments (Blobs.form) of each shape, and how far a moment may stray from them.
_FORMS = np.array(
    [[0, 0, 3.94, 0.675], [0, 0, 3.65, 0.89], [-0.51, 0.5, 4.52, 0.755], [0, 0, 5.06, 0.335]]
)
_FORM_SCALE = np.array([0.15, 0.15, 0.35, 0.09])


@dataclass(frozen=True)
class TrackedObject:
    """One thing the oracle followed, described by what it was most of the time."""

    colour: str
    shape: str
    motion: str
    """'sideways', 'up and down', 'diagonally' or 'still'."""
    centres: tuple[tuple[float, float] | None, ...]
    """(x, y) relative to the frame, one per frame, None where it was not seen."""

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class OracleReport:
    """What the oracle says of one video."""

    broken: bool
    """Whether there is a finding or a reason why this is no clip of the world."""
    findings: tuple[Finding, ...]
    unworldly: tuple[str, ...]
    """Why it does not look like a clip of the world; empty where it does."""
    objects: tuple[TrackedObject, ...]
    motion: float
    """Mean way per frame of the tracked objects, in units of the frame; jumps left out."""
    prompt_followed: bool | None
    """Whether objects, colours, shapes and motions are as stated; None without a prompt."""


def judge_clip(frames: np.ndarray, fps: float, prompt: str | None = None) -> OracleReport:
    """Judge one clip.

    Args:
        frames: [F H W 3], uint8, or float in [0, 1].
        fps: Frames per second, positive.
        prompt: What the clip should show, in the world's words.

    Raises:
        ValueError: If the frames have another layout or range, or fps is not positive.
    """
    return judge_clips(np.asarray(frames)[None], fps, None if prompt is None else [prompt])[0]


def judge_clips(
    clips: np.ndarray, fps: float, prompts: Sequence[str] | None = None
) -> list[OracleReport]:
    """Judge clips of one size together; `judge_clip` for [B F H W 3]."""
    clips = _check_clips(np.asarray(clips))
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    if prompts is not None and len(prompts) != len(clips):
        raise ValueError(f"prompts must be one per clip, got {len(prompts)} for {len(clips)}")
    number, num_frames = clips.shape[:2]
    reports = []
    for first in range(0, number, 64):
        part = clips[first : first + 64]
        pictures = _levels(part).reshape(-1, *clips.shape[2:])
        blobs, backdrop = find_blobs(pictures)
        for index in range(len(part)):
            span = (index * num_frames, (index + 1) * num_frames)
            prompt = None if prompts is None else prompts[first + index]
            reports.append(_report(blobs.between(*span), backdrop.between(*span), fps, prompt))
    return reports


def judge_videos(videos: Any, prompts: Sequence[str], fps: float) -> list[OracleReport]:
    """Judge generated videos.

    Args:
        videos: Tensor [B F C H W] in [0, 1].
        prompts: One per video.
        fps: Frames per second.
    """
    return judge_clips(_channels_last(videos), fps, prompts)


def anomaly_rate(reports: Sequence[OracleReport]) -> float:
    """Share of videos that are broken."""
    return float(np.mean([report.broken for report in reports]))


def prompt_match(reports: Sequence[OracleReport]) -> float:
    """Share of videos that follow their prompt."""
    return float(np.mean([bool(report.prompt_followed) for report in reports]))


def mean_motion(reports: Sequence[OracleReport]) -> float:
    """Mean way per frame of tracked objects over videos, in units of the frame."""
    return float(np.mean([report.motion for report in reports]))


def diversity(videos: Any, prompts: Sequence[str]) -> float:
    """How different the seeds of one prompt are: mean distance of videos that share a prompt.

    The distance of two videos is the mean absolute difference of their pixels after averaging
    over cells of an eighth of the frame.

    Args:
        videos: Tensor [B F C H W] in [0, 1].
        prompts: One per video; at least one of them twice.

    Raises:
        ValueError: If no two videos share a prompt.
    """
    clips = _check_clips(_channels_last(videos)).astype(np.float32)
    size = [max(1, side // 8) for side in clips.shape[2:4]]
    clips = clips[:, :, : size[0] * 8, : size[1] * 8]
    cells = clips.reshape(*clips.shape[:2], clips.shape[2] // size[0], size[0], -1, size[1], 3)
    cells = cells.mean((3, 5)).reshape(len(clips), -1)
    distances = []
    for prompt in dict.fromkeys(prompts):
        group = cells[[i for i, other in enumerate(prompts) if other == prompt]]
        if len(group) > 1:
            gaps = np.abs(group[:, None] - group[None]).mean(-1)
            distances.append(gaps.sum() / (len(group) * (len(group) - 1)))
    if not distances:
        raise ValueError(f"prompts must hold one at least twice, got {len(prompts)} distinct ones")
    return float(np.mean(distances))


def read_prompt(prompt: str) -> list[tuple[str, str, str]]:
    """The (colour, shape, motion) of every object a prompt states, in the prompt's order.

    Example:
        >>> read_prompt("a red circle moving up and down and a blue cross moving sideways")
        [('red', 'circle', 'up and down'), ('blue', 'cross', 'sideways')]
    """
    return re.findall(r"\ba (\w+) (\w+) moving (sideways|up and down|diagonally)\b", prompt)


def error_rates(autoencoder: Any, count: int, seed: int) -> dict[str, Any]:
    """How often the oracle errs on rendered clips after the autoencoder's round trip.

    Args:
        autoencoder: diffusers' AutoencoderKLWan of the toy generator, on any device.
        count: Number of clips.
        seed: Seed of the first clip; the others follow it.

    Returns:
        clips; accuracy; false_alarm_rate (clean clips called broken); miss_rate (broken clips
        called clean); miss_rate_by_type and window_iou_by_type, where a fault is missed when no
        finding of its type overlaps it; window_iou, the mean over planted faults of the best
        overlap with any finding; prompt_match of clean clips. NaN where there is no such clip.
    """
    settings = WorldSettings()
    device = next(autoencoder.parameters()).device
    clips, reports = [], []
    for first in range(0, count, 32):
        part = [render_clip(seed + i, settings) for i in range(first, min(count, first + 32))]
        videos = _round_trip(autoencoder, np.stack([clip.frames for clip in part]), device)
        clips += part
        reports += judge_clips(videos, settings.fps, [clip.prompt for clip in part])
    truth = np.array([bool(clip.faults) for clip in clips])
    said = np.array([report.broken for report in reports])
    followed = np.array([bool(report.prompt_followed) for report in reports])
    overlaps, missed = _by_type(clips, reports)
    return {
        "clips": count,
        "accuracy": _mean(truth == said),
        "false_alarm_rate": _mean(said[~truth]),
        "miss_rate": _mean(~said[truth]),
        "miss_rate_by_type": {kind: _mean(values) for kind, values in missed.items()},
        "window_iou": _mean([value for values in overlaps.values() for value in values]),
        "window_iou_by_type": {kind: _mean(values) for kind, values in overlaps.items()},
        "prompt_match": _mean(followed[~truth]),
    }


def _check_clips(clips: np.ndarray) -> np.ndarray:
    if clips.ndim != 5 or clips.shape[-1] != 3:
        raise ValueError(f"clips must be [B F H W 3], got shape {clips.shape}")
    if min(clips.shape[1:4]) < 4:
        raise ValueError(f"clips must have at least 4 frames, rows and columns, got {clips.shape}")
    if clips.dtype != np.uint8:
        if not np.issubdtype(clips.dtype, np.floating):
            raise ValueError(f"clips must be uint8 or float, got {clips.dtype}")
        low, high = (clips.min(), clips.max()) if clips.size else (0, 0)
        if not (low >= -1e-4 and high <= 1 + 1e-4):
            raise ValueError(f"clips must be in [0, 1], got min={low:.2f}, max={high:.2f}")
    return clips


def _levels(clips: np.ndarray) -> np.ndarray:
    scale = 1 if clips.dtype == np.uint8 else 255
    return np.clip(clips.astype(np.float32) * scale, 0, 255)


def _channels_last(videos: Any) -> np.ndarray:
    if hasattr(videos, "detach"):
        videos = videos.detach().float().cpu().numpy()
    if videos.ndim != 5 or videos.shape[2] != 3:
        raise ValueError(f"videos must be [B F C H W] with 3 channels, got {tuple(videos.shape)}")
    return np.moveaxis(videos, 2, -1)


def _report(blobs: Blobs, backdrop: Backdrop, fps: float, prompt: str | None) -> OracleReport:
    tracks = build_tracks(blobs, len(backdrop.share))
    findings = find_faults(tracks, fps, _shape)
    unworldly = _unworldly(tracks, backdrop)
    objects = tuple(_describe(track) for track in tracks if not track.ghost)
    followed = None
    if prompt is not None:
        seen = sorted((thing.colour, thing.shape, thing.motion) for thing in objects)
        followed = seen == sorted(read_prompt(prompt))
    ways = [track.ways() for track in tracks if not track.ghost]
    steps = np.concatenate(ways) if ways else np.zeros(0)
    motion = float(steps.mean()) if len(steps) else 0.0
    broken = bool(findings or unworldly)
    return OracleReport(broken, findings, unworldly, objects, motion, followed)


def _describe(track: Track) -> TrackedObject:
    centres = tuple((float(x), float(y)) if seen else None for (x, y), seen in track.places())
    return TrackedObject(HUES[track.hue], _shape(track), track.motion(), centres)


def _shape(track: Track) -> str:
    good = track.seen & ~track.deformed()
    form = np.median(track.form[good if good.any() else track.seen], axis=0)
    return _SHAPES[int((((form - _FORMS) / _FORM_SCALE) ** 2).sum(1).argmin())]


def _unworldly(tracks: list[Track], backdrop: Backdrop) -> tuple[str, ...]:
    """Reasons why these are no objects of the world over a background of the world."""
    reasons = []
    level = np.median(backdrop.level)
    if np.median(backdrop.tint) > 6 or backdrop.tint.max() > 16:
        reasons.append("tinted background")
    if np.median(backdrop.roughness) > 4 or np.median(backdrop.speckle) > 11:
        reasons.append("patterned background")
    if not 8 < level < 112 or np.abs(backdrop.level - level).max() > 14:
        reasons.append("unsteady or odd brightness")
    if np.median(backdrop.share) < 0.35:
        reasons.append("crowded frame")
    real = [track for track in tracks if not track.ghost]
    if not real:
        return (*reasons, "no object")
    if len(real) > 3:
        reasons.append("too many objects")
    outlined = backdrop.edge[backdrop.edge > 0]
    if not len(outlined) or np.median(outlined) < 0.47:
        reasons.append("blurred objects")
    for track in real:
        if not 100 < np.median(track.strength[track.seen]) < 225:
            reasons.append("pale objects")
        if not 0.025 < np.median(track.area[track.seen]) < 0.15:
            reasons.append("objects of an odd size")
    return tuple(dict.fromkeys(reasons))


def _round_trip(autoencoder: Any, frames: np.ndarray, device: Any) -> np.ndarray:
    """[B F H W 3] uint8 frames, encoded and decoded; floats in [0, 1]."""
    import torch

    with torch.no_grad():
        videos = torch.from_numpy(frames).to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        latent = autoencoder.encode(videos).latent_dist.mode()
        decoded = autoencoder.decode(latent).sample.clamp(-1, 1)
    return _channels_last((decoded.transpose(1, 2) + 1) / 2)


def _by_type(
    clips: list[Clip], reports: list[OracleReport]
) -> tuple[dict[str, list[float]], dict[str, list[bool]]]:
    """Best overlap with any finding, and missed or not, of every planted fault by type."""
    overlaps: dict[str, list[float]] = {kind: [] for kind in FAULTS}
    missed: dict[str, list[bool]] = {kind: [] for kind in FAULTS}
    for clip, report in zip(clips, reports):
        for fault in clip.faults:
            found = [(_overlap(fault.window, one.window), one.type) for one in report.findings]
            overlaps[fault.type].append(max((overlap for overlap, _ in found), default=0.0))
            missed[fault.type].append(not any(o > 0 and kind == fault.type for o, kind in found))
    return overlaps, missed


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Intersection over union of two windows."""
    shared = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    return shared / (one[1] - one[0] + other[1] - other[0] - shared)


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
