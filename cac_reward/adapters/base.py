"""What every adapter shares: a framework's videos into the reward contract, its scores back out.

Axes: B videos, F frames, C channels (3), H height, W width.
"""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cac_reward.inputs import check_prompts, check_rate, open_clip
from cac_reward.video import Video

logger = logging.getLogger(__name__)

Scorer = Callable[..., Any]
"""scorer(videos [B F 3 H W] in [0, 1], prompts, *, fps) -> Tensor [B], or a dict with `score` and,
if it likes, `reports` and `errors` of the videos."""


@dataclass(frozen=True)
class Outcome:
    """What a scorer says of a batch, after the failure convention."""

    scores: Tensor
    """[B] float32 on the CPU, higher is better; what `on_failure` says where there is no score."""
    errors: tuple[str | None, ...]
    """Why each video could not be judged; None where it was."""
    reports: tuple[Any, ...]
    """The scorer's report of each video; None where it gave none."""

    @property
    def failed_share(self) -> float:
        """Share of the videos that could not be judged."""
        return sum(error is not None for error in self.errors) / max(1, len(self.errors))

    def or_none(self) -> list[float | None]:
        """The scores as a list, with None in place of NaN."""
        return [None if math.isnan(score) else score for score in self.scores.tolist()]


@dataclass(frozen=True, kw_only=True)
class VideoReward:
    """A scorer together with the form in which a framework hands it videos."""

    scorer: Scorer
    """Whoever honours the reward contract."""
    fps: float | None = None
    """Frames per second of the videos; None where each call or each file states it."""
    layout: str = "FCHW"
    """Order of the axes of one video as an array: the letters F, C, H and W."""
    value_range: str = "0..1"
    """Of arrays: '0..1', '-1..1' or '0..255'."""
    on_failure: str | float = "raise"
    """For a video that cannot be judged: 'mask' (NaN), 'raise', or the number that stands in."""
    sample: Callable[[Video], Video] | None = None
    """Takes a decoded file, returns what of it the scorer sees; None shows it all."""
    clips_at_once: int = 16
    """Videos that are opened and scored together; bounds the memory."""

    def __post_init__(self) -> None:
        if not callable(self.scorer):
            raise ValueError(
                f"scorer must be callable as scorer(videos, prompts, fps=...), got {self.scorer!r}"
            )
        if self.fps is not None:
            check_rate(self.fps)
        check_on_failure(self.on_failure)
        if self.clips_at_once < 1:
            raise ValueError(f"clips_at_once must be at least 1, got {self.clips_at_once}")

    def __call__(
        self, videos: Any, prompts: Sequence[str] | None, *, fps: float | None = None
    ) -> Outcome:
        """Score videos of any sizes and lengths; those of one form are scored together.

        Args:
            videos: B of them: one array with B before the letters of `layout`, or a sequence of
                arrays in `layout`, decoded videos, files (paths or bytes) and lists of PIL frames.
            prompts: What each was generated from; None where it is not known.
            fps: Overrides `fps` of this object; a file's own rate holds where both are None.

        Raises:
            ValueError: If a video, the rate or the prompts are not what they must be.
            FileNotFoundError: If a file is missing.
            RuntimeError: If a video cannot be judged and `on_failure` is 'raise'.
        """
        check_prompts([""] * len(videos) if prompts is None else prompts, len(videos))
        prompts = [""] * len(videos) if prompts is None else list(prompts)
        rate = self.fps if fps is None else check_rate(fps)
        scores = torch.full((len(videos),), math.nan)
        errors: list[str | None] = [None] * len(videos)
        reports: list[Any] = [None] * len(videos)
        for start in range(0, len(videos), self.clips_at_once):
            rows = range(start, min(len(videos), start + self.clips_at_once))
            groups: dict[tuple[Any, ...], list[tuple[int, Tensor]]] = {}
            for row in rows:
                clip, errors[row] = self._open(videos[row], rate)
                if clip is not None:
                    frames, own_rate = clip
                    key = (own_rate, frames.shape, frames.dtype, frames.device)
                    groups.setdefault(key, []).append((row, frames))
            for (own_rate, *_), members in groups.items():
                self._score(members, prompts, own_rate, scores, reports, errors)
        return self._outcome(scores, errors, reports)

    def __deepcopy__(self, memo: object) -> VideoReward:
        """Itself: nothing in it changes, and a judge is too large to copy."""
        return self

    def _open(
        self, video: Any, fps: float | None
    ) -> tuple[tuple[Tensor, float] | None, str | None]:
        """Frames [F 3 H W] and rate, or why the file holds no video."""
        source = io.BytesIO(video) if isinstance(video, bytes) else video
        if isinstance(source, str | os.PathLike | io.BytesIO):
            try:
                source = Video.decode(source, fps=fps)
            except ValueError as error:  # The framework's files may be cut short.
                return None, str(error)
        if isinstance(source, Video) and self.sample is not None:
            source = self.sample(source)
            fps = source.fps
        return open_clip(source, fps, self.layout, self.value_range), None

    def _score(
        self,
        members: Sequence[tuple[int, Tensor]],
        prompts: Sequence[str],
        fps: float,
        scores: Tensor,
        reports: list[Any],
        errors: list[str | None],
    ) -> None:
        """Let the scorer see videos of one form together; fills their rows."""
        rows = [row for row, _ in members]
        videos = torch.stack([frames for _, frames in members])
        if videos.dtype == torch.uint8:
            videos = videos.float() / 255
        with torch.no_grad():
            answer = self.scorer(videos, [prompts[row] for row in rows], fps=fps)
        given = answer["score"] if isinstance(answer, Mapping) else answer
        score = torch.as_tensor(given).detach().float().cpu()
        if score.shape != (len(rows),) or score.isinf().any():
            raise ValueError(
                f"scorer must return one finite number or NaN for each of {len(rows)} videos, "
                f"got {given!r}"
            )
        scores[rows] = score
        told = answer if isinstance(answer, Mapping) else {}
        for name, noted in (("reports", reports), ("errors", errors)):
            for row, one in zip(rows, told.get(name) or [None] * len(rows), strict=True):
                noted[row] = one

    def _outcome(self, scores: Tensor, errors: list[str | None], reports: list[Any]) -> Outcome:
        """Apply the failure convention."""
        for row, missing in enumerate(scores.isnan().tolist()):
            report = reports[row]
            held = report.get("error") if isinstance(report, Mapping) else None
            reason = held or getattr(report, "error", None) or "the scorer returned NaN"
            errors[row] = (errors[row] or reason) if missing else None
        failed = [row for row, error in enumerate(errors) if error is not None]
        if failed:
            told = f"{len(failed)} of {len(errors)} videos could not be judged: {errors[failed[0]]}"
            if self.on_failure == "raise":
                raise RuntimeError(f"{told}; on_failure='mask' or a number would let the run go on")
            logger.warning("%s", told)
            if self.on_failure != "mask":
                scores[failed] = float(self.on_failure)
        return Outcome(scores, tuple(errors), tuple(reports))


