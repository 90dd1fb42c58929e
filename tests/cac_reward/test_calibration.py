"""Temperature scaling against known answers, brute force and its own properties."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cac_reward.__main__ import main
from cac_reward.calibration import (
    FILE,
    Calibration,
    expected_calibration_error,
    fit_calibration,
)
from cac_reward.records import ClipRecord
from cac_reward.report import AnomalyReport


def labelled(count: int, temperature: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips whose labels follow a judge's verdicts softened by a temperature."""
    random = torch.Generator().manual_seed(seed)
    logit = 6 * torch.randn(count, generator=random, dtype=torch.double)
    clean = torch.rand(count, generator=random) < torch.sigmoid(logit / temperature)
    return torch.sigmoid(logit), clean


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5, 6.0])
def test_the_temperature_that_made_the_labels_is_found(temperature: float) -> None:
    fitted = fit_calibration(*labelled(20_000, temperature))
    assert 0.94 < fitted.temperature / temperature < 1.06
    assert fitted.num_clips == 20_000
    assert fitted.error_after < 0.02


def test_no_temperature_of_a_fine_grid_explains_the_labels_better() -> None:
    p_clean, clean = labelled(500, 2.0, seed=3)
    fitted = fit_calibration(p_clean, clean)

    def likelihood(temperature: float) -> float:
        said = torch.sigmoid(torch.log(p_clean / (1 - p_clean)) / temperature)
        return torch.where(clean, said, 1 - said).log().sum().item()

    best = max(likelihood(t) for t in torch.linspace(0.2, 8, 2000).tolist())
    assert likelihood(fitted.temperature) >= best - 1e-6


def test_an_overconfident_judge_is_mended() -> None:
    fitted = fit_calibration(*labelled(5000, 4.0))
    assert fitted.error_before > 3 * fitted.error_after
    assert fitted.temperature > 1


def test_the_error_is_that_of_brute_force() -> None:
    p_clean, clean = labelled(300, 3.0)
    expected = 0.0
    for low in range(10):
        inside = [
            i
            for i, p in enumerate(p_clean.tolist())
            if low <= p * 10 < low + 1 or p == 1 == low - 8
        ]
        if inside:
            mean = sum(p_clean[i].item() for i in inside) / len(inside)
            share = sum(bool(clean[i]) for i in inside) / len(inside)
            expected += len(inside) / 300 * abs(mean - share)
    assert expected_calibration_error(p_clean, clean, bins=10) == pytest.approx(expected)


def test_a_perfect_judge_has_no_error() -> None:
    clean = torch.tensor([True, False, True])
    assert expected_calibration_error(clean.double(), clean) == 0
    assert expected_calibration_error(1 - clean.double(), clean) == 1
    nothing = torch.full((3,), math.nan)
    assert math.isnan(expected_calibration_error(nothing, clean))


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.05, 20))
@settings(max_examples=200, deadline=None)
def test_order_and_the_even_verdict_stay(one: float, other: float, temperature: float) -> None:
    calibration = Calibration(temperature=temperature)
    low, high = sorted((one, other))
    assert calibration.apply(low) <= calibration.apply(high)
    assert calibration.apply(0.5) == pytest.approx(0.5)
    assert 0 <= calibration.apply(one) <= 1
    assert math.isnan(calibration.apply(math.nan))


def test_without_a_file_verdicts_stay_as_they_are(tmp_path: Path) -> None:
    calibration = Calibration.load(tmp_path)
    assert [calibration.apply(p) for p in (0.0, 0.123, 1.0)] == [0.0, 0.123, 1.0]


def test_it_is_stored_beside_the_checkpoint(tmp_path: Path) -> None:
    fitted = fit_calibration(*labelled(200, 2.0))
    assert fitted.save(tmp_path) == tmp_path / FILE
    assert Calibration.load(tmp_path) == fitted
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "a": 1}'])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=r"must be a file of version 1 .* calibrate again"):
        Calibration.load(tmp_path)


