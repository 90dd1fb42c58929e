"""Lines that `cac-reward answer` writes: what a judge answered to tasks of one turn, by clip."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cac_reward.data.lines import parse_record, read_lines
from cac_reward.evaluation.predictions import Prediction
from cac_reward.plain import read_record, read_string
from cac_reward.report import UNSPECIFIED, Finding, TimeWindow

PLAIN = ("judge", "p_clean", "failure", "located", "category", "option", "text")
MEASURED = ("fps", "num_frames", "seconds")


@dataclass(frozen=True)
class AnsweredClip:
    """One line."""

    path: str
    """The clip's name."""
    asked: Mapping[str, Any]
    """How: who was asked what; lines of other ways are not continued."""
    texts: Mapping[str, str]
    """The answers as they were written, by the kind of task."""
    prediction: Prediction

    def to_json(self) -> str:
        """The line, without its end."""
        own = self.prediction
        record = {
            "path": self.path,
            "asked": dict(self.asked),
            "answers": dict(self.texts),
            **{name: getattr(own, name) for name in (*PLAIN, *MEASURED)},
            "windows": [finding.window.to_json() for finding in own.findings],
        }
        return json.dumps(record, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, plain: object) -> AnsweredClip:
        """Read a line.

        Raises:
            ValueError: If it is none.
        """
        names = ("path", "asked", "answers", *PLAIN, *MEASURED, "windows")
        record = read_record("answer", plain, names)
        asked, answers = (read_record(name, record[name], None) for name in ("asked", "answers"))
        texts = {kind: read_string(f"answers.{kind}", text) for kind, text in answers.items()}
        if not isinstance(record["windows"], list):
            raise ValueError(f"windows must be a list, got {record['windows']!r}")
        findings = tuple(
            Finding(UNSPECIFIED, TimeWindow.from_json(window)) for window in record["windows"]
        )
        known: dict[str, Any] = {name: record[name] for name in (*PLAIN, *MEASURED)}
        chance = known["p_clean"]
        if chance is not None and not (isinstance(chance, int | float) and 0 <= chance <= 1):
            raise ValueError(f"p_clean must be in [0, 1] or null, got {chance!r}")
        prediction = Prediction(findings=findings, boxes_asked=False, types_asked=False, **known)
        path = read_string("path", record["path"])
        return cls(path, asked, texts, prediction)


def read_answered_clips(paths: Sequence[Path]) -> dict[str, AnsweredClip]:
    """Lines by the names of their clips.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line is something else, or a clip is answered twice.
    """
    found: dict[str, AnsweredClip] = {}
    for path in paths:
        for place, line in read_lines(path):
            try:
                one = AnsweredClip.from_json(parse_record(line))
                if one.path in found:
                    raise ValueError(f"path must be there once, got {one.path} again")
            except ValueError as error:
                raise ValueError(f"{path}: {place}: {error}") from error
            found[one.path] = one
    return found


def read_answered(paths: Sequence[Path]) -> dict[str, Prediction]:
    """Predictions by the names of their clips; raises as `read_answered_clips` does."""
    return {name: one.prediction for name, one in read_answered_clips(paths).items()}