def check_on_failure(on_failure: object) -> None:
    """Refuse what is no failure convention.

    Raises:
        ValueError: If it is neither 'mask', 'raise' nor a finite number.
    """
    is_number = isinstance(on_failure, int | float) and not isinstance(on_failure, bool)
    if on_failure in ("mask", "raise") or (is_number and math.isfinite(float(str(on_failure)))):
        return
    raise ValueError(f"on_failure must be 'mask', 'raise' or a finite number, got {on_failure!r}")


def refuse_gradient(videos: object) -> None:
    """Say plainly that this reward cannot be backpropagated through.

    Raises:
        RuntimeError: If `videos` ask for a gradient.
    """
    if isinstance(videos, Tensor) and videos.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "videos must not require a gradient, got some that do: P(clean) is read from what a "
            "language model says and has none; detach them, and train with a policy-gradient or "
            "forward-process method (GRPO, DiffusionNFT) in place of reward backpropagation"
        )


def value_range_of(videos: Tensor | np.ndarray) -> str:
    """'0..255' for uint8, else '0..1': for frameworks that hand over both."""
    is_bytes = videos.dtype in (torch.uint8, np.dtype("uint8"))
    return "0..255" if is_bytes else "0..1"


def missing_package(feature: str, package: str, how: str) -> ImportError:
    """The error for a framework that is not installed; `how` says what to do."""
    return ImportError(f"{feature} needs {package}: {how}", name=package)
