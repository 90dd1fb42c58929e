"""What an evaluation has measured so far, on disk: a stopped one goes on where it was.

A batch is one safetensors file, written in one step, in the folder `parts` of the results.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_rl.evaluation import Measured, measure_generator, prompt_batches
from diffusion_rl.reward_contract import Reward, RewardFunction, plain_report
from diffusion_rl.vbench import VBenchFolder

PARTS = "parts"
IDENTITY = "identity"


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """What is drawn and measured, the same for every side."""

    prompts: Sequence[str]
    """N texts; equal ones follow each other."""
    seeds: Sequence[int]
    """N seeds."""
    measures: Mapping[str, RewardFunction | Reward]
    """Name to a callable that honours the reward contract, or to a reward with its own way to be
    asked."""
    fps: float
    """Of the videos."""
    missing_limit: float = 0.5
    """Share of a batch, in [0, 1), that a measure may leave unjudged."""
    batch_size: int
    """Videos measured, and kept on disk, at once; more where one prompt alone has more."""
    keep: Collection[int]
    """Numbers of the videos that are kept with the results."""


class EvaluationParts:
    """The batches of one evaluation; those of another in the same folder are dropped.

    Args:
        folder: of the results.
        identity: everything that the values depend on, as JSON can hold it.

    Raises:
        ValueError: the results have a folder `parts` that no evaluation made.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder) / PARTS
        text = json.dumps(identity, sort_keys=True, default=str)
        self.identity = hashlib.sha256(text.encode()).hexdigest()
        noted = self.folder / IDENTITY
        if not (noted.is_file() and noted.read_text(encoding="utf-8") == self.identity):
            self._remove()
            self.folder.mkdir(parents=True)
            noted.write_text(self.identity, encoding="utf-8")

    def load(self, side: str, first: int) -> tuple[Measured, float] | None:
        """The batch of a side that starts with video `first`, and the seconds that it took.

        Its videos are those that were kept, in their order. None where there is none or where it
        is damaged.
        """
        path = self._path(side, first)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        except (SafetensorError, KeyError, ValueError):
            return None
        measured = Measured(
            prompts=tuple(about["prompts"]),
            seeds=tuple(about["seeds"]),
            values={name: tensors[f"values.{name}"] for name in about["values"]},
            reports=about["reports"],
            videos=tensors["videos"],
        )
        return measured, about["seconds"]

    def save(self, side: str, first: int, measured: Measured, seconds: float) -> None:
        """Keep a batch, its reports as JSON has them."""
        about = {
            "prompts": measured.prompts,
            "seeds": measured.seeds,
            "values": list(measured.values),
            "reports": {
                name: [plain_report(name, report) for report in reports]
                for name, reports in measured.reports.items()
            },
            "seconds": seconds,
        }
        tensors = {f"values.{name}": value for name, value in measured.values.items()}
        path = self._path(side, first)
        partial = path.with_suffix(".partial")
        save_file(
            tensors | {"videos": measured.videos.contiguous()},
            partial,
            metadata={"about": json.dumps(about)},
        )
        os.replace(partial, path)

    def close(self) -> None:
        """Remove all; the results are written."""
        self._remove()

    def measure(
        self,
        side: str,
        sample: Callable[[Sequence[str], Sequence[int]], Tensor],
        task: EvaluationTask,
        vbench: VBenchFolder | None = None,
    ) -> Iterator[tuple[Measured, float]]:
        """Yield a side's batches and the seconds each took, from disk where they are there.

        Args:
            side: name of the generator.
            sample: (prompts, seeds) -> videos [B F C H W] in [0, 1]; equal seeds, equal noise.
            task: what is drawn and measured.
            vbench: gets every video; batches whose files are not all there are drawn again.
        """
        for batch in prompt_batches(task.prompts, task.batch_size):
            prompts, seeds = task.prompts[batch], task.seeds[batch]
            known = self.load(side, batch.start)
            if known is None or (vbench is not None and not vbench.has(prompts)):
                started = time.monotonic()
                (whole,) = measure_generator(
                    sample,
                    task.measures,
                    prompts,
                    seeds,
                    fps=task.fps,
                    batch_size=len(prompts),
                    missing_limit=task.missing_limit,
                )
                if vbench is not None:
                    vbench.add(prompts, whole.videos.float() / 255, task.fps)
                kept = [n - batch.start for n in sorted(task.keep) if batch.start <= n < batch.stop]
                known = replace(whole, videos=whole.videos[kept]), time.monotonic() - started
                self.save(side, batch.start, *known)
            elif vbench is not None:
                vbench.add(prompts, None, task.fps)
            yield known

    def _remove(self) -> None:
        """Delete the folder, if an evaluation made it."""
        inside = list(self.folder.iterdir()) if self.folder.is_dir() else []
        if inside and self.folder / IDENTITY not in inside:
            raise ValueError(
                f"output must have no folder {PARTS} but that of an evaluation, got {self.folder} "
                f"without a file {IDENTITY} in it; move it away, or choose another output"
            )
        # The identity goes last, so that a folder of which only a part was deleted is known again.
        for path in inside:
            if path.is_file() and path.name != IDENTITY:
                path.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, side: str, first: int) -> Path:
        return self.folder / f"{side}-{first:06d}.safetensors"


def fingerprint(folder: str | Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a folder's weights and settings: it changes when they do."""
    folder = Path(folder)
    files = (path for end in ("safetensors", "json") for path in folder.rglob(f"*.{end}"))
    return sorted(
        (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
    )
