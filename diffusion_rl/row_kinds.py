"""The options that rows of one kind share, and how they are checked."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusion_rl.algorithms import algorithm
from diffusion_rl.losses import AWM_WEIGHTINGS
from diffusion_rl.surrogates import STEP_WEIGHTINGS
from diffusion_rl.transitions import TRANSITIONS, TransitionFunction, name_of

SETTINGS: dict[str, type[AlgorithmSettings]] = {}
"""The options that each row of ALGORITHMS takes; `row_settings` fills it in."""


@dataclass(frozen=True, kw_only=True)
class AlgorithmSettings(ABC):
    """What every row has."""

    name: str
    """The row."""
    kl_weight: float = 0.0
    """Weight of the divergence from the reference policy, at least 0; 0 does not compute it."""
    inner_steps: int = 1
    """Optimiser steps of an update, at least 1; rows that replay split their videos over them,
    the others see all videos in each, at fresh noise levels."""

    def __post_init__(self) -> None:
        if SETTINGS.get(self.name) is not type(self):
            raise ValueError(
                f"name must be the row that {type(self).__name__} belongs to, got {self.name}"
            )
        at_least("kl_weight", self.kl_weight, 0)
        at_least("inner_steps", self.inner_steps, 1)

    @property
    @abstractmethod
    def advantage_options(self) -> Mapping[str, Any]:
        """What the row's advantages take besides scores and groups."""

    @property
    @abstractmethod
    def loss_options(self) -> Mapping[str, Any]:
        """What the row's loss takes besides tensors."""


@dataclass(frozen=True, kw_only=True)
class GradedSettings(AlgorithmSettings):
    """Rows whose advantages say of every video how good it is."""

    advantage_clip: float = 5.0
    """Largest size of an advantage, above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above("advantage_clip", self.advantage_clip, 0)


@dataclass(frozen=True, kw_only=True)
class GroupSettings(GradedSettings):
    """Rows that compare a video with its group."""

    advantage_std: str = "group"
    """Advantages are divided by the spread of the `group`, of the whole `batch`, or by the
    `largest` spread of any group."""
    advantage_unbiased: bool = False
    """Whether a spread divides its squares by n - 1 instead of n."""
    advantage_rewards: str = "summed"
    """`summed` compares the weighted sum of the rewards; `separate` compares each of them (and
    what the guards take off, at weight 1) and sums the weighted advantages, as GDPO does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("advantage_std", self.advantage_std, ("group", "batch", "largest"))
        one_of("advantage_rewards", self.advantage_rewards, ("summed", "separate"))

    @property
    def advantage_options(self) -> Mapping[str, Any]:
        return {
            "std": self.advantage_std,
            "unbiased": self.advantage_unbiased,
            "clip": self.advantage_clip,
        }


@dataclass(frozen=True, kw_only=True)
class RecordedSettings(GradedSettings):
    """Rows that replay the steps that the rollout recorded."""

    transition: str | None = None
    """How the recorded steps are taken: a name of TRANSITIONS other than ode; None is the row's
    own. Rows that use the Gaussian's density refuse cps, which has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        row = algorithm(self.name)
        allowed = [name for name in TRANSITIONS if name != "ode"]
        if row.needs_density:
            allowed.remove("cps")
        if self.transition is not None:
            one_of("transition", self.transition, tuple(allowed))

    @property
    def transition_function(self) -> TransitionFunction:
        """The transition of the recorded steps."""
        own = algorithm(self.name).transition
        return own if self.transition is None else TRANSITIONS[self.transition]


@dataclass(frozen=True, kw_only=True)
class ClippedSettings(RecordedSettings):
    """Rows that stop a step whose ratio has left a range."""

    clip_range: float = 1e-4
    """Ratios below 1 - clip_range stop learning, in (0, 1]; far smaller than for text, since the
    log-probabilities are means over the latent's elements."""
    clip_range_high: float | None = None
    """Ratios above 1 + clip_range_high stop learning, above 0; None is clip_range."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.clip_range <= 1:
            raise ValueError(f"clip_range must be in (0, 1], got {self.clip_range}")
        if self.clip_range_high is not None:
            above("clip_range_high", self.clip_range_high, 0)

    @property
    def loss_options(self) -> Mapping[str, Any]:
        return {"clip_range": self.clip_range, "clip_range_high": self.clip_range_high}


@dataclass(frozen=True, kw_only=True)
class RatioSettings(ClippedSettings):
    """Those of them whose ratio is that of the likelihoods as they are."""

    step_weighting: str = "none"
    """What a step's loss is multiplied by: `none`, or a weight of `step_weights` by `longcat` or
    `flash`, for steps of a reverse SDE; the KL term is by its square."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("step_weighting", self.step_weighting, STEP_WEIGHTINGS)
        taken = name_of(self.transition_function)
        fitting = ["flow_sde", "flow_sde_cut"]
        if self.step_weighting == "flash":
            fitting += ["flow_sde_wan", "dance_sde"]
        if self.step_weighting != "none" and taken not in fitting:
            raise ValueError(
                f"step_weighting must be none with transition '{taken}', got "
                f"{self.step_weighting}; choose the transition {' or '.join(fitting)}"
            )

    @property
    def loss_options(self) -> Mapping[str, Any]:
        return {**super().loss_options, "step_weighting": self.step_weighting}


@dataclass(frozen=True, kw_only=True)
class NoisedSettings(AlgorithmSettings):
    """Rows that learn from noised videos."""

    noise_levels: int = 1
    """Noise levels at which an optimiser step sees each video, at least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("noise_levels", self.noise_levels, 1)


@dataclass(frozen=True, kw_only=True)
class OldPolicySettings(NoisedSettings):
    """Those of them that keep a copy of the policy beside it."""

    @abstractmethod
    def old_decay(self, update: int) -> float:
        """What the copy keeps of itself after update `update`, counted from 1; in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class GainSettings(OldPolicySettings):
    """Those whose loss sets what the videos of a group have gained against one another."""

    weighting: str = "uniform"
    """How gains at different noise levels compare: one of AWM_WEIGHTINGS; `uniform` are errors of
    velocities."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("weighting", self.weighting, AWM_WEIGHTINGS)

    @property
    def gain_options(self) -> Mapping[str, Any]:
        """What `error_gains` takes besides tensors."""
        return {"weighting": self.weighting}


@dataclass(frozen=True, kw_only=True)
class ForwardProcessSettings(GroupSettings, OldPolicySettings):
    """Those whose copy follows the policy slowly."""

    old_decay_rate: float = 1e-3
    """After update n the old policy keeps min(old_decay_rate * n, old_decay_limit) of itself;
    at least 0."""
    old_decay_limit: float = 0.5
    """In [0, 1)."""
    anchor_weight: float = 0.0
    """Weight of the squared velocity distance from the old policy, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("anchor_weight", self.anchor_weight, 0)
        at_least("old_decay_rate", self.old_decay_rate, 0)
        if not 0 <= self.old_decay_limit < 1:
            raise ValueError(f"old_decay_limit must be in [0, 1), got {self.old_decay_limit}")

    def old_decay(self, update: int) -> float:
        """As in `OldPolicySettings`.

        Source:
            DiffusionNFT, arXiv:2509.16117, return_decay of its published code.
        """
        return min(self.old_decay_rate * update, self.old_decay_limit)


def at_least(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def above(name: str, value: float, least: float) -> None:
    if not least < value < math.inf:
        raise ValueError(f"{name} must be above {least}, got {value}")


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value}")
