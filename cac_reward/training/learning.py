"""What both trainers share: optimiser, checkpoints, skipped clips, measuring, and when to stop."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback

from cac_reward.training.checkpoints import keep_latest, mark_whole
from cac_reward.training.clips import Skipped
from cac_reward.training.measuring import CHOOSING, HeldOut, check_choosing
from cac_reward.training.models import Pupil, save_heads, split_heads
from cac_reward.training.optimizers import MuonWithAdamW, split_parameters
from cac_reward.training.processes import processes
from cac_reward.training.settings import StageSettings
from cac_reward.training.stopping import StopRequest
from cac_reward.whole_files import whole_file

logger = logging.getLogger(__name__)

LEAST_CLIPS_READ = 50
"""Before a process has read so many clips, no share of unreadable ones but 0 stops a run."""


COUNTS_FILE = "clips_{}.json"
"""In a checkpoint: how many clips a process has read and skipped."""


class TrainingError(RuntimeError):
    """What ends a run for a reason that its user can mend."""


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
        self._recall()
        if self.file.is_file() and not self.file.read_bytes().endswith(b"\n"):
            with self.file.open("a", encoding="utf-8") as opened:
                opened.write("\n")

    def _recall(self) -> None:
        """What other parts of the run, and its other processes, wrote."""
        if self.file.is_file():
            for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # A kill cut it off; its clip is met again.
                self.names[entry["clip"]] = entry["reason"]

    def save(self, checkpoint: Path, process: int) -> None:
        """Keep a process's counts in a checkpoint."""
        with whole_file(checkpoint / COUNTS_FILE.format(process)) as opened:
            json.dump({"read": self.read, "skipped": self.skipped}, opened)

    def restore(self, checkpoint: Path, process: int) -> None:
        """Count on from a checkpoint; from 0 where it is older than these counts."""
        file = checkpoint / COUNTS_FILE.format(process)
        if file.is_file():
            counts = json.loads(file.read_text(encoding="utf-8"))
            self.read, self.skipped = counts["read"], counts["skipped"]

    def count(self, read: int, skipped: Iterable[Skipped]) -> None:
        """Take note of a batch.

        Raises:
            TrainingError: If too many clips could not be read.
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
        enough = tried >= LEAST_CLIPS_READ or not self.limit
        if enough and self.skipped > self.limit * tried:
            name, reason = next(reversed(self.names.items()))
            raise TrainingError(
                f"data.max_skipped_share must not be passed, it is {self.limit:g}, got "
                f"{self.skipped} unreadable of {tried} clips, last {name}: {reason}; all are in "
                f"{self.file}. Mend or remove them, or raise the limit, and run the command again"
            )

    def summary(self) -> str | None:
        """What to say at the end; None where every clip could be read."""
        self._recall()
        if not self.names:
            return None
        first = "\n".join(f"  {name}: {reason}" for name, reason in list(self.names.items())[:20])
        return f"{len(self.names)} clips could not be read ({self.file}):\n{first}"


class Pace(TrainerCallback):
    """Saves with every measurement, and when the run is asked to stop; forgets a stale best.

    Args:
        stop: who asks.
        every: updates to a set of answers; in between nothing is saved.
    """

    def __init__(self, stop: StopRequest, every: int = 1) -> None:
        self.stop = stop
        self.every = every

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """A run that goes on by another measure does not know how good its best was by that."""
        measured = _measured(state, args.metric_for_best_model) or {}
        if measured.get(args.metric_for_best_model) != state.best_metric:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """A set of answers is used up before a stop: a checkpoint does not hold it."""
        if state.global_step % self.every == 0 and self.stop.agreed():
            control.should_save = control.should_training_stop = True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """The best of the measured judges can only be kept where each is on disk."""
        control.should_save = True
        return control


def _measured(state: Any, name: str | None) -> dict[str, float] | None:
    """What was measured of the best judge, if that by which it is chosen was."""
    lines = (line for line in state.log_history if line["step"] == state.best_global_step)
    best = next((line for line in lines if name in line), None)
    if best is None:
        return None
    return {name: value for name, value in best.items() if name.startswith("eval_")}


class LearningMixin:
    """For subclasses of TRL's trainers; the attributes are set before their `__init__` runs."""

    stage: StageSettings
    pupil: Pupil
    skipped: SkippedClips
    held_out: HeldOut | None
    stop: StopRequest
    began: float
    """time.monotonic() at which it would have begun, had it never been stopped."""
    # Of transformers' trainer.
    model: Any
    args: Any
    state: Any
    control: Any
    accelerator: Any
    optimizer: Any
    callback_handler: Any

    def create_optimizer(self, *arguments: Any, **more: Any) -> torch.optim.Optimizer:
        """Muon where it is asked for; transformers' choice otherwise."""
        if self.stage.optimizer.name != "muon" or self.optimizer is not None:
            return super().create_optimizer(*arguments, **more)  # type: ignore[misc]
        matrices, others = split_parameters(self.model)
        settings = self.stage.optimizer
        self.optimizer = MuonWithAdamW(
            matrices,
            others,
            muon_rate=settings.muon_rate,
            adamw_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        return self.optimizer

    def training_step(self, *arguments: Any, **more: Any) -> Tensor:
        """One batch; a loss that is no number ends the run before it reaches the weights."""
        loss: Tensor = super().training_step(*arguments, **more)  # type: ignore[misc]
        self._check_finite("loss", float(loss))
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[misc]
        if norm is not None:  # DeepSpeed clips by itself.
            self._check_finite("gradient norm", float(norm))
        return norm

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"{name} must be finite, got {value} in update {self.state.global_step + 1}; no "
                "weight was changed by it. Lower optimizer.learning_rate, raise optimizer.warmup, "
                "or take model.dtype float32 (bfloat16 rather than float16), and go on from a "
                f"checkpoint in {self.args.output_dir} as model.path of another output"
            )

    def create_model_card(self, *arguments: Any, **more: Any) -> None:
        """None of TRL's: ours is written beside the finished judge."""

    def _save_checkpoint(self, *arguments: Any, **more: Any) -> None:
        super()._save_checkpoint(*arguments, **more)  # type: ignore[misc]
        output, updates = Path(self.args.output_dir), self.state.global_step
        checkpoint = output / f"checkpoint-{updates}"
        self.skipped.save(checkpoint, self.accelerator.process_index)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_whole(
                checkpoint,
                updates=updates,
                processes=self.accelerator.num_processes,
                seconds=time.monotonic() - self.began,
            )
            keep_latest(output, self.stage.keep, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A checkpoint is a judge: it loads like the final one, and carries the heads."""
        if not self.args.should_save:
            return
        state = self.model.state_dict() if state_dict is None else state_dict
        judge, heads = split_heads(state)
        super()._save(output_dir, judge)  # type: ignore[misc]
        folder = Path(output_dir or self.args.output_dir)
        self.pupil.processor.save_pretrained(folder)
        self.pupil.settings.save(folder)
        if self.pupil.heads is not None:
            save_heads(heads, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        self._restore_heads(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        self._restore_heads(self.state.best_model_checkpoint)

    def _restore_heads(self, folder: str) -> None:
        """Sharded weights of FSDP and DeepSpeed hold the heads among the others."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # type: ignore[attr-defined]
        if self.pupil.heads is not None and not sharded:
            self.pupil.heads.restore(folder)

    def take_best(self) -> dict[str, float] | None:
        """Go back to the best judge that was measured; what was measured of it, None for none."""
        if self.state.best_model_checkpoint is None:
            return None
        measured = _measured(self.state, self.args.metric_for_best_model)
        if measured is not None:
            self._load_best_model()
        return measured

    def evaluate(self, *arguments: Any, **more: Any) -> dict[str, float]:
        """Judge the held-out clips as users will, and log what was measured."""
        if self.held_out is None:
            return {}
        # Sharded weights come together layer by layer, so that all processes must walk in step.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # type: ignore[attr-defined]
        model = self.accelerator.unwrap_model(self.model)
        with whole_beneath_adapter(model):
            measured = self.held_out.measure(model, self.pupil, spread=not sharded)
        metrics = {f"eval_{name}": value for name, value in measured.items()}
        # Not TRL's, which would put what it has gathered of training into this line.
        Trainer.log(self, metrics)  # type: ignore[arg-type]
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """What could not be measured, of a judge that gives no verdict yet, is never the best."""
        if self.args.metric_for_best_model not in metrics:
            if self.accelerator.is_main_process:
                known = [name for name in CHOOSING if f"eval_{name}" in metrics]
                logger.warning(
                    "evaluation.best %s was not measured after update %d, so this judge is not the "
                    "best; measured: %s",
                    self.stage.evaluation.best,
                    self.state.global_step,
                    ", ".join(known) or "nothing",
                )
            return False
        return bool(super()._determine_best_metric(metrics, trial))  # type: ignore[misc]


@contextmanager
def whole_beneath_adapter(model: Any) -> Iterator[None]:
    """Let the model beneath an adapter be asked by itself where FSDP shares out their weights.

    What is in no layer of its own then comes together when the adapter's model is passed, which
    stands around it and is not asked.
    """
    split = isinstance(model, PeftModel) and isinstance(model, FSDPModule)
    if split:
        model.unshard()
    try:
        yield
    finally:
        if split:
            model.reshard()


def training_arguments(stage: StageSettings, has_held_out: bool) -> dict[str, Any]:
    """Arguments that every trainer of transformers knows, from a stage's settings.

    Raises:
        ValueError: If the measure that chooses the best judge is none of those known.
    """
    settings = stage.optimizer
    measures = has_held_out and stage.evaluation.every > 0
    check_choosing(stage.evaluation.best)
    optim = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit", "muon": "adamw_torch"}
    return {
        "output_dir": stage.output,
        "max_steps": stage.updates,
        "per_device_train_batch_size": stage.batch,
        "gradient_accumulation_steps": stage.batches(processes().num_processes),
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
        "remove_unused_columns": False,
        # Nothing is ever unused; DDP's search does not see the heads and would call them so.
        "ddp_find_unused_parameters": False,
        "save_strategy": "steps",
        "save_steps": stage.save_every,
        # `keep_latest` deletes, after the newest is whole on every process.
        "save_total_limit": None,
        "eval_strategy": "steps" if measures else "no",
        "eval_steps": stage.evaluation.every or None,
        # transformers would allow it only where every measurement falls on a save; see `Pace`.
        "load_best_model_at_end": False,
        "metric_for_best_model": f"eval_{stage.evaluation.best}" if measures else None,
        "greater_is_better": True if measures else None,
        # A line of the log is a mean over its updates, and a run goes on behind a checkpoint.
        "logging_steps": 1 if stage.updates <= 100 else math.gcd(10, stage.save_every),
        # It would hide a loss that is no number behind a mean.
        "logging_nan_inf_filter": False,
        "report_to": list(stage.trackers) or "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "use_cpu": not torch.cuda.is_available(),
    }
