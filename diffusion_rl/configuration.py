"""A run's YAML to typed settings; whatever does not fit is refused with its full path."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from diffusion_rl.algorithms import ALGORITHMS, algorithm
from diffusion_rl.credit import CreditSettings
from diffusion_rl.finetune import FinetuneSettings, StepReport
from diffusion_rl.full_policies import FullSettings
from diffusion_rl.generators.families import FAMILIES, check_options
from diffusion_rl.generators.settings import ExecutionSettings
from diffusion_rl.guards import GuardSettings, default_guards
from diffusion_rl.held_out import EvaluationSettings
from diffusion_rl.lora import LoraSettings
from diffusion_rl.optimizers import OptimizerSettings
from diffusion_rl.prompt_sampling import PromptSamplingSettings
from diffusion_rl.prompts import PROMPT_COLUMN
from diffusion_rl.rewards import RewardSettings
from diffusion_rl.rollout import RolloutSettings
from diffusion_rl.row_kinds import AlgorithmSettings
from diffusion_rl.row_settings import SETTINGS, GrpoSettings
from diffusion_rl.samples import SampleSettings
from diffusion_rl.trends import TrendSettings
from diffusion_rl.whole_files import write_whole

CONFIG_FILE = "config.yaml"
"""The resolved settings in a run's folder."""
# Only recorded steps explore; elsewhere these would be read and do nothing.
ONLY_RECORDED = (
    "stochastic_steps",
    "eligible_steps",
    "noise_level",
    "outcome",
    "shared_noise",
    "steps_of",
)


