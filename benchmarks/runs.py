"""Runs of benchmarks: trained to their end from where they stand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cac_reward.whole_files import whole_file
from diffusion_rl.configuration import RunSettings
from diffusion_rl.launch import prepare, train
from diffusion_rl.progress import StepReport
from diffusion_rl.tracking import METRICS_FILE, read_metrics


def first_there(name: str, *folders: Path | None) -> Path | None:
    """The file of that name in the first of the folders that has it."""
    paths = [folder / name for folder in folders if folder is not None]
    return next((path for path in paths if path.is_file()), None)


def keep_curve(folder: Path, name: str, curve: Any) -> None:
    """Write a dataclass of numbers as `folder/name.json`, to be found when the run is gone."""
    numbers = {key: None if value != value else value for key, value in asdict(curve).items()}
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / f"{name}.json") as file:
        file.write(json.dumps(numbers) + "\n")


def kept_curve(folder: Path | None, name: str) -> Mapping[str, Any] | None:
    """What `keep_curve` wrote; None where there is none."""
    path = first_there(f"{name}.json", folder)
    if path is None:
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return {key: math.nan if value is None else value for key, value in found.items()}


def train_to_end(
    settings: RunSettings,
    line: Callable[[StepReport], str | None],
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Train what is missing of a run; one that is finished is not loaded.

    Args:
        settings: of the run.
        line: what to print of an update behind its folder and number; None prints nothing.
        enough: asked before the run and after each update, once its metrics are written; True
            ends the run there.
    """
    done = read_metrics(Path(settings.output) / METRICS_FILE)
    if enough() or (done and done[-1]["step"] >= settings.updates):
        return
    for report in train(prepare(settings)):
        said = line(report)
        if said is not None:
            print(f"{settings.output}: update {report.step}/{settings.updates}, {said}", flush=True)
        if enough():
            return
