"""One answer of GRPO on its way through the judge's turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from cac_reward.questions import Message
from cac_reward.report import TimeWindow
from cac_reward.training.lessons import ClipInView
from cac_reward.training.task_answers import Task

CUT_OFF = " (cut off)"
"""Behind a turn that did not end by itself; no form allows it."""


@dataclass(eq=False)
class Answering:
    """One answer on its way through the turns."""

    seen: ClipInView
    opening: tuple[Message, ...]
    task: Task | None
    """Of a single turn; None for the two turns."""
    prompt_ids: list[int]
    frames: list[Tensor]
    ids: list[int] = field(default_factory=list)
    """Of everything behind the prompt, the tool's turn included."""
    mask: list[int] = field(default_factory=list)
    """1 where the judge itself wrote."""
    log_probs: list[float] = field(default_factory=list)
    """Of what it wrote, by the engine that drew it; empty where the model itself did."""
    texts: list[str] = field(default_factory=list)
    windows: tuple[TimeWindow, ...] = ()

    def write(self, new: Sequence[int], log_probs: Sequence[float] | None, text: str) -> None:
        """Append a turn of its own."""
        self.ids += new
        self.mask += [1] * len(new)
        self.log_probs += log_probs or []
        self.texts.append(text)

    def read(self, new: Sequence[int], frames: Sequence[Tensor], *, by_engine: bool) -> None:
        """Append what the tool showed."""
        self.ids += new
        self.mask += [0] * len(new)
        self.log_probs += [0.0] * len(new) if by_engine else []
        self.frames += frames
