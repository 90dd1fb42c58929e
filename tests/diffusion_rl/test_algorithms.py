"""Rows are wired to the right parts."""

from __future__ import annotations

import pytest

from diffusion_rl.advantages import group_advantages
from diffusion_rl.algorithms import ALGORITHMS, algorithm
from diffusion_rl.losses import nft_loss
from diffusion_rl.surrogates import clipped_surrogate
from diffusion_rl.transitions import TRANSITIONS, flow_sde, ode


def test_grpo_learns_from_the_steps_it_explored():
    row = algorithm("grpo")
    assert row.transition is flow_sde
    assert row.advantages is group_advantages
    assert row.loss is clipped_surrogate
    assert row.learning_steps == "recorded"
    assert not row.uses_old_policy


def test_nft_learns_from_videos_noised_afresh():
    row = algorithm("nft")
    assert row.transition is ode
    assert row.loss is nft_loss
    assert row.learning_steps == "forward_process"
    assert row.uses_old_policy


def test_only_rows_of_the_forward_process_keep_an_old_policy():
    for name, row in ALGORITHMS.items():
        forward = row.learning_steps == "forward_process"
        assert row.uses_old_policy == (forward and name != "raft")
        assert (row.transition is ode) == forward
    assert algorithm("awm").old_policy == "anchors"
    assert algorithm("online_dpo").old_policy == "compares"
    assert [name for name, row in ALGORITHMS.items() if row.uses_history] == ["ddpo"]


def test_every_row_uses_a_named_transition():
    assert all(row.transition in TRANSITIONS.values() for row in ALGORITHMS.values())


def test_an_unknown_row_is_refused_with_its_nearest_name():
    with pytest.raises(ValueError, match="algorithm.name must be one of ddpo, .*, got 'grp'; did"):
        algorithm("grp")
    with pytest.raises(ValueError, match="algorithm.name must be one of ddpo, .*, got 'sac'$"):
        algorithm("sac")
