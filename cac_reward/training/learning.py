"""What both trainers share: the optimiser, the heads' file, skipped clips, and measuring."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from cac_reward.training.clips import Skipped
from cac_reward.training.measuring import HeldOut
from cac_reward.training.models import Pupil
from cac_reward.training.optimizers import MuonWithAdamW, split_parameters
from cac_reward.training.settings import StageSettings

LEAST_CLIPS_READ = 50
"""Before so many clips were read, no share of unreadable ones stops a run."""


class SkippedClips:
    """Counts clips that could not be read, keeps their names in a file, and stops at a limit.

    Args:
        file: lines of JSON; what an earlier part of the run wrote stays.
        limit: share of the clips read so far.
    """

    def __init__(self, file: Path, limit: float) -> None:
        self.file = file
        self.limit = limit
        self.read = 0
        self.skipped = 0
        self.names: dict[str, str] = {}
        if file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self.names[entry["clip"]] = entry["reason"]

    def count(self, read: int, skipped: Iterable[Skipped]) -> None:
        """Take note of a batch.

        Raises:
            RuntimeError: If too many clips could not be read.
        """
        self.read += read
        for one in skipped:
            self.skipped += 1
            if one.name not in self.names:
                self.names[one.name] = one.reason
                line = json.dumps({"clip": one.name, "reason": one.reason}, ensure_ascii=False)
                with self.file.open("a", encoding="utf-8") as opened:
                    opened.write(line + "\n")
        tried = self.read + self.skipped
        if tried >= LEAST_CLIPS_READ and self.skipped > self.limit * tried:
            name, reason = next(reversed(self.names.items()))
            raise RuntimeError(
                f"data.max_skipped_share must not be passed, it is {self.limit:g}, got "
                f"{self.skipped} unreadable of {tried} clips, last {name}: {reason}; all are in "
                f"{self.file}. Mend or remove them, or raise the limit, and run the command again"
            )

    def summary(self) -> str | None:
        """What to say at the end; None where every clip could be read."""
        if not self.names:
            return None
        first = "\n".join(f"  {name}: {reason}" for name, reason in list(self.names.items())[:20])
        return f"{len(self.names)} clips could not be read ({self.file}):\n{first}"


class LearningMixin:
    """For subclasses of TRL's trainers; the attributes are set before their `__init__` runs."""

    stage: StageSettings
    pupil: Pupil
    skipped: SkippedClips
    held_out: HeldOut | None

    def create_optimizer(self, *arguments: Any, **more: Any) -> torch.optim.Optimizer:
        """Muon where it is asked for; transformers' choice otherwise."""
        if self.stage.optimizer.name != "muon" or self.optimizer is not None:  # type: ignore[attr-defined, has-type]
            return super().create_optimizer(*arguments, **more)  # type: ignore[misc]
        matrices, others = split_parameters(self.model)  # type: ignore[attr-defined]
        settings = self.stage.optimizer
        optimizer = MuonWithAdamW(
            matrices,
            others,
            muon_rate=settings.muon_rate,
            adamw_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.optimizer = optimizer
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A checkpoint is a judge: it loads like the final one, and carries the heads."""
        super()._save(output_dir, _without_heads(state_dict, self.model))  # type: ignore[misc, attr-defined]
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[attr-defined]
        self.pupil.processor.save_pretrained(folder)
        self.pupil.settings.save(folder)
        if self.pupil.heads is not None:
            self.pupil.heads.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        if self.pupil.heads is not None:
            self.pupil.heads.restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        best = self.state.best_model_checkpoint  # type: ignore[attr-defined]
        if self.pupil.heads is not None and best is not None:
            self.pupil.heads.restore(best)

    def evaluate(self, *arguments: Any, **more: Any) -> dict[str, float]:
        """Judge the held-out clips as users will, and log what was measured."""
        if self.held_out is None:
            return {}
        model = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        measured = self.held_out.measure(model, self.pupil)
        metrics = {f"eval_{name}": value for name, value in measured.items()}
        self.log(metrics)  # type: ignore[attr-defined]
        self.control = self.callback_handler.on_evaluate(  # type: ignore[attr-defined]
            self.args,  # type: ignore[attr-defined]
            self.state,  # type: ignore[attr-defined]
            self.control,  # type: ignore[attr-defined, has-type]
            metrics,
        )
        return metrics


def _without_heads(state: Any, model: nn.Module) -> dict[str, Any]:
    """Weights of the judge alone; the heads have a file of their own."""
    state = model.state_dict() if state is None else state
    return {name: one for name, one in state.items() if "cac_heads" not in name}


def training_arguments(stage: StageSettings, has_held_out: bool) -> dict[str, Any]:
    """Arguments that every trainer of transformers knows, from a stage's settings."""
    settings = stage.optimizer
    measures = has_held_out and stage.evaluation.every > 0
    optim = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit", "muon": "adamw_torch"}
    return {
        "output_dir": stage.output,
        "max_steps": stage.updates,
        "per_device_train_batch_size": stage.batch,
        "gradient_accumulation_steps": stage.accumulation,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "warmup_steps": settings.warmup,
        "lr_scheduler_type": settings.schedule,
        "max_grad_norm": settings.max_grad_norm,
        "optim": optim[settings.name],
        "bf16": stage.bf16,
        "gradient_checkpointing": stage.model.gradient_checkpointing,
        "seed": stage.seed,
        "data_seed": stage.seed,
        "dataloader_num_workers": stage.data.workers,
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "save_steps": stage.save_every,
        "save_total_limit": stage.keep,
        "eval_strategy": "steps" if measures else "no",
        "eval_steps": stage.evaluation.every or None,
        "load_best_model_at_end": measures,
        "metric_for_best_model": f"eval_{stage.evaluation.best}" if measures else None,
        "greater_is_better": True if measures else None,
        "logging_steps": 1 if stage.updates <= 100 else 10,
        "report_to": list(stage.trackers) or "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "use_cpu": not torch.cuda.is_available(),
    }


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a run; None where there is none."""
    return get_last_checkpoint(os.fspath(folder)) if folder.is_dir() else None
