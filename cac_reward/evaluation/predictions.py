"""What was answered on one clip, here or elsewhere, as far as measures need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cac_reward.evaluation.grounding import raw_boxes
from cac_reward.records import ClipRecord
from cac_reward.report import VERDICTS, AnomalyReport, Finding


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """An answer; what was not asked or not said is None and takes part in no measure."""

    judge: str | None = None
    """Who answered, with the mode or task; None where the file could not be read."""
    p_clean: float | None = None
    """P(clean) in [0, 1]; exactly 0 or 1 where a bare verdict was given."""
    failure: str | None = None
    """Why there is no usable answer to something that was asked."""
    located: bool = False
    """Whether it was asked where, and `findings` are the answer; none of them counts as none."""
    boxes_asked: bool = True
    """Whether it was asked for boxes too, where it was asked where at all."""
    types_asked: bool = True
    """Whether it was asked what the findings are, where it was asked where at all."""
    findings: tuple[Finding, ...] = ()
    fps: float | None = None
    """Frames per second of the clip as it was judged."""
    num_frames: int | None = None
    """Frames of the clip as it was judged."""
    category: str | None = None
    """Class of the clip, in the data set's words."""
    option: str | None = None
    """Answer to the clip's question."""
    text: str | None = None
    """What it says of the clip in prose."""
    boxes_written: int = 0
    boxes_invalid: int = 0
    windows_unusable: int = 0
    """Findings left out for a window that is none."""
    seconds: float | None = None
    tokens: Mapping[str, int] | None = None
    """As in `AnomalyReport.tokens`."""

    @property
    def verdict(self) -> str | None:
        """'clean' from P(clean) 0.5 on, as in `AnomalyReport.verdict`."""
        return None if self.p_clean is None else VERDICTS[self.p_clean < 0.5]

    @classmethod
    def from_record(cls, record: ClipRecord) -> Prediction:
        """Take what `cac-reward score` wrote of a clip."""
        report = record.report
        if report is None:
            return cls(failure=record.error)
        written, invalid = raw_boxes(report)
        return cls(
            judge=f"{report.judge_id} ({report.mode})",
            p_clean=report.score,
            failure=report.error,
            # A verdict alone says nothing of places, right or wrong.
            located=report.score is not None and report.mode != "fast",
            findings=report.findings,
            fps=report.fps,
            num_frames=report.num_frames,
            text=report_text(report),
            boxes_written=written,
            boxes_invalid=invalid,
            seconds=sum(report.timings.values()) if report.timings else None,
            tokens=report.tokens,
        )


def report_text(report: AnomalyReport) -> str | None:
    """A report in words: its verdict, and each finding with time and reason; None without one."""
    if report.verdict is None:
        return None
    lines = [f"Verdict: {report.verdict}."]
    for one in report.findings:
        start, end = one.window.to_json()
        lines.append(f"From {start:.2f} s to {end:.2f} s: {one.type}. {one.why}".rstrip())
    return "\n".join(lines)
