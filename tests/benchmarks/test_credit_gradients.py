"""What credits make of gradients, against directions that are known."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.credit import run_settings
from benchmarks.credit_gradients import (
    compare,
    direction,
    main,
    mean_of_pairs,
    step_against,
    velocities,
)
from benchmarks.gradient_agreement import gradient_of, judge_update, own_credit
from diffusion_rl.divergences import velocity_kl
from diffusion_rl.finetune import measure_base
from diffusion_rl.launch import prepare
from diffusion_rl.policies import trained_parameters


def test_the_better_of_two_estimates_of_a_direction_is_found() -> None:
    source = torch.Generator().manual_seed(0)
    common = torch.randn(200_000, generator=source)
    noise = torch.randn((3, 30, 200_000), generator=source)
    # Shares of the square that are common: 0.04 and 0.16, so cosines with any other are twice.
    good, bad = 0.4 * common + 0.84**0.5 * noise[0], 0.2 * common + 0.96**0.5 * noise[1]
    reference = 0.3 * common + 0.91**0.5 * noise[2]
    cosines = {
        name: direction(own, reference).numpy() for name, own in (("uniform", bad), ("good", good))
    }
    found = compare(cosines, "uniform")
    assert found["uniform"][0] == pytest.approx(0.2 * 0.3, abs=0.01)
    assert found["good"][0] == pytest.approx(0.4 * 0.3, abs=0.01)
    assert found["uniform"][3:] == [1.0, 1.0, 1.0]
    ratio, low, high = found["good"][3:]
    assert low <= ratio <= high
    assert ratio == pytest.approx(found["good"][0] / found["uniform"][0], abs=1e-9)
    assert 1.8 < low
    assert high < 2.2


def test_an_update_is_no_pair_with_itself() -> None:
    cosines = np.array([[1.0, 0.1, 0.2], [0.3, 1.0, 0.4], [0.5, 0.6, 1.0]])
    assert mean_of_pairs(cosines, [0, 1, 2]) == pytest.approx(2.1 / 6, abs=1e-9)
    # 0 twice: two pairs (0, 1) and two (1, 0).
    assert mean_of_pairs(cosines, [0, 0, 1]) == pytest.approx((2 * 0.1 + 2 * 0.3) / 4, abs=1e-9)
    assert np.isnan(mean_of_pairs(cosines, [1, 1, 1]))
    # An update without a gradient is in no pair.
    cosines[2] = np.nan
    assert mean_of_pairs(cosines, [0, 1, 2]) == pytest.approx((0.1 + 0.2 + 0.3 + 0.4) / 4, abs=1e-9)


def test_a_gradient_of_zero_has_no_direction() -> None:
    found = direction(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.eye(2))
    assert found[0].tolist() == [1.0, 0.0]
    assert found[1].isnan().all()


def test_every_credit_gets_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["rollout.prompts_per_update=1", "rollout.videos_per_prompt=4"]
    words = ["--steps", "0.01", "--prompts", "2", "--output", str(tmp_path)]
    main(["--updates", "3", *words, "--set", *small])
    lines = capsys.readouterr().out.splitlines()
    (said,) = [line for line in lines if "broken by the oracle" in line]
    assert said.startswith("12 videos, ")
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    names = ["| credit", "| uniform", "| grounded", "| random"]
    names += ["| grounded, balanced", "| random, balanced"]
    names += ["| true places", "| true places, balanced"]
    assert [row[0] for row in rows[:16]] == 2 * names
    effect = ["| credit, divergence 0.01", "| untrained", *names[1:], "| reference"]
    assert sorted(row[0] for row in rows[16:]) == sorted(effect)
    assert [row[2] for row in rows[16:] if row[0] == "| uniform"] == ["+0.000 +- 0.000 |"]
    (said,) = [line for line in lines if "of the squared error" in line]
    assert re.match(r"of the \d+ with a fault that has a place, 0\.\d+ of the latent", said)
    assert [row[2] for row in rows if row[0] == "| uniform"][0] == "1.00 (1.00 to 1.00) |"


def test_a_step_goes_against_the_gradient_as_far_as_asked(tmp_path: Path) -> None:
    words = ["rollout.prompts_per_update=1", "rollout.videos_per_prompt=4"]
    options = Namespace(row="awm", mix=1.0, clip="video", updates=3, output=tmp_path, set=words)
    run = prepare(run_settings(options, "uniform", seed=0))
    measure_base(run.generator, run.embeddings, run.settings.finetune_settings(), run.state)
    update = judge_update(run, 1)
    gradient = gradient_of(run, update, own_credit(run, update))
    parameters = trained_parameters(run.generator.transformer)
    start = torch.cat([one.detach().flatten() for one in parameters])
    before = velocities(run, update)
    for divergence in (0.01, 0.04):
        step_against(run, gradient, divergence, update)
        found = velocity_kl(velocities(run, update), before)
        assert found.item() == pytest.approx(divergence, rel=0.01)
        moved = torch.cat([one.detach().flatten() for one in parameters]) - start
        assert torch.cosine_similarity(moved, gradient, dim=0).item() < -0.9999
        for one, origin in zip(
            parameters, start.split([one.numel() for one in parameters]), strict=True
        ):
            one.data.copy_(origin.view_as(one))


def test_two_updates_are_too_few(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--updates", "2"])
    assert "--updates must be at least 3, got 2" in capsys.readouterr().err
