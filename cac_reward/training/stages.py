"""One stage from its settings to a judge on disk."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import set_seed

from cac_reward.training.asking import Asking
from cac_reward.training.cards import write_card
from cac_reward.training.checkpoints import (
    last_checkpoint,
    processes_of,
    remove_partial,
    seconds_of,
)
from cac_reward.training.clips import ClipStore
from cac_reward.training.curricula import JUDGE
from cac_reward.training.grpo import JudgeGRPOTrainer, count_questions
from cac_reward.training.lessons import LessonOptions, View
from cac_reward.training.measuring import HeldOut
from cac_reward.training.models import Pupil, load_pupil, save_judge
from cac_reward.training.processes import check_launcher, processes
from cac_reward.training.settings import StageSettings, to_tree
from cac_reward.training.sft import JudgeSFTTrainer
from cac_reward.training.source import LessonPlan, LessonSource
from cac_reward.training.stopping import StopRequest
from cac_reward.training.task_answers import KINDS
from cac_reward.whole_files import whole_file

logger = logging.getLogger(__name__)

SETTINGS_FILE = "stage.yaml"
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class StageResult:
    """What a stage came to."""

    output: Path
    updates: int
    measured: dict[str, float]
    """On the held-out clips, at the end; empty where there are none."""
    seconds: float
    """Of training, over all parts of a run that was stopped."""
    skipped: str | None
    """What to say of clips that could not be read."""

    @property
    def judge(self) -> Path:
        return self.output / JUDGE


def run_stage(stage: StageSettings) -> StageResult:
    """Train one stage, or go on where it stopped; a finished one is only read.

    All processes of a run must call it.

    Raises:
        FileNotFoundError, ValueError: If model, clips or settings do not fit.
        TrainingError: If too many clips cannot be read, or the loss is no number any more.
        KeyboardInterrupt: If it was asked to stop; the same call goes on.
    """
    output = Path(stage.output)
    done = _finished(output, stage)
    if done is not None:
        return done
    check_launcher(stage.optimizer.name)
    state = processes()
    if state.is_main_process:
        _claim(output, stage, state.num_processes)
    state.wait_for_everyone()
    set_seed(stage.seed)
    pupil = load_pupil(stage, "cpu" if not torch.cuda.is_available() else str(state.device))
    source = _source(stage, pupil, state.num_processes)
    start = last_checkpoint(output)
    with StopRequest() as stop:
        trainer = _trainer(stage, pupil, source, stop)
        trainer.began = time.monotonic() - (0.0 if start is None else seconds_of(start))
        if start is not None:
            trainer.skipped.restore(start, state.process_index)
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
        # A request may have come in the last update, too.
        if stop.agreed() or trainer.state.global_step < stage.updates:
            raise KeyboardInterrupt
        seconds = time.monotonic() - trainer.began
    measured = trainer.take_best()
    if measured is None:
        measured = trainer.evaluate()
    result = StageResult(
        output,
        int(trainer.state.global_step),
        {
            name.removeprefix("eval_"): value
            for name, value in measured.items()
            if name.startswith("eval_")
        },
        seconds,
        trainer.skipped.summary(),
    )
    # Sharded weights come together on the first process, with the others' help.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if state.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        _write_judge(result, stage, replace(pupil, model=model), weights, len(source.store))
    state.wait_for_everyone()
    # The next stage of a curriculum needs the memory.
    trainer.accelerator.free_memory()
    return result


def _source(stage: StageSettings, pupil: Pupil, processes: int) -> LessonSource:
    """The lessons of a stage, in their order."""
    options = LessonOptions.build(stage.options, written=stage.trainer == "sft")
    view = View(pupil.settings, pupil.family, _patch_factor(pupil.processor), tuple(stage.classes))
    update = stage.batch * stage.batches(processes) * processes
    grpo = stage.trainer == "grpo"
    count = count_questions(stage, processes) if grpo else stage.updates * update
    plan = LessonPlan(
        shares=stage.lessons,
        count=count,
        seed=stage.seed,
        update=1 if grpo else update,
        anomalous_share=stage.data.anomalous_share,
    )
    return LessonSource(
        ClipStore(stage.data.train, videos=stage.data.videos, split=stage.data.split),
        view,
        plan,
        options,
    )


def _trainer(stage: StageSettings, pupil: Pupil, source: LessonSource, stop: StopRequest) -> Any:
    data, held_out = stage.data, None
    if data.held_out:
        clips = ClipStore(data.held_out, videos=data.videos, split=data.held_out_split)
        held_out = measured_as(stage, clips)
    kind = JudgeSFTTrainer if stage.trainer == "sft" else JudgeGRPOTrainer
    return kind(stage, pupil, source, held_out, stop)


def measured_as(stage: StageSettings, store: ClipStore) -> HeldOut:
    """Held-out clips asked about in the ways that a stage teaches.

    Heads alone answer for themselves; tasks of one turn are asked as they are, and the two turns
    wherever any other lesson is taught.
    """
    taught = [kind for kind, share in stage.lessons.items() if share > 0]
    heads = stage.loss.words == 0 and stage.loss.clip > 0 and stage.trainer == "sft"
    # Prose is measured by a judge of its own: `evaluate --vau-eval`.
    tasks = tuple(kind for kind in KINDS if kind in taught and kind != "description")
    asking = None
    if tasks and not heads:
        asking = Asking(
            kinds=tasks,
            options=LessonOptions.build(stage.options, written=stage.trainer == "sft"),
            classes=tuple(stage.classes) if "classification" in tasks else (),
            max_new_tokens=stage.rollout.max_answer_tokens,
        )
    return HeldOut(
        store,
        stage.evaluation.clips,
        stage.evaluation.batch,
        turns=not heads and any(kind not in KINDS for kind in taught),
        asking=asking,
        heads=heads,
    )


def _patch_factor(processor: Any) -> int:
    return int(processor.image_processor.patch_size * processor.image_processor.merge_size)


def _claim(output: Path, stage: StageSettings, processes: int) -> None:
    """Note the settings, or refuse to go on with others than the run began with."""
    output.mkdir(parents=True, exist_ok=True)
    for one in remove_partial(output):
        logger.warning("%s was cut off while it was written; it is not taken", one)
    file = output / SETTINGS_FILE
    text = OmegaConf.to_yaml(OmegaConf.create(to_tree(stage)))
    start = last_checkpoint(output)
    if start is not None and processes_of(start) != processes:
        raise ValueError(
            f"processes must be {processes_of(start)}, as {output} began with, got {processes}; "
            f"they share the lessons out. Launch as many, or begin another output with "
            f"model.path={start}"
        )
    if file.is_file() and start is not None:
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


def _write_judge(
    result: StageResult, stage: StageSettings, pupil: Pupil, weights: Any, num_clips: int
) -> None:
    """The judge's folder, there whole or not at all, and after it the result."""
    partial = result.judge.with_name(f"{JUDGE}.partial")
    for one in (partial, result.judge):
        if one.is_dir():
            shutil.rmtree(one)
    save_judge(pupil.model, pupil, partial, weights)
    write_card(partial, stage, result.measured, result.updates, num_clips)
    partial.rename(result.judge)
    _write_result(result)


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
