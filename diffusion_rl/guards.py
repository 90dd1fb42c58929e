"""Guards against hacking: a clip that is still, blurred or grey has no faults either.

Each guard compares a simple statistic of the videos with the level the base policy had. Once the
policy has fallen below its share of that level, the guard raises an alarm and charges every video
for what it lacks. Before that nobody is charged: a clip of one small object moves less than the
mean without any fault, and faults such as flicker move more.

Axes: B videos of this process, N of all of them, F frames, C channels, H height, W width.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor

from diffusion_rl.shapes import check_shape

logger = logging.getLogger(__name__)

MEMORY = 0.8
"""Share of itself that a running level keeps from one batch to the next; a batch alone depends too
much on its prompts."""
THUMBNAIL = 64
"""Longest side in pixels at which whole videos are compared with each other."""


def motion(videos: Tensor) -> Tensor:
    """Measure how much changes from one frame to the next.

    motion = mean over frames, channels and pixels of  |frame[i + 1] - frame[i]|

    Args:
        videos: [B F C H W] in [0, 1]; a single frame has motion 0.

    Returns:
        [B] float32 in [0, 1].
    """
    axes = check_shape("videos", videos, "B F C H W")
    if axes["F"] == 1:
        return videos.new_zeros(axes["B"], dtype=torch.float32)
    return (videos[:, 1:] - videos[:, :-1]).float().abs().flatten(1).mean(dim=1)


def sharpness(videos: Tensor) -> Tensor:
    """Measure how strong edges and fine detail are; blur lowers it.

    sharpness = mean over frames and inner pixels of the grey picture's
                |4 * pixel - left - right - above - below|

    Args:
        videos: [B F C H W] in [0, 1]; H and W at least 3.

    Returns:
        [B] float32, at least 0.

    Raises:
        ValueError: A side is below 3 pixels.
    """
    axes = check_shape("videos", videos, "B F C H W")
    if min(axes["H"], axes["W"]) < 3:
        raise ValueError(
            f"videos must be at least 3 pixels high and wide, got {axes['H']}x{axes['W']}"
        )
    grey = videos.float().mean(dim=2)
    inner = grey[..., 1:-1, 1:-1]
    across = grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:]
    along = grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1]
    return (4 * inner - across - along).abs().flatten(1).mean(dim=1)


def contrast(videos: Tensor) -> Tensor:
    """Measure how far the pixels of a frame spread; an empty or grey frame has none.

    contrast = mean over frames and channels of the standard deviation over pixels

    Args:
        videos: [B F C H W] in [0, 1].

    Returns:
        [B] float32 in [0, 0.5].
    """
    check_shape("videos", videos, "B F C H W")
    spread = videos.float().flatten(3).std(dim=3, correction=0)
    return spread.flatten(1).mean(dim=1)


def diversity(videos: Tensor, group: Tensor) -> Tensor:
    """Measure how different a video is from the others of its prompt.

    diversity = mean over the other videos of the group of the mean |difference| of thumbnails

    Args:
        videos: [B F C H W] in [0, 1].
        group: [B] integer, equal for the videos of one prompt.

    Returns:
        [B] float32 in [0, 1]; NaN for a video that is alone in its group.
    """
    axes = check_shape("videos", videos, "B F C H W")
    check_shape("group", group, "B", B=axes["B"])
    result = torch.full((axes["B"],), math.nan, device=videos.device)
    for index in group.unique():
        members = (group == index).nonzero().flatten().to(videos.device)
        if len(members) < 2:
            continue
        thumbnails = _thumbnails(videos[members])
        distances = torch.stack(
            [(thumbnails - one).abs().flatten(1).mean(dim=1) for one in thumbnails]
        )
        result[members] = distances.sum(dim=1) / (len(members) - 1)
    return result


STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "motion": lambda videos, group: motion(videos),
    "sharpness": lambda videos, group: sharpness(videos),
    "contrast": lambda videos, group: contrast(videos),
    "diversity": diversity,
}
"""What a guard may watch: (videos [B F C H W], group [B]) -> [B]."""


Gather = Callable[[Tensor], Tensor]
"""[B ...] of this process to [N ...] of all that took part."""


def _alone(own: Tensor) -> Tensor:
    """Where one process has all videos."""
    return own


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """One guard of a run."""

    statistic: str
    """What is watched: motion, sharpness, contrast or diversity."""
    weight: float = 1.0
    """Reward taken from a video that lacks all of it; at least 0 (0 only raises the alarm)."""
    floor: float = 0.9
    """Share of the base policy's level in (0, 1] below which alarm is raised and videos are
    charged."""

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS:
            near = difflib.get_close_matches(self.statistic, list(STATISTICS), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(
                f"statistic must be one of {', '.join(STATISTICS)}, got '{self.statistic}'{hint}"
            )
        if not self.weight >= 0 or math.isinf(self.weight):
            raise ValueError(f"weight must be a finite number >= 0, got {self.weight}")
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor must be in (0, 1], got {self.floor}")


def default_guards(num_frames: int) -> tuple[GuardSettings, ...]:
    """The guards of a run that names none: all that its videos can be measured by.

    Weights and floors are those of the toy recipes; docs/rewards.md has a run without any.

    Args:
        num_frames: of a video; one frame alone has no motion.
    """
    guards = (
        GuardSettings(statistic="motion", weight=0.5),
        GuardSettings(statistic="sharpness", weight=0.25),
        GuardSettings(statistic="contrast", weight=0.25),
        GuardSettings(statistic="diversity", weight=0.5, floor=0.95),
    )
    return guards if num_frames > 1 else guards[1:]


@dataclass(frozen=True)
class GuardReport:
    """What the guards found in a batch."""

    penalty: Tensor
    """[N] float32 on the CPU, at least 0; to be taken from the reward."""
    levels: Mapping[str, float]
    """Mean of each watched statistic over the batch."""
    running: Mapping[str, float]
    """Running mean of each level, to be handed in with the next batch."""
    alarms: tuple[str, ...]
    """Statistics whose running level is below floor x reference level."""


def measure_reference(
    guards: Sequence[GuardSettings], videos: Tensor, group: Tensor, gather: Gather = _alone
) -> dict[str, float]:
    """Measure the level that each guard will hold the policy to.

    Args:
        guards: Any number; no statistic twice.
        videos: [B F C H W] in [0, 1] made by the base policy.
        group: [B] integer, equal for the videos of one prompt.
        gather: Where several processes have a share of the videos each.

    Returns:
        The mean of each watched statistic; plain numbers, to be saved with a checkpoint.

    Raises:
        ValueError: A statistic is watched twice, or the base policy has none of it.
    """
    names = [guard.statistic for guard in guards]
    if len(set(names)) != len(names):
        raise ValueError(f"guards must watch different statistics, got {names}")
    reference = {name: _values(name, videos, group, gather).mean().item() for name in names}
    for name, level in reference.items():
        if not level > 0:
            raise ValueError(
                f"reference level of {name} must be above 0, got {level}; the base policy's "
                "videos have none of it to lose, so take this guard out"
            )
    return reference


def apply_guards(
    guards: Sequence[GuardSettings],
    reference: Mapping[str, float],
    videos: Tensor,
    group: Tensor,
    running: Mapping[str, float] | None = None,
    gather: Gather = _alone,
) -> GuardReport:
    """Raise an alarm for what the policy lacks, and charge every video for its part in that.

    running = MEMORY * running + (1 - MEMORY) * mean over N of statistic
    lowest  = floor * reference level
    penalty = sum over guards with running < lowest of
        weight * max(0, lowest - statistic) / lowest

    Args:
        guards: As given to `measure_reference`.
        reference: What `measure_reference` returned.
        videos: [B F C H W] in [0, 1].
        group: [B] integer, equal for the videos of one prompt.
        running: Of the batch before; None begins at the reference level.
        gather: Where several processes have a share of the videos each.

    Raises:
        ValueError: The reference lacks a watched statistic.
    """
    penalty = gather(torch.zeros(videos.shape[0]))
    levels: dict[str, float] = {}
    now: dict[str, float] = {}
    alarms: list[str] = []
    for guard in guards:
        if guard.statistic not in reference:
            raise ValueError(
                f"reference must hold a level of {guard.statistic}, got {sorted(reference)}; "
                "measure it again with measure_reference"
            )
        name, lowest = guard.statistic, guard.floor * reference[guard.statistic]
        values = _values(name, videos, group, gather)
        levels[name] = values.mean().item()
        before = (running or reference)[name]
        now[name] = MEMORY * before + (1 - MEMORY) * levels[name]
        if now[name] < lowest:
            alarms.append(name)
            penalty += guard.weight * (lowest - values).clamp_min(0) / lowest
            share = 100 * now[name] / reference[name]
            logger.warning("%s has fallen to %.0f%% of the base policy's level", name, share)
    return GuardReport(penalty, levels, now, tuple(alarms))


def _values(statistic: str, videos: Tensor, group: Tensor, gather: Gather) -> Tensor:
    """[N], the same on every process."""
    if statistic == "diversity":  # A group may lie on several processes; thumbnails are enough.
        values = diversity(gather(_thumbnails(videos)), gather(group))
    else:
        values = gather(STATISTICS[statistic](videos, group))
    values = values.detach().float().cpu()
    if bool(values.isnan().any()):
        raise ValueError(
            f"{statistic} needs finite videos and, for diversity, at least 2 videos per prompt; "
            f"it is NaN for {int(values.isnan().sum())} of {len(values)} videos"
        )
    return values


def _thumbnails(videos: Tensor) -> Tensor:
    """Videos no larger than THUMBNAIL, each pixel the mean of what it covers."""
    count, (height, width) = videos.shape[0], videos.shape[-2:]
    scale = min(1.0, THUMBNAIL / max(height, width))
    if scale == 1.0:
        return videos.float()
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    frames = rearrange(videos.float(), "B F C H W -> (B F) C H W")
    small = functional.adaptive_avg_pool2d(frames, size)
    return rearrange(small, "(B F) C H W -> B F C H W", B=count)
