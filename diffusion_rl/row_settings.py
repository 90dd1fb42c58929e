"""The options of each row of `ALGORITHMS`; where a row has a paper, the defaults are its own.

A row's class says which options it has; what it would ignore it does not have.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusion_rl.algorithms import algorithm
from diffusion_rl.losses import AWM_WEIGHTINGS
from diffusion_rl.transitions import TRANSITIONS, TransitionFunction


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
        _at_least("kl_weight", self.kl_weight, 0)
        _at_least("inner_steps", self.inner_steps, 1)

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
        _above("advantage_clip", self.advantage_clip, 0)


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
        _one_of("advantage_std", self.advantage_std, ("group", "batch", "largest"))
        _one_of("advantage_rewards", self.advantage_rewards, ("summed", "separate"))

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
            _one_of("transition", self.transition, tuple(allowed))

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
            _above("clip_range_high", self.clip_range_high, 0)

    @property
    def loss_options(self) -> Mapping[str, Any]:
        return {"clip_range": self.clip_range, "clip_range_high": self.clip_range_high}


@dataclass(frozen=True, kw_only=True)
class NoisedSettings(AlgorithmSettings):
    """Rows that learn from noised videos."""

    noise_levels: int = 1
    """Noise levels at which an optimiser step sees each video, at least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("noise_levels", self.noise_levels, 1)


@dataclass(frozen=True, kw_only=True)
class ForwardProcessSettings(GroupSettings, NoisedSettings):
    """Those of them that keep a copy of the policy beside it, which follows it slowly."""

    old_decay_rate: float = 1e-3
    """After update n the old policy keeps min(old_decay_rate * n, old_decay_limit) of itself;
    at least 0."""
    old_decay_limit: float = 0.5
    """In [0, 1)."""
    anchor_weight: float = 0.0
    """Weight of the squared velocity distance from the old policy, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("anchor_weight", self.anchor_weight, 0)
        _at_least("old_decay_rate", self.old_decay_rate, 0)
        if not 0 <= self.old_decay_limit < 1:
            raise ValueError(f"old_decay_limit must be in [0, 1), got {self.old_decay_limit}")

    def old_decay(self, update: int) -> float:
        """What the old policy keeps of itself after update `update`, counted from 1.

        Source:
            DiffusionNFT, arXiv:2509.16117, return_decay of its published code.
        """
        return min(self.old_decay_rate * update, self.old_decay_limit)


@dataclass(frozen=True, kw_only=True)
class DdpoSettings(ClippedSettings):
    """Options of the row `ddpo`."""

    name: str = "ddpo"
    """The row."""
    history_capacity: int = 16
    """Latest scores of a prompt that its videos are compared with, at least history_min_count."""
    history_min_count: int = 16
    """A prompt with fewer is compared with the whole batch; at least 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history_min_count < 2:
            raise ValueError(f"history_min_count must be at least 2, got {self.history_min_count}")
        if self.history_capacity < self.history_min_count:
            raise ValueError(
                f"history_capacity must be at least history_min_count={self.history_min_count}, "
                f"got {self.history_capacity}"
            )

    @property
    def advantage_options(self) -> Mapping[str, Any]:
        return {
            "capacity": self.history_capacity,
            "min_count": self.history_min_count,
            "clip": self.advantage_clip,
        }


@dataclass(frozen=True, kw_only=True)
class GrpoSettings(GroupSettings, ClippedSettings):
    """Options of the row `grpo`."""

    name: str = "grpo"
    """The row."""
    clip_range: float = 1e-3
    """Ratios below 1 - clip_range stop learning, in (0, 1]."""


@dataclass(frozen=True, kw_only=True)
class DanceGrpoSettings(GroupSettings, ClippedSettings):
    """Options of the row `dance_grpo`."""

    name: str = "dance_grpo"
    """The row."""
    advantage_unbiased: bool = True
    """Whether a spread divides its squares by n - 1 instead of n."""


