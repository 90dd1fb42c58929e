"""What a stage's YAML under configs/reward says, typed and checked to the last key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from cac_reward.frames import WORDINGS, InspectSettings, JudgeSettings, ScanSettings
from cac_reward.training import rules
from cac_reward.training.grpo_settings import GrpoSettings, RolloutSettings, check_rewards
from cac_reward.training.lesson_kinds import LESSONS
from cac_reward.training.lessons import LessonOptions
from cac_reward.training.rules import above_zero, at_least, check_shares, one_of, within

TRAINERS = ("sft", "grpo")
LEARNS = ("all", "language", "heads")
OPTIMIZERS = ("adamw", "adamw_8bit", "muon")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


@dataclass(kw_only=True)
class LoraSettings:
    """Low-rank adapters in place of the whole weights."""

    rank: int = 64
    """At least 1."""
    alpha: int = 128
    """Scale of the adapter is alpha / rank; above 0."""
    dropout: float = 0.0
    """In [0, 1)."""
    dora: bool = False
    """Learn magnitudes beside directions (DoRA)."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of layers, or 'all-linear' for every linear layer of what learns but the output."""

    def __post_init__(self) -> None:
        at_least("model.lora.rank", self.rank, 1)
        at_least("model.lora.alpha", self.alpha, 1)
        within("model.lora.dropout", self.dropout, 0, 1)
        if not self.targets:
            raise ValueError("model.lora.targets must name at least one layer, got none")


@dataclass(kw_only=True)
class ModelSettings:
    """Which judge is trained, and what of it learns."""

    path: str
    """Folder or hub id of a checkpoint or of a peft adapter, which then goes on learning."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    base: str | None = None
    """Of an adapter; by default the one that it names."""
    dtype: str = "bfloat16"
    """Of the weights: float32, bfloat16, float16. Adapters are float32 whatever this says."""
    attention: str = "sdpa"
    """As for judges: sdpa, eager, flash_attention_2, xformers."""
    pictures_together: bool = True
    """Vision attention runs once for all pictures of one size, not once for each; same numbers."""
    learns: str = "language"
    """'all' with the vision tower, 'language' without it, 'heads' for the classifier alone."""
    lora: LoraSettings | None = None
    """None trains whole weights."""
    gradient_checkpointing: bool = True
    """Trade a third of the speed for memory."""

    def __post_init__(self) -> None:
        one_of("model.learns", self.learns, LEARNS)
        if self.learns == "heads" and self.lora is not None:
            raise ValueError("model.lora must be null where model.learns is 'heads'")


@dataclass(kw_only=True)
class DataSettings:
    """Which clips it learns from, and on which it is measured."""

    train: list[str]
    """Annotation files (.jsonl, .parquet) or shards with their videos (.tar), at least one."""
    held_out: list[str] = field(default_factory=list)
    """Of the same kinds; empty measures nothing while training."""
    videos: str | None = None
    """Root of the clips' paths; by default each file's own folder."""
    split: str | None = None
    """Only clips of this split of `train`."""
    held_out_split: str | None = None
    """Only clips of this split of `held_out`."""
    anomalous_share: float | None = None
    """Of lessons, on anomalous clips; null takes clips as they come."""
    workers: int = 2
    """Processes that read videos; 0 reads in the training process."""
    max_skipped_share: float = 0.02
    """The run stops when more than this share of the clips read could not be, in [0, 1]: 0 at the
    first, any other not before `learning.LEAST_CLIPS_READ` clips were read on a process."""

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("data.train must name at least one file, got none")
        at_least("data.workers", self.workers, 0)
        if self.anomalous_share is not None:
            within("data.anomalous_share", self.anomalous_share, 0, 1, closed=True)
        within("data.max_skipped_share", self.max_skipped_share, 0, 1, closed=True)


@dataclass(kw_only=True)
class LossSettings:
    """Weights of the parts of the SFT loss; a weight of 0 leaves its part out."""

    words: float = 1.0
    """Cross-entropy of the judge's own tokens, a weighted mean over the batch."""
    decision_words: float = 1.0
    """Weight of a token that decides a verdict, where the others weigh 1."""
    frames: float = 0.0
    """Binary cross-entropy of a head that says of every frame whether a fault is on."""
    clip: float = 0.0
    """Binary cross-entropy of a head that says whether the clip is anomalous."""
    anomalous_weight: float = 1.0
    """Of anomalous frames and clips in the two heads' losses, against 1 for clean ones."""
    captions: float = 0.0
    """Cross-entropy of a head that says a frame's caption right behind it: what a judge knows
    there it can compare between frames."""
    caption_tokens: int = 32
    """How much of each caption, at least 1."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            at_least(f"loss.{name}", value, 0)
        if not self.words + self.heads > 0:
            raise ValueError("loss must have a part with a weight above 0, got none")
        at_least("loss.caption_tokens", self.caption_tokens, 1)

    @property
    def heads(self) -> float:
        """Of everything that heads are needed for."""
        return self.frames + self.clip + self.captions


@dataclass(kw_only=True)
class OptimizerSettings:
    """How weights move."""

    name: str = "adamw"
    """'adamw'; 'adamw_8bit' (bitsandbytes); 'muon' for matrices, with AdamW for all else."""
    learning_rate: float = 1e-5
    """Highest of the schedule; above 0."""
    muon_rate: float = 2e-3
    """Of muon's matrices; above 0."""
    weight_decay: float = 0.0
    """At least 0."""
    warmup: int = 0
    """Updates over which the rate rises, at least 0."""
    schedule: str = "cosine"
    """'cosine', 'linear', 'constant' or 'constant_with_warmup', by transformers' names."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to it; above 0."""

    def __post_init__(self) -> None:
        one_of("optimizer.name", self.name, OPTIMIZERS)
        for name in ("learning_rate", "muon_rate", "max_grad_norm"):
            above_zero(f"optimizer.{name}", getattr(self, name))
        for name in ("warmup", "weight_decay"):
            at_least(f"optimizer.{name}", getattr(self, name), 0)
        one_of("optimizer.schedule", self.schedule, SCHEDULES)
        if self.schedule == "constant" and self.warmup:
            raise ValueError(
                f"optimizer.warmup must be 0 for the schedule 'constant', got {self.warmup}; "
                "'constant_with_warmup' rises first"
            )