def test_a_temperature_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        Calibration(temperature=0)
    (tmp_path / FILE).write_text(json.dumps({"version": 1, "temperature": -1.0}))
    with pytest.raises(ValueError, match="temperature must be above 0, got -1.0"):
        Calibration.load(tmp_path)


def test_unjudged_clips_are_left_out() -> None:
    p_clean, clean = labelled(400, 2.0)
    holes = torch.cat([p_clean, torch.full((50,), math.nan)])
    extra = torch.cat([clean, torch.ones(50, dtype=torch.bool)])
    assert fit_calibration(holes, extra) == fit_calibration(p_clean, clean)


@pytest.mark.parametrize(
    ("p_clean", "clean", "message"),
    [
        (torch.rand(9), torch.arange(9) % 2 == 0, "at least 10 judged clips, got 9"),
        (torch.rand(12), torch.ones(12), "clean and faulty clips, got clean ones alone"),
        (torch.rand(12), torch.zeros(12), "clean and faulty clips, got faulty ones alone"),
        (torch.rand(12), torch.zeros(11), r"got shapes \(12,\) and \(11,\)"),
        (torch.full((12,), 1.5), torch.arange(12) % 2, r"must be in \[0, 1\], got 1.5"),
    ],
)
def test_labels_that_teach_nothing_are_refused(
    p_clean: torch.Tensor, clean: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit_calibration(p_clean, clean)


def test_a_bin_count_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        expected_calibration_error(torch.rand(3), torch.ones(3), bins=0)


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """A folder with a judge, the reports of 40 clips by it, and their labels."""
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    p_clean, clean = labelled(40, 3.0)
    lines, labels = [], ["path,clean"]
    for i, (p, label) in enumerate(zip(p_clean.tolist(), clean.tolist(), strict=True)):
        report = AnomalyReport(score=p, judge_id="j", fps=8.0, num_frames=9)
        record = ClipRecord(path=f"{i}.mp4", width=8, height=8, report=report)
        lines.append(record.to_json())
        labels.append(f"{i}.mp4,{int(label)}")
    (tmp_path / "reports.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "labels.csv").write_text("\n".join(labels) + "\n")
    return tmp_path


def calibrate(folder: Path) -> int:
    words = ["calibrate", str(folder / "reports.jsonl"), "--labels", str(folder / "labels.csv")]
    return main([*words, "--judge", str(folder / "judge")])


def test_the_command_stores_what_it_fits_and_says_what_it_changes(
    scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(scored) == 0
    expected = fit_calibration(*labelled(40, 3.0))
    stored = Calibration.load(scored / "judge")
    # The reports hold double precision, the command computes with single.
    assert stored.temperature == pytest.approx(expected.temperature, rel=1e-4)
    said = capsys.readouterr().out
    assert f"temperature {expected.temperature:.3f} from 40 clips" in said
    assert f"{expected.error_before:.3f} before, {expected.error_after:.3f} after" in said
    assert calibrate(scored) == 2
    assert "judge must have no calibration yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("file,clean\n", "must have the columns path and clean, got ['file', 'clean']"),
        ("path,clean\n0.mp4,yes\n", "be labelled 0 or 1, got '0.mp4' with 'yes' in line 2"),
        ("path,clean\n0.mp4,1\n0.mp4,1\n", "must come once, got '0.mp4' with '1' in line 3"),
        ("path,clean\nno.mp4,1\n", "must hold every labelled clip, got none of 'no.mp4' (1 in"),
        ("path,clean\n0.mp4,1\n", "at least 10 judged clips, got 1"),
    ],
)
def test_labels_that_do_not_fit_are_named(
    scored: Path, labels: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (scored / "labels.csv").write_text(labels)
    assert calibrate(scored) == 2
    assert message in capsys.readouterr().err
    assert not (scored / "judge" / FILE).exists()