@dataclass(frozen=True, kw_only=True)
class GeneratorSettings:
    """Which generator, and the shape of its videos."""

    path: str
    """A diffusers pipeline folder or a hub id."""
    family: str = "wan"
    """One of FAMILIES."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the family alone takes."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    num_frames: int
    """Frames of a video."""
    fps: float
    """Frames per second the model was trained at; above 0."""
    max_sequence_length: int = 512
    """Text tokens a prompt is padded or cut to, at least 1."""
    dtype: str = "float32"
    """float32, bfloat16 or, to draw videos only, float16; the adapter is always float32."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    local_path: str | None = None
    """A folder to load instead of asking the hub for `path`."""
    revision: str | None = None
    """Of the hub model."""
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)
    """What saves memory and time; all off."""
    prompt_cache: str | None = None
    """A folder in which prompt embeddings are kept over runs; None computes them in each."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(
                f"family must be one of {', '.join(FAMILIES)}, got {self.family}"
                f"{_near(self.family, FAMILIES)}"
            )
        check_options(self.family, self.options)
        if self.execution.offload is not None and self.device == "cpu":
            raise ValueError(
                "execution.offload must be left out with device=cpu, got parts "
                f"{', '.join(self.execution.offload.parts)}; there is nowhere else to wait"
            )
        if not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be above 0 and finite, got {self.fps}")
        if self.max_sequence_length < 1:
            raise ValueError(
                f"max_sequence_length must be at least 1, got {self.max_sequence_length}"
            )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything a YAML under configs/rl says."""

    generator: GeneratorSettings
    """What is fine-tuned."""
    lora: LoraSettings | None = None
    """What learns, unless `full` is given; without targets, the family's own are filled in."""
    full: FullSettings | None = None
    """Let the transformer's own weights learn instead of a LoRA; `{}` is all of them."""
    algorithm: AlgorithmSettings = field(default_factory=GrpoSettings)
    """A row of ALGORITHMS, by `name`, with that row's options."""
    credit: CreditSettings = field(default_factory=CreditSettings)
    """Where in a video its advantage goes."""
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """How videos are drawn while training."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """How the adapter moves."""
    rewards: tuple[RewardSettings, ...]
    """What is rewarded; at least one."""
    guards: tuple[GuardSettings, ...] | None = None
    """What must not get lost; without it `default_guards`, with an empty list nothing."""
    missing_limit: float = 0.5
    """Share of videos a reward, or all weighted ones together, may leave unjudged before the run
    stops, in [0, 1)."""
    staleness: int = 0
    """1 draws the next update's videos while rewards elsewhere judge this one's."""
    evaluation: EvaluationSettings | None = None
    """Rewards that measure and never train."""
    hacking_alarm: TrendSettings = field(default_factory=TrendSettings)
    """When the log warns that something falls while the reward rises."""
    prompts: str
    """A text file with one prompt a line, .jsonl, .parquet or a folder of datasets."""
    prompt_column: str = PROMPT_COLUMN
    """Key or column of the prompts where the file has such."""
    prompt_sampling: PromptSamplingSettings = field(default_factory=PromptSamplingSettings)
    """Which of them an update draws."""
    updates: int = 60
    """Length of the run, at least 1."""
    seed: int = 0
    """Fixes everything the loop draws; at least 0."""
    output: str
    """Folder of the results."""
    save_every: int = 10
    """Updates between checkpoints, at least 1."""
    keep: int = 2
    """Newest checkpoints that stay, at least 1."""
    best_by: str | None = None
    """A metric of the run (reward, rewards/NAME, ...); the checkpoint saved after the update where
    it was highest stays besides the newest."""
    trackers: tuple[str, ...] = ()
    """Also log to these trackers of accelerate: tensorboard, wandb, ..."""
    samples: SampleSettings | None = None
    """Videos to look at while the run goes on; None draws none."""

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("rewards must be at least one, got none")
        names = [reward.name for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"rewards must have different names, got {names}")
        if self.guards is None:
            object.__setattr__(self, "guards", default_guards(self.generator.num_frames))
        assert self.guards is not None
        watched = [guard.statistic for guard in self.guards]
        if len(set(watched)) != len(watched):
            raise ValueError(f"guards must watch different statistics, got {watched}")
        if self.staleness and all(reward.where == "here" for reward in self.rewards):
            raise ValueError(
                f"staleness must be 0 where every reward is asked here, got {self.staleness}; "
                "nothing would be judged meanwhile. Set where: process or http on one"
            )
        if self.save_every < 1:
            raise ValueError(f"save_every must be at least 1, got {self.save_every}")
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, got {self.keep}")
        if self.best_by is not None:
            self._check_metric(self.best_by)
        if self.full is None:
            lora = self.lora or LoraSettings()
            targets = lora.targets or FAMILIES[self.generator.family].lora_targets
            object.__setattr__(self, "lora", dataclasses.replace(lora, targets=targets))
        elif self.lora is not None:
            raise ValueError("full must be left out where lora is given, got both; one learns")
        offload = self.generator.execution.offload
        if self.full is not None and offload is not None and "transformer" in offload.parts:
            raise ValueError(
                "generator.execution.offload.parts must leave out the transformer where full is "
                f"given, got {', '.join(offload.parts)}; weights that learn stay on the device"
            )
        self.finetune_settings()

    @property
    def learner(self) -> LoraSettings | FullSettings:
        """What learns."""
        learner = self.full or self.lora
        assert learner is not None
        return learner

    def _check_metric(self, name: str) -> None:
        """Refuse a name that no report of this run has."""
        keys = {
            "rewards": [reward.name for reward in self.rewards],
            "guards": [guard.statistic for guard in self.guards or ()],
            "evaluation": [one.name for one in self.evaluation.rewards] if self.evaluation else [],
        }
        known = []
        for entry in dataclasses.fields(StepReport):
            known += [entry.name] if entry.type in ("int", "float") else []
            known += [f"{entry.name}/{key}" for key in keys.get(entry.name, ())]
        if name not in known:
            raise ValueError(f"best_by must be a metric of the run, got {name}{_near(name, known)}")

    def finetune_settings(self) -> FinetuneSettings:
        """The part that the loop reads."""
        names = [entry.name for entry in dataclasses.fields(FinetuneSettings)]
        return FinetuneSettings(**{name: getattr(self, name) for name in names})


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunSettings:
    """Read a YAML and apply `key.path=value` overrides, checked to the last key.

    Raises:
        FileNotFoundError: no such file.
        ValueError: anything that does not fit, with its path and the nearest valid name.
    """
    path = Path(path)
    if not path.is_file():
        near = _near(path.name, [other.name for other in path.parent.glob("*.yaml")])
        raise FileNotFoundError(f"config must be an existing YAML file, got {path}{near}")
    try:
        config = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config must be readable YAML, got {path}: {error}") from error
    for override in overrides:
        key, equals, value = override.partition("=")
        if not (key and equals):
            raise ValueError(f"overrides must be key=value, got {override!r}")
        try:
            OmegaConf.update(config, key, OmegaConf.from_dotlist([f"value={value}"]).value)
        except (OmegaConfBaseException, YAMLError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"overrides must fit {path}, got {override!r}: {error}") from error
    try:
        tree = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"config must hold values or references, got {path}: {error}") from error
    return build(tree)


def build(tree: Any) -> RunSettings:
    """Plain dictionaries and lists to settings."""
    algorithm_tree, rollout = (
        tree.get(name) if isinstance(tree, Mapping) else None for name in ("algorithm", "rollout")
    )
    if isinstance(algorithm_tree, Mapping) and isinstance(rollout, Mapping):
        row = str(algorithm_tree.get("name"))
        ignored = row in ALGORITHMS and ALGORITHMS[row].learning_steps != "recorded"
        for name in ONLY_RECORDED if ignored else ():
            if name in rollout:
                raise ValueError(
                    f"rollout.{name} must be left out with algorithm '{row}', got "
                    f"{rollout[name]}; it would be ignored"
                )
    if isinstance(tree, Mapping) and tree.get("full") is None and tree.get("lora", {}) is None:
        raise ValueError(
            "lora must be given where full is not, got neither; full: {} is all weights"
        )
    return _convert(RunSettings, tree, "")


def to_tree(settings: Any) -> dict[str, Any]:
    """Settings as plain dictionaries and lists, the inverse of `build`.

    What an algorithm would ignore is left out.
    """
    tree = _plain(dataclasses.asdict(settings))
    if algorithm(settings.algorithm.name).learning_steps != "recorded":
        for name in ONLY_RECORDED:
            tree["rollout"].pop(name)
    return tree


def save_config(settings: RunSettings, path: str | Path) -> None:
    """Write the resolved settings beside a run's results, in one step and where they differ."""
    path = Path(path)
    text = OmegaConf.to_yaml(OmegaConf.create(to_tree(settings)))
    if not (path.is_file() and path.read_bytes() == text.encode()):
        write_whole(path, text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _convert(kind: Any, value: Any, path: str) -> Any:
    """`value` as `kind`, or an error that opens with the path."""
    if kind is Any:
        return value
    if kind is AlgorithmSettings:
        return _convert(_row_of(value, path), value, path)
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, path)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        (kind,) = [one for one in arguments if one is not types.NoneType]
        return _convert(kind, value, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{path} must be a list, got {_show(value)}")
        return tuple(_convert(arguments[0], one, f"{path}[{i}]") for i, one in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{path} must be a mapping, got {_show(value)}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{path} must be {_TYPES[kind]}, got {_show(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} must be a finite number, got {value}")
    return value


_TYPES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _convert_dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path or 'config'} must be a mapping, got {_show(value)}")
    entries = {entry.name: entry for entry in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in entries:
            raise ValueError(
                f"{prefix}{key} must be a known key, got none of that name"
                f"{_near(str(key), entries) or '; known: ' + ', '.join(entries)}"
            )
    for name, entry in entries.items():
        required = entry.default is entry.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ValueError(f"{prefix}{name} must be given, got nothing")
    converted = {key: _convert(hints[key], one, f"{prefix}{key}") for key, one in value.items()}
    try:
        return kind(**converted)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def _row_of(value: Any, path: str) -> Any:
    """The options class of the row that `value` names."""
    name = value.get("name", "grpo") if isinstance(value, Mapping) else "grpo"
    if not isinstance(name, str):
        raise ValueError(f"{path}.name must be a text, got {_show(name)}")
    if name not in SETTINGS:
        raise ValueError(
            f"{path}.name must be one of {', '.join(SETTINGS)}, got {name}{_near(name, SETTINGS)}"
        )
    return SETTINGS[name]


def _show(value: Any) -> str:
    return f"{value!r:.80} ({type(value).__name__})"


def _near(name: str, known: Any) -> str:
    """The end of an error: the name that the writer may have meant."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