@dataclass(frozen=True, kw_only=True)
class MixGrpoSettings(GroupSettings, ClippedSettings):
    """Options of the row `mix_grpo`; the window is as wide as rollout.stochastic_steps."""

    name: str = "mix_grpo"
    """The row."""
    advantage_unbiased: bool = True
    """Whether a spread divides its squares by n - 1 instead of n."""
    window: str = "sliding"
    """`sliding` moves the window from the first eligible steps to the last and begins again;
    `random` draws its place."""
    updates_per_window: int = 25
    """Updates before the window moves on, at least 1."""
    window_stride: int = 1
    """Steps by which a sliding window moves on, at least 1; the last window is never left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("window", self.window, ("sliding", "random"))
        for name in ("updates_per_window", "window_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.window == "random" and self.window_stride != 1:
            raise ValueError(
                f"window_stride must be left out with window 'random', got {self.window_stride}; "
                "it would be ignored"
            )


@dataclass(frozen=True, kw_only=True)
class GrpoGuardSettings(GroupSettings, ClippedSettings):
    """Options of the row `grpo_guard`."""

    name: str = "grpo_guard"
    """The row."""
    clip_range: float = 2e-6
    """Normalised ratios below 1 - clip_range stop learning, in (0, 1]; they spread by far less than
    plain ones."""


@dataclass(frozen=True, kw_only=True)
class DppoSettings(GroupSettings, RecordedSettings):
    """Options of the row `dppo`."""

    name: str = "dppo"
    """The row."""
    divergence_limit: float = 1e-5
    """Divergence per element of the latent at which a step stops learning, above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _above("divergence_limit", self.divergence_limit, 0)

    @property
    def loss_options(self) -> Mapping[str, Any]:
        return {"divergence_limit": self.divergence_limit}


@dataclass(frozen=True, kw_only=True)
class NftSettings(ForwardProcessSettings):
    """Options of the row `nft`."""

    name: str = "nft"
    """The row."""
    beta: float = 1.0
    """How far the implicit good and bad policies reach past the old one; above 0."""
    kl_weight: float = 1e-4
    """Weight of the squared velocity distance from the reference policy, at least 0; 0 does not
    compute it."""
    inner_steps: int = 4
    """Optimiser steps of an update, at least 1; each sees all videos at fresh noise levels."""
    advantage_std: str = "batch"
    """Advantages are divided by the spread of the `group`, of the whole `batch`, or by the
    `largest` spread of any group."""
    advantage_clip: float = 5.0
    """Size of advantage at which a video counts as wholly good or bad, above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _above("beta", self.beta, 0)

    @property
    def loss_options(self) -> Mapping[str, Any]:
        return {"beta": self.beta, "advantage_limit": self.advantage_clip}


@dataclass(frozen=True, kw_only=True)
class AwmSettings(ForwardProcessSettings):
    """Options of the row `awm`."""

    name: str = "awm"
    """The row."""
    weighting: str = "ghuber"
    """How log-probabilities at different noise levels compare: one of AWM_WEIGHTINGS."""
    clip_range: float = 1.0
    """Ratios further from 1 stop learning, in (0, 1]."""
    noise_levels: int = 6
    """Noise levels at which an optimiser step sees each video, at least 1."""
    anchor_weight: float = 1.0
    """Weight of the squared velocity distance from the old policy, at least 0."""
    kl_weight: float = 1e-3
    """Weight of the squared velocity distance from the reference policy, at least 0; 0 does not
    compute it."""
    old_decay_limit: float = 0.3
    """In [0, 1)."""
    advantage_std: str = "batch"
    """Advantages are divided by the spread of the `group`, of the whole `batch`, or by the
    `largest` spread of any group."""
    advantage_clip: float = 5.0
    """Size of advantage that counts as 1, and the largest, above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("weighting", self.weighting, AWM_WEIGHTINGS)
        if not 0 < self.clip_range <= 1:
            raise ValueError(f"clip_range must be in (0, 1], got {self.clip_range}")

    @property
    def loss_options(self) -> Mapping[str, Any]:
        return {
            "weighting": self.weighting,
            "clip_range": self.clip_range,
            "advantage_limit": self.advantage_clip,
        }


@dataclass(frozen=True, kw_only=True)
class RaftSettings(NoisedSettings):
    """Options of the row `raft`."""

    name: str = "raft"
    """The row."""
    keep: int = 1
    """Best videos of a group that are learnt, at least 1; the worst of a group never is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("keep", self.keep, 1)

    @property
    def advantage_options(self) -> Mapping[str, Any]:
        return {"keep": self.keep}

    @property
    def loss_options(self) -> Mapping[str, Any]:
        return {}


SETTINGS: dict[str, type[AlgorithmSettings]] = {
    "ddpo": DdpoSettings,
    "grpo": GrpoSettings,
    "dance_grpo": DanceGrpoSettings,
    "mix_grpo": MixGrpoSettings,
    "grpo_guard": GrpoGuardSettings,
    "dppo": DppoSettings,
    "nft": NftSettings,
    "awm": AwmSettings,
    "raft": RaftSettings,
}
"""The options that each row of ALGORITHMS takes."""


def _at_least(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _above(name: str, value: float, least: float) -> None:
    if not least < value < math.inf:
        raise ValueError(f"{name} must be above {least}, got {value}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value}")