@dataclass(kw_only=True)
class EvaluationSettings:
    """How the judge is measured while it learns: by judging held-out clips as users will."""

    every: int = 0
    """Updates between measurements; 0 measures at the end only."""
    clips: int = 256
    """Most held-out clips, the first of the file; at least 1."""
    batch: int = 16
    """Clips judged together."""
    best: str = "clip.balanced_accuracy"
    """The measure by which the best checkpoint is chosen; higher is better."""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("clips", 1), ("batch", 1)):
            at_least(f"evaluation.{name}", getattr(self, name), least)


@dataclass(kw_only=True)
class JudgeView:
    """How the judge is asked, now and ever after; None keeps what stands beside the checkpoint."""

    wording: str | None = None
    """'brief' or 'full'."""
    domain: str | None = None
    """The only footage it will know."""
    scan: ScanSettings | None = None
    """What turn 1 sees."""
    inspect: InspectSettings | None = None
    """What turn 2 sees."""

    def __post_init__(self) -> None:
        if self.wording is not None:
            one_of("judge.wording", self.wording, WORDINGS)
        if self.domain is not None and not self.domain:
            raise ValueError(f"judge.domain must be a name or null, got {self.domain!r}")

    def over(self, known: JudgeSettings) -> JudgeSettings:
        """These settings, with those of a checkpoint where nothing is said."""
        return JudgeSettings(
            wording=self.wording or known.wording,
            domain=self.domain or known.domain,
            scan=self.scan or known.scan,
            inspect=self.inspect or known.inspect,
        )


