"""The ablation's table: what is written of a judge is what is read, paired by seed and clip."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.judge_ablation_table import accuracy, auc, estimate, main
from benchmarks.judge_verdicts import Verdict, read_verdicts, write_verdicts

CLIPS = 40


def judge(folder: Path, variant: str, seed: int, right: float, broken: int = 20) -> list[Verdict]:
    """Verdicts on CLIPS clips, of which a share is right, and one is missing."""
    random = np.random.default_rng(seed)
    verdicts = []
    for number in range(CLIPS):
        anomalous = number < broken
        says_clean = anomalous != (random.random() < right)
        chance = 0.5 + (0.4 if says_clean else -0.4) * random.random()
        overlap = random.random() if anomalous else math.nan
        verdicts.append(Verdict(anomalous, chance, overlap, overlap / 2))
    verdicts[0] = Verdict(verdicts[0].anomalous, math.nan, math.nan, math.nan)
    file = folder / variant / f"seed_{seed}" / "held_out.json"
    file.parent.mkdir(parents=True)
    write_verdicts(file, verdicts, 12.34, 5.0)
    return verdicts


def test_what_was_written_is_read_and_measured(tmp_path: Path) -> None:
    verdicts = judge(tmp_path, "two_turns", 3, right=0.7)
    found = read_verdicts([tmp_path], "two_turns", "held_out")
    assert list(found) == [3]
    one, everywhere = found[3], np.arange(CLIPS)
    assert one["p_clean"] == pytest.approx([v.p_clean for v in verdicts], abs=1e-6, nan_ok=True)
    assert one["box_iou"] == pytest.approx([v.box_iou for v in verdicts], abs=1e-6, nan_ok=True)
    assert list(one["seconds"]) == [12.3, 5.0]
    # A clip without a verdict is wrong, and no part of the curve.
    right = [v.p_clean < 0.5 if v.anomalous else v.p_clean >= 0.5 for v in verdicts]
    assert accuracy(one, everywhere) == sum(right) / CLIPS
    bad = [v.p_clean for v in verdicts[1:] if v.anomalous]
    good = [v.p_clean for v in verdicts[1:] if not v.anomalous]
    expected = np.mean([(b < g) + 0.5 * (b == g) for b in bad for g in good])
    assert auc(one, everywhere) == pytest.approx(expected, abs=1e-9)


def test_differences_are_of_seeds_that_both_have(tmp_path: Path) -> None:
    for seed in (0, 1):
        judge(tmp_path, "two_turns", seed, right=1.0)
        judge(tmp_path, "yes_no", seed, right=1.0)
    judge(tmp_path, "yes_no", 2, right=0.0)
    both = [read_verdicts([tmp_path], variant, "held_out") for variant in ("two_turns", "yes_no")]
    assert estimate(both[0], accuracy, both[1]) == (0.0, 0.0, 0.0)


def test_folders_are_read_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, own = tmp_path / "kept", tmp_path / "own"
    judge(kept, "two_turns", 0, right=0.0)
    judge(kept, "yes_no", 0, right=0.5)
    judge(kept, "yes_no", 1, right=0.5)
    judge(own, "two_turns", 0, right=1.0)
    judge(own, "grpo", 2, right=1.0)
    main(["--folders", str(own), str(kept)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "### held_out"
    rows = [line.split(" | ") for line in lines[4:] if line]
    assert [row[0] for row in rows] == ["| yes_no", "| two_turns", "| grpo"]
    assert [row[1] for row in rows] == ["2", "1", "1"]
    # That of the first folder, where 39 of 40 are right.
    assert rows[1][2].startswith("97.5")
    # No seed of grpo is one of yes_no's.
    assert rows[2][6] == rows[2][7] == rows[2][8] == ""
    assert lines[2].count(" against yes_no |") == 3
    assert rows[1][7].startswith(("+", "-"))


def test_judges_of_other_clips_are_not_compared(tmp_path: Path) -> None:
    judge(tmp_path, "yes_no", 0, right=0.5)
    judge(tmp_path, "two_turns", 0, right=0.5, broken=21)
    with pytest.raises(ValueError, match="yes_no seed 0 and two_turns seed 0 were asked about oth"):
        main(["--folders", str(tmp_path)])


def test_a_folder_without_verdicts_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--folders", str(tmp_path)])
    assert f"no verdicts in {tmp_path}" in capsys.readouterr().err
