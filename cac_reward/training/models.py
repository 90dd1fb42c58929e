"""From a stage's settings to a judge that learns."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from cac_reward.calibration import FILE as CALIBRATION_FILE
from cac_reward.frames import JudgeSettings
from cac_reward.judges.families import Family, find_family
from cac_reward.judges.loading import LoadOptions, find_files, load
from cac_reward.training.heads import HEADS, ClassifierHeads, attach_heads
from cac_reward.training.pictures import attend_together
from cac_reward.training.settings import LoraSettings, ModelSettings, StageSettings


@dataclass(frozen=True, eq=False)
class Pupil:
    """A judge that is to learn."""

    model: Any
    """transformers' model, or peft's around it."""
    processor: Any
    """As it was loaded, and as it is saved."""
    family: Family
    settings: JudgeSettings
    """How it will be asked."""
    heads: ClassifierHeads | None
    """None where no part of the loss needs them."""
    lora: LoraConfig | None
    """Of an adapter that the trainer is to put on; None where there is one or is to be none."""
    name: str
    """Folder or hub id that it was loaded from."""

    @property
    def core(self) -> Any:
        """transformers' own model within any wrapping."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def training_processor(self) -> Any:
        """A copy whose pictures come as a judge is shown them, whoever calls it."""
        twin = copy.copy(self.processor)
        twin.image_processor = copy.deepcopy(self.processor.image_processor)
        for name, value in self.family.picture_options.items():
            setattr(twin.image_processor, name, value)
        return twin


def load_pupil(settings: StageSettings, device: str) -> Pupil:
    """Load a judge for a stage.

    Raises:
        FileNotFoundError, ValueError, ImportError: As `LocalJudge.from_pretrained` does.
    """
    wanted = settings.model
    options = LoadOptions(device=device, dtype=wanted.dtype, attention=wanted.attention)
    files = find_files(wanted.path, revision=wanted.revision, base=wanted.base)
    model, processor = load(files, options, trainable_adapter=True)
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    family = find_family(core.config.model_type)
    _choose_what_learns(model, core, wanted)
    if wanted.pictures_together:
        attend_together(core)
    _mirror_special_tokens(core, processor.tokenizer)
    heads = None
    if settings.trainer == "sft" and settings.loss.frames + settings.loss.clip > 0:
        heads = attach_heads(core)
        heads.restore(files.folder)
        heads.requires_grad_(True)
    lora = None
    if wanted.lora is not None and not isinstance(model, PeftModel):
        lora = _lora_config(wanted.lora, wanted.learns)
    known = JudgeSettings.load(files.settings_folder)
    return Pupil(model, processor, family, settings.judge.over(known), heads, lora, files.judge_id)


def save_judge(model: Any, pupil: Pupil, folder: Path) -> None:
    """Write a judge as `cac-reward score --judge FOLDER` loads it: weights or adapter, and more.

    A calibration of the judge it came from is not taken over: it is another judge now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CALIBRATION_FILE).unlink(missing_ok=True)
    state = {name: one for name, one in model.state_dict().items() if HEADS not in name}
    if isinstance(model, PeftModel):
        model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=state)
    pupil.processor.save_pretrained(folder)
    pupil.settings.save(folder)
    if pupil.heads is not None:
        pupil.heads.save(folder)


def _choose_what_learns(model: nn.Module, core: Any, settings: ModelSettings) -> None:
    """Freeze what does not learn; an adapter that was loaded learns in the place of its base."""
    adapted = isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        seen = settings.learns == "all" or "visual" not in name
        whole = not adapted or "lora_" in name
        parameter.requires_grad_(seen and whole and settings.learns != "heads")


def _lora_config(settings: LoraSettings, learns: str) -> LoraConfig:
    everything = settings.targets == ["all-linear"]
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_dora=settings.dora,
        target_modules="all-linear" if everything else list(settings.targets),
        exclude_modules=None if learns == "all" else r".*visual.*",
        task_type="CAUSAL_LM",
    )


def _mirror_special_tokens(model: Any, tokenizer: Any) -> None:
    """Trainers read the padding token off the configuration."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
