"""From a stage's settings to a judge that learns."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from cac_reward.frames import JudgeSettings
from cac_reward.judges.families import Family, find_family
from cac_reward.judges.loading import LoadOptions, find_files, load
from cac_reward.training.heads import HEADS, HEADS_FILE, ClassifierHeads, attach_heads
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
        FileNotFoundError, ValueError, ImportError: As `LocalJudge.from_pretrained` does, and if
            nothing of the loss can be learnt.
    """
    wanted = settings.model
    check_learnable(settings)
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
    if settings.trainer == "sft" and settings.loss.heads > 0:
        captions = settings.loss.caption_tokens if settings.loss.captions > 0 else 0
        heads = attach_heads(core, captions)
        heads.restore(files.folder)
        heads.requires_grad_(True)
    lora = None
    if wanted.lora is not None and not isinstance(model, PeftModel):
        lora = _lora_config(wanted.lora, wanted.learns)
    known = JudgeSettings.load(files.settings_folder)
    return Pupil(model, processor, family, settings.judge.over(known), heads, lora, files.judge_id)


def save_judge(model: Any, pupil: Pupil, folder: Path, state: dict[str, Tensor]) -> None:
    """Write a judge as `cac-reward score --judge FOLDER` loads it: weights or adapter, and more.

    A calibration of the judge it came from is not taken over: it is another judge now.

    Args:
        model: transformers' model, or peft's around it.
        pupil: what is kept beside the weights.
        folder: of nothing else, made anew.
        state: all weights of the model, whole, heads included.
    """
    judge, heads = split_heads(state)
    # Weights that two layers share come together once from whole models, twice from split ones.
    shared = getattr(model, "all_tied_weights_keys", None) or {}
    judge = {name: one for name, one in judge.items() if name not in shared}
    folder.mkdir(parents=True)
    # The reference that TRL keeps beside an adapter that goes on learning is no part of it.
    chosen = {"selected_adapters": ["default"]} if isinstance(model, PeftModel) else {}
    model.save_pretrained(folder, state_dict=judge, **chosen)
    pupil.processor.save_pretrained(folder)
    pupil.settings.save(folder)
    if pupil.heads is not None:
        save_heads(heads, folder)


def split_heads(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the judge, and those of the heads by their own names."""
    judge = {name: one for name, one in state.items() if HEADS not in name}
    heads = {name.partition(f"{HEADS}.")[2]: one for name, one in state.items() if HEADS in name}
    return judge, heads


def save_heads(state: dict[str, Tensor], folder: Path) -> None:
    """Write the heads' own file, as `ClassifierHeads.restore` reads it."""
    plain = {name: one.detach().float().cpu().contiguous() for name, one in state.items()}
    save_file(plain, folder / HEADS_FILE)


def check_learnable(settings: StageSettings) -> None:
    """Raises ValueError where nothing of the loss can be learnt by what learns."""
    if settings.model.learns != "heads":
        return
    loss = settings.loss
    if not loss.frames + loss.clip > 0:
        raise ValueError(
            "loss.frames or loss.clip must be above 0 where model.learns is 'heads', got 0 and 0"
        )
    if loss.words > 0:
        raise ValueError(
            f"loss.words must be 0 where model.learns is 'heads', got {loss.words}; no word can be "
            "learnt by weights that stand still"
        )


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
        exclude_modules=rf".*{HEADS}.*" if learns == "all" else rf".*(visual|{HEADS}).*",
        task_type="CAUSAL_LM",
    )


def _mirror_special_tokens(model: Any, tokenizer: Any) -> None:
    """Trainers read the padding token off the configuration."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
