"""What credits make of gradients, against directions that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.credit_gradients import compare, direction, main, mean_of_pairs


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
    main(["--updates", "3", "--output", str(tmp_path), "--set", *small])
    lines = capsys.readouterr().out.splitlines()
    (said,) = [line for line in lines if "broken by the oracle" in line]
    assert said.startswith("12 videos, ")
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    names = ["| credit", "| uniform", "| grounded", "| random"]
    names += ["| grounded, balanced", "| random, balanced"]
    names += ["| true places", "| true places, balanced"]
    assert [row[0] for row in rows] == 2 * names
    assert [row[2] for row in rows if row[0] == "| uniform"][0] == "1.00 (1.00 to 1.00) |"


def test_two_updates_are_too_few(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--updates", "2"])
    assert "--updates must be at least 3, got 2" in capsys.readouterr().err
