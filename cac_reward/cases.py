"""One clip on its way through the judge's turns.

Axes: F frames, H height, W width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from cac_reward.answers import AnswerError
from cac_reward.judges.base import AbstractJudge, NoAnswer
from cac_reward.judges.tokens import metering
from cac_reward.questions import Message
from cac_reward.report import AnomalyReport, Finding, TimeWindow


@dataclass(eq=False)
class Case:
    """What is known of a clip so far."""

    frames: Tensor
    """[F 3 H W] uint8, or float in [0, 1]."""
    fps: float
    prompt: str
    conversation: tuple[Message, ...] = ()
    scan_frames: Sequence[int] = ()
    inspect_frames: Sequence[int] = ()
    inspect_size: tuple[int, int] = (1, 1)
    """Height and width of the frames as turn 2 shows them."""
    windows: tuple[TimeWindow, ...] = ()
    findings: tuple[Finding, ...] = ()
    scan_text: str = ""
    judge_text: str | None = None
    p_clean: float = math.nan
    error: str | None = None
    timings: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] | None = field(default_factory=dict)
    """Read and written by stage; None once a part is not known."""

    @property
    def duration_seconds(self) -> float:
        return len(self.frames) / self.fps


def said(text: str) -> str:
    """The text, unless the judge gave none."""
    if isinstance(text, NoAnswer):
        raise AnswerError(f"the judge gave no answer: {text.reason}")
    return text


def settle(case: Case, p_clean: float) -> None:
    """Take over a probability; the judge may have given none."""
    case.p_clean = p_clean
    if math.isnan(p_clean):
        case.error = "the judge gave no probabilities; its log says why"


def note_seconds(cases: Sequence[Case], stage: str, began: float) -> None:
    """Share the time of a stage evenly among the clips that went through it."""
    for case in cases:
        case.timings[stage] = (time.perf_counter() - began) / len(cases)


@contextmanager
def counting_tokens(cases: Sequence[Case], stage: str) -> Iterator[None]:
    """Note for each case what the one call to the judge in this context costs.

    A call that nobody counted makes the tokens of its cases unknown for good.
    """
    with metering(len(cases)) as meter:
        yield
    for row, case in enumerate(cases):
        count = meter.of(row)
        if count is None:
            case.tokens = None
        elif case.tokens is not None:
            for name, more in (("read", count.read), ("written", count.written)):
                key = f"{stage}.{name}"
                case.tokens[key] = case.tokens.get(key, 0) + more


def freeze(
    case: Case,
    judge: AbstractJudge,
    mode: str,
    settings: Mapping[str, object],
    score: float | None,
) -> AnomalyReport:
    """All that is known of a case, as its report."""
    return AnomalyReport(
        score=score,
        judge_id=judge.name,
        revision=judge.revision,
        decoder=judge.decoder,
        attention=judge.attention,
        fps=case.fps,
        num_frames=len(case.frames),
        findings=case.findings,
        windows=case.windows,
        scan_frames=tuple(case.scan_frames),
        inspect_frames=tuple(case.inspect_frames),
        scan_text=case.scan_text,
        judge_text=case.judge_text,
        settings=settings,
        prompt=case.prompt,
        mode=mode,
        timings=case.timings,
        tokens=case.tokens,
        note=judge.domain_note,
        error=case.error,
    )
