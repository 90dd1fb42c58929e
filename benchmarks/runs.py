"""Runs of benchmarks: trained to their end from where they stand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffusion_rl.configuration import RunSettings
from diffusion_rl.launch import prepare, train
from diffusion_rl.progress import StepReport
from diffusion_rl.tracking import METRICS_FILE, read_metrics


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
