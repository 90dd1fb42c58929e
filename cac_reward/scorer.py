"""CaC as a reward: scan a clip, look again where it is suspicious, and read P(clean).

Turn 1 weighs what the judge would answer to the scan frames. If a clean verdict at once is the
likeliest by half, its share is the score. Otherwise the judge writes which windows it wants to see
again, and turn 2's verdict, weighed after the dense frames, is the score.

Axes: B videos, F frames, C channels (3), H height, W width.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from torch import Tensor

from cac_reward.answers import AnswerError, parse_findings, parse_tool_call
from cac_reward.cache import ReportCache, report_key
from cac_reward.calibration import Calibration
from cac_reward.cases import Case, counting_tokens, freeze, note_seconds, said, settle
from cac_reward.frames import (
    InspectSettings,
    JudgeSettings,
    ScanSettings,
    blame_maps,
    frame_times,
    inspect_indices,
)
from cac_reward.inputs import (
    LAYOUT,
    Clip,
    check_prompts,
    check_videos,
    open_clip,
    show_frames,
    show_scan_frames,
    to_batch,
)
from cac_reward.judges.base import AbstractJudge
from cac_reward.judges.votes import Votes
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
from cac_reward.report import MODES, UNSPECIFIED, AnomalyReport, Finding

if TYPE_CHECKING:
    from cac_reward.judges.endpoint import EndpointOptions

logger = logging.getLogger(__name__)


class Judgement(TypedDict):
    """What the reward contract lets a reward return."""

    score: Tensor
    """[B] float32, P(clean); NaN for what could not be judged."""
    blame: Tensor
    """[B F H' W'] in [0, 1], where and when the faults are; H' and W' at most 128."""
    reports: list[AnomalyReport]
    """One for each video."""


class CaCScorer:
    """The reward: P(clean) of each video, with the evidence.

    Args:
        judge: who looks.
        mode: 'full' lets the judge write its findings before the verdict; 'fast' asks for the
            verdict straight after the frames, and its findings are the windows looked at.
        clips_at_once: clips taken through both turns together; bounds the memory.
        max_call_tokens: most tokens of turn 1's tool call.
        max_findings_tokens: most tokens of turn 2's findings.
        cache: where reports are kept and found again; None judges anew each time.
        calibration: how verdicts are read; None takes the one stored beside the judge.
    """

    def __init__(
        self,
        judge: AbstractJudge,
        *,
        mode: str = "full",
        clips_at_once: int = 16,
        max_call_tokens: int = 128,
        max_findings_tokens: int = 1024,
        cache: ReportCache | None = None,
        calibration: Calibration | None = None,
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
        self.cache = cache
        self.calibration = judge.calibration if calibration is None else calibration
        self.num_judged = 0
        self.num_failed = 0
        self._counting = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        attention: str = "sdpa",
        mode: str = "full",
        scan: ScanSettings | Mapping[str, object] | None = None,
        inspect: InspectSettings | Mapping[str, object] | None = None,
        revision: str | None = None,
        base: str | Path | None = None,
        quantization: str | None = None,
        num_votes: int | None = None,
        seed: int = 0,
        cache: str | os.PathLike[str] | None = None,
    ) -> CaCScorer:
        """Load a judge from a folder or the hub.

        Judges loaded twice from the same files share their weights. A calibration stored beside
        the checkpoint is used.

        Args:
            path_or_hub_id, device, dtype, attention, revision, base, quantization: as for
                `LocalJudge.from_pretrained`.
            mode: 'full' or 'fast'.
            scan, inspect: which frames each turn sees, whole or as the names to change; None
                keeps how the judge was trained to be asked.
            num_votes: sampled answers whose consensus is the verdict, at least 2; None reads the
                verdict from its log-probabilities, which is exact and cheaper.
            seed: of the votes; equal seeds give equal scores.
            cache: file of a `ReportCache`.
        """
        from cac_reward.judges.local import LocalJudge

        judge = LocalJudge.from_pretrained(
            path_or_hub_id,
            device=device,
            dtype=dtype,
            attention=attention,
            revision=revision,
            base=base,
            quantization=quantization,
        )
        if scan is not None or inspect is not None or num_votes is not None:
            votes = None if num_votes is None else Votes(num_votes=num_votes, seed=seed)
            judge = judge.asked_as(settings=judge.settings.seen_as(scan, inspect), votes=votes)
        return cls(judge, mode=mode, cache=None if cache is None else ReportCache(cache))

    @classmethod
    def from_endpoint(
        cls,
        base_url: str,
        model: str,
        *,
        options: EndpointOptions | None = None,
        settings: JudgeSettings | None = None,
        mode: str = "full",
        cache: str | os.PathLike[str] | None = None,
    ) -> CaCScorer:
        """Ask a judge behind an OpenAI-compatible server; arguments as for `EndpointJudge`."""
        from cac_reward.judges.endpoint import EndpointJudge

        judge = EndpointJudge(base_url, model, options=options, settings=settings)
        return cls(judge, mode=mode, cache=None if cache is None else ReportCache(cache))

    @property
    def failed_share(self) -> float:
        """Share of all clips so far that could not be judged."""
        return self.num_failed / max(1, self.num_judged)

    @property
    def settings(self) -> dict[str, object]:
        """What its scores depend on besides weights, decoder, mode and clip; kept in reports."""
        return {
            **self.judge.plain_settings,
            "calibration.temperature": self.calibration.temperature,
        }

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
        _, num_frames, _, height, width = videos.shape
        blame = blame_maps(reports, num_frames, height, width, fps)
        score = torch.tensor([report.reward for report in reports])
        return {"score": score, "blame": blame, "reports": reports}

    async def ascore(self, videos: Tensor, prompts: Sequence[str], *, fps: float) -> Judgement:
        """Score a batch of videos in another thread, while the caller's event loop goes on."""
        return await asyncio.to_thread(self, videos, prompts, fps=fps)

    def inspect(
        self,
        videos: Tensor | np.ndarray | Sequence[Clip],
        prompts: Sequence[str] | None = None,
        *,
        fps: float | None = None,
        layout: str = LAYOUT,
        value_range: str = "0..1",
    ) -> list[AnomalyReport]:
        """Judge videos and return everything the judge said.

        Args:
            videos: a batch of one size, or a sequence of clips of any sizes and lengths: arrays,
                decoded videos, video files, or lists of PIL pictures.
            prompts: What each was generated from; None where it is not known.
            fps: Frames per second; needed for arrays and pictures. A file's own rate holds
                without it.
            layout: order of an array's axes, the letters of BFCHW; single clips have no B.
            value_range: of arrays: '0..1', '-1..1' or '0..255'.

        Raises:
            ValueError: If layout, range, rate or the number of prompts is wrong.
            FileNotFoundError: If a file is missing.
        """
        if isinstance(videos, Tensor | np.ndarray):
            videos = to_batch(videos, layout, value_range)
            layout, value_range = LAYOUT, "0..1"
            check_videos(videos, fps)
        prompts = [""] * len(videos) if prompts is None else prompts
        check_prompts(prompts, len(videos))
        reports: list[AnomalyReport] = []
        for start in range(0, len(videos), self.clips_at_once):
            rows = range(start, min(len(videos), start + self.clips_at_once))
            cases = [
                Case(*open_clip(videos[row], fps, layout, value_range), prompts[row])
                for row in rows
            ]
            reports += self._recall_or_judge(cases)
        return reports

    def _recall_or_judge(self, cases: Sequence[Case]) -> list[AnomalyReport]:
        """Reports of cases; those in the cache are not judged again."""
        if self.cache is None:
            return self._judge(cases)
        asked = self._asked()
        keys = [report_key(case.frames, case.fps, case.prompt, asked) for case in cases]
        known = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        new = {key: case for key, case in zip(keys, cases, strict=True) if known[key] is None}
        judged = dict(zip(new, self._judge(list(new.values())), strict=True))
        self.cache.put(judged)
        return [known[key] or judged[key] for key in keys]

    def _asked(self) -> dict[str, object]:
        """Everything but the clip that a report depends on."""
        return {
            "judge": self.judge.name,
            "files": self.judge.fingerprint,
            "settings": self.settings,
            "decoder": self.judge.decoder,
            "mode": self.mode,
            "tokens": [self.max_call_tokens, self.max_findings_tokens],
        }

    def _judge(self, cases: Sequence[Case]) -> list[AnomalyReport]:
        """Take cases through both turns together."""
        if cases:
            with self.judge.remembering():
                self._scan(cases)
                self._concentrate([case for case in cases if case.windows])
        return [self._report(case) for case in cases]

    def _scan(self, cases: Sequence[Case]) -> None:
        """Turn 1: a clean verdict at once, or windows to look into."""
        began = time.perf_counter()
        for case in cases:
            case.scan_frames, shown = show_scan_frames(self.judge, case.frames, case.fps)
            times = frame_times(case.scan_frames, case.fps)
            case.conversation = scan_message(shown, times, self.judge.settings.wording)
        chances = self._chances("scan", cases, SCAN_CHOICES)
        for case, p_clean in zip(cases, chances, strict=True):
            settle(case, p_clean)
            case.scan_text = CLEAN_ANSWER
        suspicious = [case for case in cases if case.p_clean < 0.5]
        calls = self._answers("scan", suspicious, TOOL_CALL_PREFIX, self.max_call_tokens)
        for case, call in zip(suspicious, calls, strict=True):
            case.scan_text = call
            try:
                case.windows = parse_tool_call(
                    said(call), case.duration_seconds, self.judge.family.call_format
                )
            except AnswerError as error:
                case.error = str(error)
        note_seconds(cases, "scan", began)

    def _concentrate(self, cases: Sequence[Case]) -> None:
        """Turn 2: the verdict after a second look at the windows."""
        began = time.perf_counter()
        settings = self.judge.settings
        for case in cases:
            case.inspect_frames = inspect_indices(
                case.windows, len(case.frames), case.fps, settings.inspect
            )
            shown = show_frames(
                self.judge, case.frames, case.inspect_frames, settings.inspect.pixels
            )
            case.inspect_size = (shown.shape[-2], shown.shape[-1])
            times = frame_times(case.inspect_frames, case.fps)
            case.conversation += (
                Message("assistant", (case.scan_text,)),
                inspect_message(shown, times, settings.wording, self.judge.family.box_units),
            )
        prefixes = [VERDICT_PREFIX] * len(cases)
        if self.mode == "full":
            texts = self._answers("inspect", cases, FINDINGS_PREFIX, self.max_findings_tokens)
            prefixes = [self._read_findings(*one) for one in zip(cases, texts, strict=True)]
        else:
            for case in cases:
                case.findings = tuple(Finding(UNSPECIFIED, window) for window in case.windows)
        judged = [row for row, case in enumerate(cases) if case.error is None]
        kept = [cases[row] for row in judged]
        begun = [prefixes[row] for row in judged]
        for case, p_clean in zip(kept, self._chances("inspect", kept, VERDICT_CHOICES, begun)):
            settle(case, p_clean)
        note_seconds(cases, "inspect", began)

    def _read_findings(self, case: Case, text: str) -> str:
        """Take over what the judge wrote; returns how its answer begins, up to the verdict."""
        case.judge_text = text
        line = text.strip().partition("\n")[0]
        try:
            case.findings = parse_findings(
                said(text) and line,
                case.duration_seconds,
                box_reader=self.judge.family.box_reader(*case.inspect_size),
            )
        except AnswerError as error:
            case.error = str(error)
        return f"{line}\n{VERDICT_PREFIX}"

    def _chances(
        self,
        stage: str,
        cases: Sequence[Case],
        choices: Sequence[str],
        prefix: str | Sequence[str] = "",
    ) -> list[float]:
        """P(first choice) for each case."""
        with counting_tokens(cases, stage):
            log_probs = self.judge.choice_log_probs(
                [case.conversation for case in cases],
                choices=choices,
                prefix=prefix,
                tools=self.judge.tools,
            )
        return self.judge.probabilities(log_probs)[:, 0].tolist()

    def _answers(
        self, stage: str, cases: Sequence[Case], prefix: str, max_new_tokens: int
    ) -> list[str]:
        """What the judge writes after `prefix` for each case."""
        with counting_tokens(cases, stage):
            return self.judge.generate(
                [case.conversation for case in cases],
                prefix=prefix,
                max_new_tokens=max_new_tokens,
                tools=self.judge.tools,
            )

    def _report(self, case: Case) -> AnomalyReport:
        """Count the case and freeze it."""
        with self._counting:
            self.num_judged += 1
            self.num_failed += case.error is not None
        if case.error is not None:
            logger.warning("a clip could not be judged: %s", case.error)
        score = None if case.error is not None else self.calibration.apply(case.p_clean)
        return freeze(case, self.judge, self.mode, self.settings, score)
