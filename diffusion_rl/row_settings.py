"""The options of each row of `ALGORITHMS`; where a row has a paper, the defaults are its own.

A row's class says which options it has; what it would ignore it does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusion_rl.losses import AWM_WEIGHTINGS
from diffusion_rl.row_kinds import (
    SETTINGS,
    ClippedSettings,
    ForwardProcessSettings,
    GainSettings,
    GroupSettings,
    NoisedSettings,
    RatioSettings,
    RecordedSettings,
    above,
    at_least,
    one_of,
)


@dataclass(frozen=True, kw_only=True)
class DdpoSettings(RatioSettings):
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
class GrpoSettings(GroupSettings, RatioSettings):
    """Options of the row `grpo`."""

    name: str = "grpo"
    """The row."""
    clip_range: float = 1e-3
    """Ratios below 1 - clip_range stop learning, in (0, 1]."""


@dataclass(frozen=True, kw_only=True)
class DanceGrpoSettings(GroupSettings, RatioSettings):
    """Options of the row `dance_grpo`."""

    name: str = "dance_grpo"
    """The row."""
    advantage_unbiased: bool = True
    """Whether a spread divides its squares by n - 1 instead of n."""


@dataclass(frozen=True, kw_only=True)
class MixGrpoSettings(GroupSettings, RatioSettings):
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
        one_of("window", self.window, ("sliding", "random"))
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
        above("divergence_limit", self.divergence_limit, 0)

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
        above("beta", self.beta, 0)

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
        one_of("weighting", self.weighting, AWM_WEIGHTINGS)
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
        at_least("keep", self.keep, 1)

    @property
    def advantage_options(self) -> Mapping[str, Any]:
        return {"keep": self.keep}

    @property
    def loss_options(self) -> Mapping[str, Any]:
        return {}


@dataclass(frozen=True, kw_only=True)
class OnlineDpoSettings(GainSettings):
    """Options of the row `online_dpo`."""

    name: str = "online_dpo"
    """The row."""
    beta: float = 100.0
    """How sharply a pair's preference follows from what the two gained; above 0."""
    pairs: int = 1
    """How many of the best videos of a group are preferred to as many of the worst, at least 1."""
    refresh_every: int = 40
    """Updates after which the policy that gains are measured from becomes the trained one, at
    least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above("beta", self.beta, 0)
        at_least("pairs", self.pairs, 1)
        at_least("refresh_every", self.refresh_every, 1)

    def old_decay(self, update: int) -> float:
        """As in `OldPolicySettings`: all, but nothing when it is refreshed."""
        return float(update % self.refresh_every > 0)

    @property
    def advantage_options(self) -> Mapping[str, Any]:
        return {"pairs": self.pairs}

    @property
    def loss_options(self) -> Mapping[str, Any]:
        return {"beta": self.beta}


SETTINGS.update(
    {
        "ddpo": DdpoSettings,
        "grpo": GrpoSettings,
        "dance_grpo": DanceGrpoSettings,
        "mix_grpo": MixGrpoSettings,
        "grpo_guard": GrpoGuardSettings,
        "dppo": DppoSettings,
        "nft": NftSettings,
        "awm": AwmSettings,
        "raft": RaftSettings,
        "online_dpo": OnlineDpoSettings,
    }
)
