"""One stage from its settings to a judge on disk, and a curriculum of stages."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from omegaconf import OmegaConf
from transformers import set_seed

from cac_reward.training.cards import write_card
from cac_reward.training.clips import ClipStore
from cac_reward.training.learning import last_checkpoint
from cac_reward.training.lessons import LessonOptions, View
from cac_reward.training.measuring import HeldOut
from cac_reward.training.models import load_pupil, save_judge
from cac_reward.training.settings import StageSettings, build_stage, read_yaml, to_tree
from cac_reward.training.sft import JudgeSFTTrainer
from cac_reward.training.source import LessonSource
from cac_reward.whole_files import whole_file

logger = logging.getLogger(__name__)

JUDGE = "judge"
"""Folder of the finished judge, in a stage's output."""
SETTINGS_FILE = "stage.yaml"
RESULT_FILE = "result.json"
PREVIOUS = "previous"
"""As `model.path` in a curriculum: the judge of the stage before."""


@dataclass(frozen=True)
class StageResult:
    """What a stage came to."""

    output: Path
    updates: int
    measured: dict[str, float]
    """On the held-out clips, at the end; empty where there are none."""
    seconds: float
    skipped: str | None
    """What to say of clips that could not be read."""

    @property
    def judge(self) -> Path:
        return self.output / JUDGE


def run_stage(stage: StageSettings) -> StageResult:
    """Train one stage, or go on where it stopped; a finished one is only read.

    Raises:
        FileNotFoundError, ValueError: If model, clips or settings do not fit.
        RuntimeError: If too many clips cannot be read.
    """
    output = Path(stage.output)
    done = _finished(output, stage)
    if done is not None:
        return done
    state = PartialState()
    if state.is_main_process:
        _claim(output, stage)
    state.wait_for_everyone()
    set_seed(stage.seed)
    pupil = load_pupil(stage, "cpu" if not torch.cuda.is_available() else str(state.device))
    options = LessonOptions.build(stage.options, written=stage.trainer == "sft")
    factor = _patch_factor(pupil.processor)
    view = View(pupil.settings, pupil.family, factor, tuple(stage.classes))
    store = ClipStore(stage.data.train, videos=stage.data.videos, split=stage.data.split)
    held_out = None
    if stage.data.held_out:
        clips = ClipStore(
            stage.data.held_out, videos=stage.data.videos, split=stage.data.held_out_split
        )
        held_out = HeldOut(clips, stage.evaluation.clips, stage.evaluation.batch)
    per_update = stage.batch * stage.accumulation * state.num_processes
    source = LessonSource(
        store,
        view,
        stage.lessons,
        options,
        count=stage.updates * per_update,
        seed=stage.seed,
        anomalous_share=stage.data.anomalous_share,
    )
    trainer = _trainer(stage, pupil, source, held_out)
    trained = trainer.train(resume_from_checkpoint=last_checkpoint(output))
    measured = trainer.evaluate()
    result = StageResult(
        output,
        int(trainer.state.global_step),
        {name.removeprefix("eval_"): value for name, value in measured.items()},
        float(trained.metrics["train_runtime"]),
        trainer.skipped.summary(),
    )
    if state.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        save_judge(model, replace(pupil, model=model), result.judge)
        write_card(result.judge, stage, result.measured, result.updates, len(store))
        _write_result(result)
    state.wait_for_everyone()
    return result


def _trainer(stage: StageSettings, pupil: Any, source: LessonSource, held_out: Any) -> Any:
    if stage.trainer == "sft":
        return JudgeSFTTrainer(stage, pupil, source, held_out)
    from cac_reward.training.grpo import JudgeGRPOTrainer

    return JudgeGRPOTrainer(stage, pupil, source, held_out)


def load_curriculum(path: str | Path, overrides: Sequence[str] = ()) -> list[StageSettings]:
    """The stages of a YAML: one, or those below `stages`, each a file or settings in place.

    A curriculum has `stages`, a list whose entries are `{config: FILE}` with settings of their own
    beside it, or whole settings; and `all`, settings that hold for every stage. `model.path:
    previous` takes the judge of the stage before. `output` of a stage is by default the
    curriculum's with the stage's number and name behind it.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If something does not fit, with its key.
    """
    path = Path(path)
    tree = read_yaml(path)
    if "stages" not in tree:
        return [build_stage(tree, str(path), overrides)]
    stages: list[StageSettings] = []
    shared = tree.get("all") or {}
    for number, entry in enumerate(tree.stages, 1):
        own = OmegaConf.create({k: v for k, v in entry.items() if k not in ("config", "name")})
        base = read_yaml(path.parent / entry.config) if "config" in entry else {}
        merged = OmegaConf.merge(base, shared, own)
        label = entry.get("name") or Path(str(entry.get("config", "stage"))).stem
        name = f"{path}: stage {number} ({label})"
        if "output" not in own:
            if "output" not in tree:
                raise ValueError(f"{path}: output must be given, got nothing")
            merged.output = f"{tree.output}/{number}_{label}"
        if OmegaConf.select(merged, "model.path") == PREVIOUS:
            if not stages:
                raise ValueError(f"{name}: model.path must be a judge for the first stage")
            merged.model.path = f"{stages[-1].output}/{JUDGE}"
        stages.append(build_stage(merged, name, overrides))
    if not stages:
        raise ValueError(f"{path}: stages must be at least one, got none")
    return stages


def _patch_factor(processor: Any) -> int:
    return int(processor.image_processor.patch_size * processor.image_processor.merge_size)


def _claim(output: Path, stage: StageSettings) -> None:
    """Note the settings, or refuse to go on with others than the run began with."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / SETTINGS_FILE
    text = OmegaConf.to_yaml(OmegaConf.create(to_tree(stage)))
    if file.is_file() and last_checkpoint(output) is not None:
        differing = _differences(OmegaConf.load(file), OmegaConf.create(to_tree(stage)))
        if differing:
            raise ValueError(
                f"settings must be those that {output} began with, got {'; '.join(differing)}; "
                "name another output, or take them back"
            )
    with whole_file(file) as opened:
        opened.write(text)


_FREE = ("save_every", "keep", "trackers", "data.workers", "data.max_skipped_share", "evaluation")
"""What may change between a run's parts without changing what it learns."""


def _differences(old: Any, new: Any) -> list[str]:
    before, after = _flat(old), _flat(new)
    return [
        f"{key} {after.get(key)!r} where it was {before.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(_FREE)
    ]


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(tree) if OmegaConf.is_config(tree) else tree
    if not isinstance(plain, dict):
        return {path: plain}
    found: dict[str, Any] = {}
    for key, value in plain.items():
        found |= _flat(value, f"{path}.{key!s}" if path else str(key))
    return found


def _finished(output: Path, stage: StageSettings) -> StageResult | None:
    file = output / RESULT_FILE
    if not file.is_file():
        return None
    differing = _differences(
        OmegaConf.load(output / SETTINGS_FILE), OmegaConf.create(to_tree(stage))
    )
    if differing:
        raise ValueError(
            f"output must be a new folder for other settings, got {output}, finished with "
            f"{'; '.join(differing)}"
        )
    record = json.loads(file.read_text(encoding="utf-8"))
    return StageResult(output, **record)


def _write_result(result: StageResult) -> None:
    record = {
        "updates": result.updates,
        "measured": result.measured,
        "seconds": result.seconds,
        "skipped": result.skipped,
    }
    with whole_file(result.output / RESULT_FILE) as opened:
        json.dump(record, opened, indent=1)
        opened.write("\n")
