"""Every row has options; what a row would ignore or cannot do is refused."""

from __future__ import annotations

import pytest

from diffusion_rl.algorithms import ALGORITHMS
from diffusion_rl.progress import FinetuneSettings
from diffusion_rl.rollout import RolloutSettings
from diffusion_rl.row_kinds import GainSettings, OldPolicySettings, RecordedSettings
from diffusion_rl.row_settings import (
    SETTINGS,
    AwmSettings,
    DdpoSettings,
    DppoSettings,
    GrpoGuardSettings,
    GrpoSettings,
    MixGrpoSettings,
    NftSettings,
    OnlineDpoSettings,
    RaftSettings,
)
from diffusion_rl.transitions import cps, ddim, flow_sde, name_of


def test_every_row_has_options_of_its_kind() -> None:
    assert SETTINGS.keys() == ALGORITHMS.keys()
    for name, row in ALGORITHMS.items():
        settings = SETTINGS[name]()
        assert settings.name == name
        assert isinstance(settings, RecordedSettings) == (row.learning_steps == "recorded")
        assert isinstance(settings, OldPolicySettings) == row.uses_old_policy
        assert isinstance(settings, GainSettings) == row.of_groups


def test_the_defaults_of_nft_are_those_of_its_published_code() -> None:
    """NVlabs/DiffusionNFT, config/base.py and scripts/train_nft_sd3.py."""
    own = NftSettings()
    assert (own.kl_weight, own.beta, own.advantage_clip) == (1e-4, 1.0, 5.0)
    assert (own.old_decay_rate, own.old_decay_limit) == (1e-3, 0.5)


def test_a_transition_may_be_chosen_where_the_loss_allows_it() -> None:
    assert GrpoSettings().transition_function is flow_sde
    assert DdpoSettings().transition_function is ddim
    assert GrpoSettings(transition="cps").transition_function is cps
    for kind in (GrpoGuardSettings, DppoSettings):
        with pytest.raises(ValueError, match="transition must be one of flow_sde, .*, got cps"):
            kind(transition="cps")
    with pytest.raises(ValueError, match="transition must be one of flow_sde, .*, got ode"):
        GrpoSettings(transition="ode")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (GrpoSettings, {"clip_range_high": 0.0}, "clip_range_high must be above 0, got 0.0"),
        (
            GrpoSettings,
            {"advantage_rewards": "all"},
            "advantage_rewards must be one of summed",
        ),
        (DdpoSettings, {"history_min_count": 1}, "history_min_count must be at least 2, got 1"),
        (
            DdpoSettings,
            {"history_capacity": 8},
            "history_capacity must be at least history_min_count=16, got 8",
        ),
        (MixGrpoSettings, {"window": "fixed"}, "window must be one of sliding, random, got fixed"),
        (
            MixGrpoSettings,
            {"updates_per_window": 0},
            "updates_per_window must be at least 1",
        ),
        (MixGrpoSettings, {"window_stride": 0}, "window_stride must be at least 1, got 0"),
        (
            MixGrpoSettings,
            {"window": "random", "window_stride": 2},
            "window_stride must be left out with window 'random', got 2; it would be ignored",
        ),
        (DppoSettings, {"divergence_limit": 0.0}, "divergence_limit must be above 0, got 0.0"),
        (AwmSettings, {"weighting": "ELBO"}, "weighting must be one of uniform, .*, got ELBO"),
        (AwmSettings, {"clip_range": 1.5}, r"clip_range must be in \(0, 1\], got 1.5"),
        (RaftSettings, {"keep": 0}, "keep must be at least 1, got 0"),
        (OnlineDpoSettings, {"beta": 0.0}, "beta must be above 0, got 0.0"),
        (OnlineDpoSettings, {"weighting": "l2"}, "weighting must be one of uniform, .*, got l2"),
        (OnlineDpoSettings, {"pairs": 0}, "pairs must be at least 1, got 0"),
        (OnlineDpoSettings, {"refresh_every": 0}, "refresh_every must be at least 1, got 0"),
        (RaftSettings, {"noise_levels": 0}, "noise_levels must be at least 1, got 0"),
        (AwmSettings, {"noise_levels": 0}, "noise_levels must be at least 1, got 0"),
        (NftSettings, {"anchor_weight": -1.0}, "anchor_weight must be at least 0, got -1.0"),
        (AwmSettings, {"name": "nft"}, "name must be the row that AwmSettings belongs to, got nft"),
    ],
)
def test_settings_outside_their_range_are_refused(kind: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize("row", [DdpoSettings(), GrpoSettings(transition="cps")])
def test_more_noise_than_there_is_must_not_be_replaced(row: RecordedSettings) -> None:
    name = name_of(row.transition_function)
    message = rf"rollout.noise_level must be in \(0, 1\] with transition '{name}', got 1.2; "
    with pytest.raises(ValueError, match=message):
        FinetuneSettings(algorithm=row, rollout=RolloutSettings(noise_level=1.2))
    FinetuneSettings(algorithm=row, rollout=RolloutSettings(noise_level=1.0))
    FinetuneSettings(algorithm=GrpoSettings(), rollout=RolloutSettings(noise_level=1.2))


@pytest.mark.parametrize("row", [DdpoSettings(), GrpoSettings(transition="cps")])
def test_a_last_step_without_noise_must_not_be_eligible(row: RecordedSettings) -> None:
    options = RolloutSettings(num_inference_steps=4, eligible_steps=4)
    with pytest.raises(ValueError, match="rollout.eligible_steps must be below .*=4 with transi"):
        FinetuneSettings(algorithm=row, rollout=options)
    FinetuneSettings(algorithm=GrpoSettings(), rollout=options)
    FinetuneSettings(algorithm=row, rollout=RolloutSettings(num_inference_steps=4))
