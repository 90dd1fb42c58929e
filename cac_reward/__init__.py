"""CaC: a vision-language judge that says where and when a generated video breaks.

Everything named in `__all__` is loaded on first use, so that `import cac_reward` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cac_reward.alignment import PromptAlignment
    from cac_reward.answers import AnswerError
    from cac_reward.frames import InspectSettings, JudgeSettings, ScanSettings
    from cac_reward.report import AnomalyReport, Box, Finding, TimeWindow
    from cac_reward.scorer import CaCScorer
    from cac_reward.video import Video

__version__ = "0.1.0"

_HOME = {
    "AnomalyReport": "report",
    "AnswerError": "answers",
    "Box": "report",
    "CaCScorer": "scorer",
    "Finding": "report",
    "InspectSettings": "frames",
    "JudgeSettings": "frames",
    "PromptAlignment": "alignment",
    "ScanSettings": "frames",
    "TimeWindow": "report",
    "Video": "video",
}

__all__ = [
    "AnomalyReport",
    "AnswerError",
    "Box",
    "CaCScorer",
    "Finding",
    "InspectSettings",
    "JudgeSettings",
    "PromptAlignment",
    "ScanSettings",
    "TimeWindow",
    "Video",
]


def __getattr__(name: str) -> object:
    """Import an exported name from its module when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'cac_reward' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cac_reward.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
