"""The comparison of credits: when a rate is halved, what is compared, and that it goes on."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import credit, credit_gaussian, runs
from diffusion_rl.tracking import METRICS_FILE

OPTIONS = argparse.Namespace(
    row=credit.ROW,
    set=["rollout.prompts_per_update=2"],
    mix=0.5,
    clip="video",
    updates=6,
    keep=None,
)


def write_run(folder: Path, rates: list[float], area: float | None = 0.5) -> None:
    """Metrics of a run of 64 videos an update, which drew 40 before the first."""
    folder.mkdir(parents=True)
    lines = [
        {
            "step": step + 1,
            "videos_generated": 40 + 64 * (step + 1),
            "rewards/oracle": 1 - rate,
            "focused_share": 0.25,
            "focus_area": area,
        }
        for step, rate in enumerate(rates)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / METRICS_FILE).write_text(text)


def curve(rates: list[float], each: int = 64) -> credit.Curve:
    videos = [each * (step + 1) for step in range(len(rates))]
    return credit.Curve("uniform", 0, videos, rates, 0.0, math.nan)


def test_a_rate_is_halved_when_the_mean_of_320_videos_is() -> None:
    assert credit.videos_to_halve(curve([0.8] * 3 + [0.4] * 5), 0.8) == 8 * 64
    assert credit.videos_to_halve(curve([0.4] * 5), 0.8) == 5 * 64
    assert credit.videos_to_halve(curve([0.8] * 3 + [0.4] * 10, each=32), 0.8) == 13 * 32
    assert credit.videos_to_halve(curve([0.8] + [0.4] * 2, each=300), 0.8) == 3 * 300
    assert credit.videos_to_halve(curve([0.8] * 3 + [0.4] * 4), 0.8) == math.inf
    assert credit.videos_to_halve(curve([0.0] * 4), 0.8) == math.inf


def test_arms_are_compared_by_seed() -> None:
    needed = {
        "uniform": {0: 100.0, 1: 400.0, 2: math.inf, 3: 100.0},
        "grounded": {0: 50.0, 1: 200.0, 2: 10.0, 3: math.inf},
        "random": {2: 1.0},
    }
    found = credit.compare(needed, "grounded")
    assert found is not None
    assert found["seeds"] == 2
    assert found["ratio"] == found["low"] == found["high"] == pytest.approx(0.5)
    assert credit.compare(needed, "random") is None
    needed["grounded"][1] = 400.0
    found = credit.compare(needed, "grounded")
    assert found is not None
    assert (found["low"], found["ratio"], found["high"]) == pytest.approx((0.5, 0.5**0.5, 1.0))


def test_rates_are_subtracted_by_seed() -> None:
    means = {"uniform": {0: 0.5, 1: 0.7}, "grounded": {0: 0.6, 1: 0.75, 2: 0.1}, "random": {3: 1.0}}
    found = credit.subtract(means, "grounded")
    assert found is not None
    assert (found["seeds"], found["more"]) == (2, pytest.approx(0.075))
    assert (found["low"], found["high"]) == pytest.approx((0.05, 0.1))
    assert credit.subtract(means, "random") is None
    means["random"][0] = 0.5
    one = credit.subtract(means, "random")
    assert one is not None
    assert one["more"] == 0.0
    assert math.isnan(one["low"])


def test_every_arm_is_the_recipe_with_other_credit(tmp_path: Path) -> None:
    OPTIONS.output = tmp_path
    of_arms = {arm: credit.run_settings(OPTIONS, arm, seed=3) for arm in credit.ARMS}
    for arm, settings in of_arms.items():
        assert settings.credit.name == arm.partition("_")[0]
        assert settings.credit.balanced == arm.endswith("_balanced")
        assert settings.credit.mix == (None if arm == "uniform" else 0.5)
        assert settings.algorithm.name == credit.ROW
        assert settings.seed == 3
        assert settings.rollout.prompts_per_update == 2
        assert settings.rewards[0].options["mode"] == "full"
        assert [one.weight for one in settings.rewards if one.name == "oracle"] == [0.0]
        assert settings.algorithm == of_arms["uniform"].algorithm
    assert len({settings.output for settings in of_arms.values()}) == 5


def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OPTIONS.output = tmp_path
    asked: list[str] = []
    monkeypatch.setattr(runs, "prepare", lambda settings: asked.append(settings.output))
    monkeypatch.setattr(runs, "train", lambda run: iter(()))
    write_run(tmp_path / "grounded_0", [0.5] * 6)
    write_run(tmp_path / "random_0", [0.5] * 5)
    for arm in credit.ARMS:
        runs.train_to_end(credit.run_settings(OPTIONS, arm, seed=0), credit.said_of)
    assert [Path(output).name for output in asked] == [
        *("uniform_0", "random_0", "grounded_balanced_0", "random_balanced_0")
    ]


def test_curves_outlast_their_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = '{"rate": 0.8, "videos": 512, "half_width": 0.03}'
    output, kept = tmp_path / "runs", tmp_path / "kept"
    write_run(output / "uniform_0", [0.8] * 5 + [0.4] * 5, area=None)
    write_run(output / "grounded_0", [0.8] * 3 + [0.4] * 5)
    (output / "base.json").write_text(base)
    words = ["--only-table", "--output", str(output), "--keep", str(kept)]
    credit.main(words)
    table = capsys.readouterr().out
    assert "grounded against uniform: 0.80 times the videos, 1 seed(s)" in table
    assert "NaN" not in "".join(path.read_text() for path in kept.iterdir())
    shutil.rmtree(output)
    credit.main(words)
    assert capsys.readouterr().out == table


def test_a_run_ends_when_it_has_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.json").write_text('{"rate": 0.8, "videos": 512, "half_width": 0.03}')
    reached: list[int] = []

    def train(run: None) -> Iterator[SimpleNamespace]:
        for step in range(1, 11):
            shutil.rmtree(tmp_path / "uniform_0", ignore_errors=True)
            write_run(tmp_path / "uniform_0", ([0.8] * 2 + [0.4] * 8)[:step])
            reached.append(step)
            yield SimpleNamespace(step=step)

    monkeypatch.setattr(runs, "prepare", lambda settings: None)
    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(credit, "said_of", lambda report: None)
    arguments = ["--output", str(tmp_path), "--seeds", "0", "--arms", "uniform"]
    credit.main(arguments)
    assert reached[-1] == 7
    credit.main(arguments)
    assert reached[-1] == len(reached) == 7


def test_the_table_says_what_was_and_was_not_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base.json").write_text('{"rate": 0.8, "videos": 512, "half_width": 0.03}')
    write_run(tmp_path / "uniform_0", [0.8] * 5 + [0.4] * 5, area=None)
    write_run(tmp_path / "grounded_0", [0.4] * 7)
    write_run(tmp_path / "random_0", [0.8] * 8)
    credit.main(["--only-table", "--output", str(tmp_path), "--seeds", "0", "1"])
    table = capsys.readouterr().out
    assert "all runs are compared up to update 7" in table
    assert "| uniform | 0 | 10 | 640 | 0.800 +- 0.044 | 0.640" in table
    assert "| grounded | 0 | 7 | 320 | 0.400" in table
    assert "| random | 0 | 8 | not in 512 |" in table
    assert "grounded against uniform: 0.50 times the videos, 1 seed(s)" in table
    assert "random against uniform: no seed in which both halved the rate" in table
    figures = json.loads((tmp_path / "credit.json").read_text())
    assert [row["videos_to_halve"] for row in figures["runs"]] == [640.0, 320.0, None]
    assert (tmp_path / "credit.md").read_text() + "\n" == table


def test_the_problem_of_known_places_prints_every_arm(capsys: pytest.CaptureFixture[str]) -> None:
    credit_gaussian.main(["--seeds", "4", "--updates", "1"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines == [f"| {arm} | never |  |" for arm in credit_gaussian.ARMS]
