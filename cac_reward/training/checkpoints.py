"""Which checkpoints of a run are whole, and how many are kept.

transformers writes a checkpoint file by file and, on several processes, by several of them. A mark
is put into it when all have finished; what has none was cut off by a kill and is not taken.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from cac_reward.whole_files import whole_file

MARK = "whole.json"
"""In a checkpoint that was written to its end: updates and seconds so far, and processes."""


def mark_whole(checkpoint: Path, *, updates: int, processes: int, seconds: float = 0.0) -> None:
    """Say that a checkpoint can be taken."""
    record = {"updates": updates, "processes": processes, "seconds": round(seconds, 3)}
    with whole_file(checkpoint / MARK) as opened:
        json.dump(record, opened)


def last_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a run; None where there is none."""
    whole = _whole(output)
    return whole[-1] if whole else None


def processes_of(checkpoint: Path) -> int:
    """How many processes wrote it."""
    return int(json.loads((checkpoint / MARK).read_text(encoding="utf-8"))["processes"])


def seconds_of(checkpoint: Path) -> float:
    """How long the run had trained by then; 0 in a checkpoint that does not say it."""
    return float(json.loads((checkpoint / MARK).read_text(encoding="utf-8")).get("seconds", 0.0))


def remove_partial(output: Path) -> list[Path]:
    """Delete checkpoints that were cut off; returns them."""
    partial = sorted(set(_checkpoints(output)) - set(_whole(output)))
    for one in partial:
        shutil.rmtree(one)
    return partial


def keep_latest(output: Path, count: int, best: str | None) -> None:
    """Delete all whole checkpoints but the latest and the best.

    Args:
        output: of the run.
        count: kept beside the best.
        best: its folder; None where nothing was measured.
    """
    others = [one for one in _whole(output) if best is None or one.name != Path(best).name]
    for one in others[: max(0, len(others) - count)]:
        # Its mark first, so that a kill in between leaves nothing that looks whole.
        (one / MARK).unlink()
        shutil.rmtree(one)


def _whole(output: Path) -> list[Path]:
    return [one for one in _checkpoints(output) if (one / MARK).is_file()]


def _checkpoints(output: Path) -> list[Path]:
    """In the order of their updates."""
    found = [one for one in output.glob("checkpoint-*") if re.fullmatch(r"\D+\d+", one.name)]
    return sorted(found, key=lambda one: int(one.name.rpartition("-")[2]))
