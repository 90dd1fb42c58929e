"""Judges that answer from the mean colour of a video, for runs of the demo in seconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cac_reward.report import AnomalyReport, Box, Finding, TimeWindow

WHY = "it vanishes <b>behind</b> nothing"


class StandInJudge:
    """Red videos are clean; in full mode the others carry a finding with a box.

    Args:
        mode: as CaCScorer's.
        rubbish: leaves every video unjudged.
    """

    def __init__(self, mode: str = "full", rubbish: bool = False) -> None:
        self.mode, self.rubbish = mode, rubbish

    def __call__(self, videos: Tensor, prompts: Sequence[str], *, fps: float) -> dict:
        red = videos[:, :, 0].mean((1, 2, 3)) - videos[:, :, 2].mean((1, 2, 3))
        score = torch.full_like(red, torch.nan) if self.rubbish else torch.sigmoid(40 * red)
        return {"score": score, "reports": [self._report(s, videos, fps) for s in score.tolist()]}

    def _report(self, score: float, videos: Tensor, fps: float) -> AnomalyReport:
        window, findings = TimeWindow(1 / fps, 3 / fps), ()
        if self.mode == "full" and score < 0.5:
            box = Box(1 / fps, 0.1, 0.1, 0.6, 0.6)
            findings = (Finding("vanish", window, (box,), 2, WHY),)
        return AnomalyReport(
            score=None if self.rubbish else score,
            error="rubbish" if self.rubbish else None,
            judge_id="stand-in",
            fps=fps,
            num_frames=videos.shape[1],
            findings=findings,
            windows=(window,) if findings else (),
            mode=self.mode,
        )


class StandInAlignment:
    """P(yes) grows with green."""

    def __call__(self, videos: Tensor, prompts: Sequence[str], *, fps: float) -> Tensor:
        return torch.sigmoid(4 * videos[:, :, 1].mean((1, 2, 3)))
