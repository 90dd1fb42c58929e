"""What judges made of the clips of a set, as files small enough to be kept in docs/results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cac_reward.whole_files import whole_file

COLUMNS = ("p_clean", "time_iou", "box_iou")
Verdicts = Mapping[str, np.ndarray]
"""Of one judge on one set: `anomalous` and COLUMNS, each [clips], and `seconds` of training and
judging [2]."""


@dataclass(frozen=True)
class Verdict:
    """What a judge made of one clip."""

    anomalous: bool
    p_clean: float
    time_iou: float
    box_iou: float


def write_verdicts(
    file: Path, verdicts: Sequence[Verdict], train_seconds: float, judge_seconds: float
) -> None:
    """As columns of clips, small enough to be kept with the tables; what is missing is null."""
    columns = {
        name: [
            None if math.isnan(value) else round(float(value), 6)
            for value in (getattr(verdict, name) for verdict in verdicts)
        ]
        for name in COLUMNS
    }
    record = {
        "train_seconds": round(train_seconds, 1),
        "judge_seconds": round(judge_seconds, 1),
        "anomalous": [int(verdict.anomalous) for verdict in verdicts],
        **columns,
    }
    with whole_file(file) as opened:
        json.dump(record, opened, separators=(",", ":"))


def read_verdicts(folders: Sequence[Path], variant: str, name: str) -> dict[int, Verdicts]:
    """By seed, what a variant made of a set; a seed of two folders is that of the first."""
    found: dict[int, Verdicts] = {}
    for folder in folders:
        for file in sorted(folder.glob(f"{variant}/seed_*/{name}.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            columns = {key: np.array(record[key], float) for key in ("anomalous", *COLUMNS)}
            columns["seconds"] = np.array([record["train_seconds"], record["judge_seconds"]])
            found.setdefault(int(file.parent.name.removeprefix("seed_")), columns)
    return found
