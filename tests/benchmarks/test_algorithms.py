"""The comparison of algorithm rows: every row has a run, and what is read of it."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest

from benchmarks import algorithms
from diffusion_rl.algorithms import ALGORITHMS
from diffusion_rl.configuration import to_tree
from diffusion_rl.run_folder import differences
from diffusion_rl.tracking import METRICS_FILE

HELD_OUT = 32 * algorithms.PER_PROMPT


def options(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(output=folder, updates=60, keep=None)


def write_run(folder: Path, rates: dict[int, float]) -> None:
    """Metrics of a run of 64 videos an update at 5 s, looked at in the updates of `rates`."""
    folder.mkdir(parents=True)
    lines, looks = [], 0
    for step in range(1, max(rates) + 1):
        line = {"step": step, "seconds": 5.0 * step}
        if step in rates:
            looks += 1
            line[algorithms.MEASURED] = 1 - rates[step]
        lines.append({**line, "videos_generated": 64 * step + HELD_OUT * looks})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / METRICS_FILE).write_text(text)


def test_every_row_has_a_run_that_differs_in_its_algorithm_alone(tmp_path: Path) -> None:
    assert algorithms.ROWS.keys() == ALGORITHMS.keys()
    runs = {row: algorithms.run_settings(options(tmp_path), row, 2) for row in algorithms.ROWS}
    for row, run in runs.items():
        assert run.algorithm.name == row
        assert (run.seed, run.updates, run.output) == (2, 60, str(tmp_path / f"{row}_2"))
        for part in ("generator", "rewards", "guards", "prompts", "evaluation"):
            assert getattr(run, part) == getattr(runs["grpo"], part)
        for part in ("prompts_per_update", "videos_per_prompt", "num_inference_steps"):
            assert getattr(run.rollout, part) == getattr(runs["grpo"].rollout, part)


def test_variants_differ_in_their_outcome_or_in_what_holds_them(tmp_path: Path) -> None:
    grpo, own_steps, drawn, implied, held = (
        to_tree(algorithms.run_settings(options(tmp_path), name, 0))
        for name in ("grpo", *algorithms.VARIANTS)
    )
    found = [path for path, *_ in differences(grpo, own_steps)]
    assert found == ["rollout.steps_of", "output"]
    found = [path for path, *_ in differences(drawn, implied)]
    assert found == ["rollout.outcome", "output"]
    found = [path for path, *_ in differences(implied, held)]
    held_by = ["algorithm.kl_weight", "optimizer.learning_rate", "optimizer.final_share"]
    assert sorted(found) == sorted([*held_by, "output"])
    assert implied["rollout"]["outcome"] == "implied"
    # What they are compared with learns from what was drawn.
    assert {
        to_tree(algorithms.run_settings(options(tmp_path), row, 0))["rollout"].get("outcome")
        for row in algorithms.ROWS
    } == {"drawn", None}


def test_a_curve_counts_the_videos_of_training_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "nft_1", {1: 0.75, 10: 0.5, 20: 0.375, 30: 0.4})
    curve = algorithms.read_curve(options(tmp_path), "nft", 1)
    assert curve is not None
    assert list(curve.updates) == [1, 10, 20, 30]
    assert list(curve.videos) == [64, 640, 1280, 1920]
    assert list(curve.seconds) == [5, 50, 100, 150]
    assert curve.rates == pytest.approx([0.75, 0.5, 0.375, 0.4])
    assert curve.halved(0.75) == 2
    assert curve.halved(0.7) is None
    assert algorithms.read_curve(options(tmp_path), "nft", 2) is None


def test_the_table_says_how_many_seeds_came_there(tmp_path: Path) -> None:
    write_run(tmp_path / "grpo_0", {1: 0.75, 10: 0.375})
    write_run(tmp_path / "grpo_1", {1: 0.75, 10: 0.45})
    write_run(tmp_path / "raft_0", {1: 0.75, 10: 0.6})
    found = [
        curve
        for row, seed in (("grpo", 0), ("grpo", 1), ("raft", 0))
        if (curve := algorithms.read_curve(options(tmp_path), row, seed))
    ]
    grpo, raft = algorithms.write_table(0.75, found).splitlines()[-2:]
    progress = algorithms.write_progress(found, "videos").splitlines()
    assert progress[0].startswith("| row | seeds | 800 videos | 1,500 videos |")
    assert progress[2] == "| grpo | 2 | 41.2% |  |  |  |  |  |"
    assert progress[3] == "| raft | 1 | 60.0% |  |  |  |  |  |"
    assert algorithms.write_progress(found[:1], "seconds").splitlines()[2] == (
        "| grpo | 1 |  |  |  |  |"
    )
    assert grpo == (
        "| grpo | 2 | 10 | 41.2% (37.5% to 45.0%) | 45% (40% to 50%) | 41.2% (37.5% to 45.0%) "
        "| 640, 1 of 2 seeds | 50 | 5.0 (5.0 to 5.0) |"
    )
    assert raft == "| raft | 1 | 10 | 60.0% | 20% | 60.0% | not reached |  | 5.0 |"


def test_curves_outlast_their_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, kept = tmp_path / "runs", tmp_path / "kept"
    write_run(output / "nft_0", {1: 0.75, 10: 0.375})
    (output / "base.txt").write_text("0.78125")
    words = ["--only-table", "--seeds", "0", "--output", str(output), "--keep", str(kept)]
    algorithms.main(words)
    table = capsys.readouterr().out
    assert "| nft | 1 | 10 | 37.5% | 52% | 37.5% | 640 | 50 | 5.0 |" in table
    shutil.rmtree(output)
    algorithms.main(words)
    assert capsys.readouterr().out == table
    assert sorted(path.name for path in kept.iterdir()) == ["base.txt", "nft_0.json"]
