"""CaC as a reward: scan a clip, look again where it is suspicious, and read P(clean).

Turn 1 weighs what the judge would answer to the scan frames. If a clean verdict at once is the
likeliest by half, its share is the score. Otherwise the judge writes which windows it wants to see
again, and turn 2's verdict, weighed after the dense frames, is the score.

Axes: B videos, F frames, C channels (3), H height, W width.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from cac_reward.answers import AnswerError, parse_findings, parse_tool_call
from cac_reward.frames import (
    blame_map,
    frame_times,
    inspect_indices,
    resize_to_budget,
    scan_indices,
)
from cac_reward.judges.base import AbstractJudge
from cac_reward.questions import (
    CLEAN_ANSWER,
    FINDINGS_PREFIX,
    SCAN_CHOICES,
    TOOL_CALL_PREFIX,
    VERDICT_CHOICES,
    VERDICT_PREFIX,
    Message,
    inspect_message,
    scan_message,
)
from cac_reward.report import UNSPECIFIED, AnomalyReport, Finding, TimeWindow
from cac_reward.video import Video

logger = logging.getLogger(__name__)

MODES = ("full", "fast")
MAX_BLAME_SIDE = 128


class Judgement(TypedDict):
    """What the reward contract lets a reward return."""

    score: Tensor
    """[B] float32, P(clean); NaN for what could not be judged."""
    blame: Tensor
    """[B F H' W'] in [0, 1], where and when the faults are; H' and W' at most 128."""
    reports: list[AnomalyReport]
    """One for each video."""


@dataclass(eq=False)
class _Case:
    """One clip on its way through the turns."""

    frames: Tensor
    """[F 3 H W] uint8, or float in [0, 1]."""
    fps: float
    prompt: str
    conversation: tuple[Message, ...] = ()
    scan_frames: Sequence[int] = ()
    inspect_frames: Sequence[int] = ()
    windows: tuple[TimeWindow, ...] = ()
    findings: tuple[Finding, ...] = ()
    scan_text: str = ""
    judge_text: str | None = None
    p_clean: float = math.nan
    error: str | None = None
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def duration_seconds(self) -> float:
        return len(self.frames) / self.fps


class CaCScorer:
    """The reward: P(clean) of each video, with the evidence.

    Args:
        judge: who looks.
        mode: 'full' lets the judge write its findings before the verdict; 'fast' asks for the
            verdict straight after the frames, and its findings are the windows looked at.
        clips_at_once: clips taken through both turns together; bounds the memory.
        max_call_tokens: most tokens of turn 1's tool call.
        max_findings_tokens: most tokens of turn 2's findings.
    """

    def __init__(
        self,
        judge: AbstractJudge,
        *,
        mode: str = "full",
        clips_at_once: int = 16,
        max_call_tokens: int = 128,
        max_findings_tokens: int = 1024,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        if clips_at_once < 1:
            raise ValueError(f"clips_at_once must be at least 1, got {clips_at_once}")
        self.judge = judge
        self.mode = mode
        self.clips_at_once = clips_at_once
        self.max_call_tokens = max_call_tokens
        self.max_findings_tokens = max_findings_tokens
        self.num_judged = 0
        self.num_failed = 0

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        attention: str = "sdpa",
        revision: str | None = None,
        mode: str = "full",
    ) -> CaCScorer:
        """Load a judge from a folder or the hub; arguments as for `LocalJudge.from_pretrained`.

        Judges loaded twice from the same files share their weights.
        """
        from cac_reward.judges.local import LocalJudge

        judge = LocalJudge.from_pretrained(
            path_or_hub_id, device=device, dtype=dtype, attention=attention, revision=revision
        )
        return cls(judge, mode=mode)

    @property
    def failed_share(self) -> float:
        """Share of all clips so far that could not be judged."""
        return self.num_failed / max(1, self.num_judged)

    def __call__(self, videos: Tensor, prompts: Sequence[str], *, fps: float) -> Judgement:
        """Score a batch of videos.

        Args:
            videos: [B F 3 H W] float in [0, 1], at least two frames.
            prompts: What each was generated from; goes into its report.
            fps: Frames per second of the videos.

        Raises:
            ValueError: If layout, range, rate or the number of prompts is wrong.
        """
        check_videos(videos, fps)
        reports = self.inspect(videos, prompts, fps=fps)
        count, num_frames, _, height, width = videos.shape
        scale = min(1.0, MAX_BLAME_SIDE / max(height, width))
        size = (math.ceil(height * scale), math.ceil(width * scale))
        blame = torch.zeros(count, num_frames, *size)
        for row, report in enumerate(reports):
            if report.score is not None:
                blame[row] = blame_map(report.findings, num_frames, *size, fps, 1 - report.score)
        score = torch.tensor([report.reward for report in reports])
        return {"score": score, "blame": blame, "reports": reports}

    def inspect(
        self,
        videos: Tensor | Sequence[Video | str | os.PathLike[str]],
        prompts: Sequence[str] | None = None,
        *,
        fps: float | None = None,
    ) -> list[AnomalyReport]:
        """Judge videos and return everything the judge said.

        Args:
            videos: [B F 3 H W] float in [0, 1], or clips and video files of any sizes.
            prompts: What each was generated from; None where it is not known.
            fps: Frames per second; needed for a tensor, and believed over a file's own rate.

        Raises:
            ValueError: If layout, range, rate or the number of prompts is wrong.
            FileNotFoundError: If a file is missing.
        """
        if isinstance(videos, Tensor):
            check_videos(videos, fps)
        prompts = [""] * len(videos) if prompts is None else prompts
        check_prompts(prompts, len(videos))
        reports: list[AnomalyReport] = []
        for start in range(0, len(videos), self.clips_at_once):
            rows = range(start, min(len(videos), start + self.clips_at_once))
            cases = [_Case(*_open(videos[row], fps), prompts[row]) for row in rows]
            with self.judge.remembering():
                self._scan(cases)
                self._concentrate([case for case in cases if case.windows])
            reports += [self._report(case) for case in cases]
        return reports

    def _scan(self, cases: Sequence[_Case]) -> None:
        """Turn 1: a clean verdict at once, or windows to look into."""
        began = time.perf_counter()
        for case in cases:
            case.scan_frames, shown = show_scan_frames(self.judge, case.frames, case.fps)
            times = frame_times(case.scan_frames, case.fps)
            case.conversation = scan_message(shown, times, self.judge.settings.wording)
        chances = self._chances(cases, SCAN_CHOICES)
        for case, p_clean in zip(cases, chances, strict=True):
            case.p_clean = p_clean
            case.scan_text = CLEAN_ANSWER
        suspicious = [case for case in cases if case.p_clean < 0.5]
        calls = self._answers(suspicious, TOOL_CALL_PREFIX, self.max_call_tokens)
        for case, call in zip(suspicious, calls, strict=True):
            case.scan_text = call
            try:
                case.windows = parse_tool_call(call, case.duration_seconds)
            except AnswerError as error:
                case.error = str(error)
        _note_seconds(cases, "scan", began)

    def _concentrate(self, cases: Sequence[_Case]) -> None:
        """Turn 2: the verdict after a second look at the windows."""
        began = time.perf_counter()
        settings = self.judge.settings
        for case in cases:
            case.inspect_frames = inspect_indices(
                case.windows, len(case.frames), case.fps, settings.inspect
            )
            shown = _show(self.judge, case.frames, case.inspect_frames, settings.inspect.pixels)
            times = frame_times(case.inspect_frames, case.fps)
            case.conversation += (
                Message("assistant", (case.scan_text,)),
                inspect_message(shown, times, settings.wording),
            )
        prefixes = [VERDICT_PREFIX] * len(cases)
        if self.mode == "full":
            texts = self._answers(cases, FINDINGS_PREFIX, self.max_findings_tokens)
            prefixes = [self._read_findings(*one) for one in zip(cases, texts, strict=True)]
        else:
            for case in cases:
                case.findings = tuple(Finding(UNSPECIFIED, window) for window in case.windows)
        judged = [row for row, case in enumerate(cases) if case.error is None]
        chances = self._chances(
            [cases[row] for row in judged], VERDICT_CHOICES, [prefixes[row] for row in judged]
        )
        for row, p_clean in zip(judged, chances, strict=True):
            cases[row].p_clean = p_clean
        _note_seconds(cases, "inspect", began)

    def _read_findings(self, case: _Case, text: str) -> str:
        """Take over what the judge wrote; returns how its answer begins, up to the verdict."""
        case.judge_text = text
        line = text.strip().partition("\n")[0]
        try:
            case.findings = parse_findings(
                line, case.duration_seconds, box_reader=self.judge.box_reader
            )
        except AnswerError as error:
            case.error = str(error)
        return f"{line}\n{VERDICT_PREFIX}"

    def _chances(
        self, cases: Sequence[_Case], choices: Sequence[str], prefix: str | Sequence[str] = ""
    ) -> list[float]:
        """P(first choice) for each case."""
        log_probs = self.judge.choice_log_probs(
            [case.conversation for case in cases],
            choices=choices,
            prefix=prefix,
            tools=self.judge.tools,
        )
        return self.judge.probabilities(log_probs)[:, 0].tolist()

    def _answers(self, cases: Sequence[_Case], prefix: str, max_new_tokens: int) -> list[str]:
        """What the judge writes after `prefix` for each case."""
        return self.judge.generate(
            [case.conversation for case in cases],
            prefix=prefix,
            max_new_tokens=max_new_tokens,
            tools=self.judge.tools,
        )

    def _report(self, case: _Case) -> AnomalyReport:
        """Count the case and freeze it."""
        self.num_judged += 1
        if case.error is not None:
            self.num_failed += 1
            logger.warning("a clip could not be judged: %s", case.error)
        return AnomalyReport(
            score=None if case.error is not None else case.p_clean,
            judge_id=self.judge.name,
            fps=case.fps,
            num_frames=len(case.frames),
            findings=case.findings,
            windows=case.windows,
            scan_frames=tuple(case.scan_frames),
            inspect_frames=tuple(case.inspect_frames),
            scan_text=case.scan_text,
            judge_text=case.judge_text,
            prompt=case.prompt,
            mode=self.mode,
            timings=case.timings,
            note=self.judge.domain_note,
            error=case.error,
        )


def check_videos(videos: Tensor, fps: float | None) -> None:
    """Refuse what breaks the reward contract: [B F 3 H W] float in [0, 1], with its rate.

    Raises:
        ValueError: Naming what is wrong and how to put it right.
    """
    if not isinstance(videos, Tensor) or videos.ndim != 5 or videos.shape[2] != 3:
        shape = tuple(videos.shape) if isinstance(videos, Tensor) else type(videos).__name__
        raise ValueError(
            f"videos must be a tensor [videos, frames, 3, height, width], got {shape}; "
            "bring channels behind frames with permute"
        )
    if videos.shape[1] < 2:
        raise ValueError(
            f"videos must have at least 2 frames, got {videos.shape[1]}; "
            "one picture has no time in it"
        )
    if 0 in videos.shape[3:]:
        raise ValueError(f"videos must have pixels, got shape {tuple(videos.shape)}")
    if not videos.is_floating_point():
        raise ValueError(f"videos must be float in [0, 1], got {videos.dtype}; divide by 255")
    low, high = (videos.min().item(), videos.max().item()) if len(videos) else (0.0, 1.0)
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"videos must be in [0, 1], got min={low:.2f}, max={high:.2f}; "
            "rescale with (x + 1) / 2 if they are in [-1, 1]"
        )
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise ValueError(
            f"fps must be above 0, got {fps!r}; a judge that answers in seconds needs the true rate"
        )


def check_prompts(prompts: Sequence[str], count: int) -> None:
    """Refuse prompts that are not one text for each video.

    Raises:
        ValueError: If there are too few or too many, or one is no text.
    """
    if isinstance(prompts, str) or len(prompts) != count:
        got = repr(prompts[:200]) if isinstance(prompts, str) else str(len(prompts))
        raise ValueError(f"prompts must hold one text for each of {count} videos, got {got}")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"prompts must be texts, got {type(prompt).__name__}")


def show_scan_frames(judge: AbstractJudge, frames: Tensor, fps: float) -> tuple[list[int], Tensor]:
    """Which frames of a clip [F 3 H W] turn 1 shows, and what they look like [K 3 H' W']."""
    settings = judge.settings.scan
    chosen = scan_indices(len(frames), fps, settings)
    return chosen, _show(judge, frames, chosen, settings.pixels)


def _open(
    video: Tensor | Video | str | os.PathLike[str], fps: float | None
) -> tuple[Tensor, float]:
    """Frames and rate of a clip in memory or a file."""
    if isinstance(video, Tensor):
        assert fps is not None
        return video.detach(), float(fps)
    if not isinstance(video, Video):
        video = Video.decode(video, fps=fps)
    elif fps is not None and fps != video.fps:
        raise ValueError(f"fps must be None or the video's own {video.fps}, got {fps}")
    return video.frames, video.fps


def _show(judge: AbstractJudge, frames: Tensor, indices: Sequence[int], pixels: int) -> Tensor:
    """[K 3 H' W'] the chosen frames as the judge sees them."""
    chosen = frames[list(indices)]
    if chosen.dtype == torch.uint8:
        chosen = chosen.float() / 255
    return resize_to_budget(chosen, pixels, judge.patch_factor)


def _note_seconds(cases: Sequence[_Case], stage: str, began: float) -> None:
    """Share the time of a stage evenly among the clips that went through it."""
    for case in cases:
        case.timings[stage] = (time.perf_counter() - began) / len(cases)