@dataclass(kw_only=True)
class StageSettings:
    """One stage of training."""

    trainer: str = "sft"
    """'sft' learns from written answers, 'grpo' from rewards for its own."""
    model: ModelSettings
    """The judge."""
    judge: JudgeView = field(default_factory=JudgeView)
    """How it is asked."""
    data: DataSettings
    """The clips."""
    lessons: dict[str, float]
    """What is asked of a clip, as the names of `LESSONS` and their shares."""
    options: dict[str, float] = field(default_factory=dict)
    """Of lessons: shares of what they show; see `LessonOptions`."""
    classes: list[str] = field(default_factory=list)
    """Of the lessons 'classification': what a clip's category may be, at least two."""
    loss: LossSettings = field(default_factory=LossSettings)
    """Of 'sft'."""
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """Of 'grpo'."""
    grpo: GrpoSettings = field(default_factory=GrpoSettings)
    """Of 'grpo'."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Of 'grpo': names of `stage_rewards.REWARDS` and their weights."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """How weights move."""
    updates: int = 1000
    """Optimiser steps, at least 1."""
    batch: int = 1
    """Lessons, or answers, in memory at a time on each process."""
    accumulation: int = 1
    """Batches of each process to an update."""
    per_update: int | None = None
    """Lessons, or answers, of an update in all, on however many processes: `accumulation` then
    follows from it. Null takes batch * accumulation * processes."""
    bf16: bool = True
    """Compute in bfloat16 where it is safe (autocast)."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """Measuring while training."""
    save_every: int = 100
    """Updates between checkpoints, at least 1."""
    keep: int = 2
    """Latest checkpoints kept, beside the best; at least 1."""
    trackers: list[str] = field(default_factory=list)
    """tensorboard, wandb, trackio, ...: what transformers reports to."""
    seed: int = 0
    """Fixes lessons, their order, dropout and sampled answers; at least 0."""
    output: str
    """Folder of checkpoints, logs and the judge."""

    def __post_init__(self) -> None:
        one_of("trainer", self.trainer, TRAINERS)
        check_shares("lessons", self.lessons, LESSONS)
        LessonOptions.build(self.options, written=self.trainer == "sft")
        if self.lessons.get("classification") and len(set(self.classes)) < 2:
            raise ValueError(
                f"classes must be at least two for lessons.classification, got {self.classes}"
            )
        for name in ("updates", "batch", "accumulation", "save_every", "keep"):
            at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        if self.per_update is not None:
            at_least("per_update", self.per_update, 1)
            if self.accumulation != 1:
                raise ValueError(
                    f"accumulation must be left out where per_update is {self.per_update}, got "
                    f"{self.accumulation}; it follows from per_update, batch and the processes"
                )
        if not self.output.strip():
            raise ValueError(f"output must be the name of a folder, got {self.output!r}")
        if self.trainer == "grpo":
            check_rewards(self.lessons, self.options, self.rewards)
            if self.model.learns == "heads":
                raise ValueError("model.learns must be 'all' or 'language' for 'grpo', got 'heads'")
        elif self.rewards:
            raise ValueError("rewards must be left out for 'sft'; it learns from written answers")

    def batches(self, processes: int) -> int:
        """Batches of each process to an update.

        Raises:
            ValueError: If `per_update` cannot be shared out so.
        """
        if self.per_update is None:
            return self.accumulation
        if self.per_update % processes:
            fitting = max(n for n in range(1, processes) if self.per_update % n == 0)
            raise ValueError(
                f"per_update must be a multiple of the processes, got {self.per_update} on "
                f"{processes}; launch {fitting}, or set per_update="
                f"{-(-self.per_update // processes) * processes} (and the rate that goes with it)"
            )
        share = self.per_update // processes
        if share % self.batch:
            fitting = max(n for n in range(1, self.batch) if share % n == 0)
            raise ValueError(
                f"per_update must be a multiple of batch * processes, got {self.per_update} with "
                f"{self.batch} * {processes}; set batch={fitting}"
            )
        return share // self.batch


def load_stage(path: str | Path, overrides: Sequence[str] = ()) -> StageSettings:
    """Read a stage's YAML and apply `key.path=value` overrides.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If something does not fit, with its key.
    """
    return build_stage(read_yaml(path), str(path), overrides)


def read_yaml(path: str | Path) -> Any:
    """A YAML file as OmegaConf's tree."""
    path = Path(path)
    if not path.is_file():
        hint = rules.near_name(path.name, [one.name for one in path.parent.glob("*.yaml")])
        raise FileNotFoundError(f"config must be an existing YAML file, got {path}{hint}")
    try:
        return OmegaConf.load(path)
    except (OmegaConfBaseException, OSError, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config must be readable YAML, got {path}: {error}") from error


def build_stage(tree: Any, name: str, overrides: Sequence[str] = ()) -> StageSettings:
    """A tree of plain values as settings."""
    for override in overrides:
        if "=" not in override.strip("="):
            raise ValueError(f"overrides must be key=value, got {override!r}")
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(StageSettings), tree, OmegaConf.from_dotlist(list(overrides))
        )
        settings = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise ValueError(f"{name}: {rules.unknown_key(error)}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{name}: {rules.wrong_value(error)}") from error
    except YAMLError as error:
        raise ValueError(f"overrides must have values in YAML, got {list(overrides)}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    assert isinstance(settings, StageSettings)
    return settings


def to_tree(settings: StageSettings) -> dict[str, Any]:
    """Settings as plain dictionaries and lists; `build_stage` reads them back."""
    return asdict(settings)
