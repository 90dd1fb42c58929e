"""Both sides of an evaluation drawn from one generator, and what is written of them."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from diffusion_rl.before_after import (
    build_samplers,
    compare_sides,
    kept_videos,
    result_tables,
    shown_videos,
    with_anomaly_rates,
    write_results,
)
from diffusion_rl.clips import data_uri, draw_clip, judged_clip
from diffusion_rl.evaluation import AuditRow, Measured
from diffusion_rl.lora import attach_lora, trained_parameters
from diffusion_rl.rollout import RolloutSettings
from diffusion_rl.sampling import sample_videos
from tests.toy_gaussian import LORA, ToyGenerator

SETTINGS = RolloutSettings(num_inference_steps=4, micro_batch=2)
PROMPTS = ["plain", "bright", "bright"]


def measured(clean: list[float]) -> Measured:
    videos = torch.arange(len(clean) * 3 * 16 * 16).view(len(clean), 1, 3, 16, 16) % 256
    reports = [{"score": score, "findings": []} for score in clean]
    return Measured(
        prompts=tuple(f"prompt {index // 2}" for index in range(len(clean))),
        seeds=tuple(range(len(clean))),
        values={"judge": torch.tensor(clean), "motion": torch.tensor(clean) / 2},
        reports={"judge": reports},
        videos=videos.byte(),
    )


BASE = measured([0.1, 0.2, 0.9, 0.3, 0.4, 0.8])
TUNED = measured([0.9, 0.2, 0.9, 0.7, 0.6, 0.8])


def test_both_sides_are_drawn_from_the_same_noise() -> None:
    plain = ToyGenerator()
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA)
    for parameter in trained_parameters(generator.transformer):
        torch.nn.init.normal_(parameter, std=0.3)
    samplers = build_samplers(generator, PROMPTS, SETTINGS)
    options = {"num_inference_steps": 4, "micro_batch": 2}
    expected = {
        "base": sample_videos(plain, PROMPTS, [1, 2, 3], **options),
        "tuned": sample_videos(generator, PROMPTS, [1, 2, 3], **options),
    }
    for side, sample in samplers.items():
        assert torch.equal(sample(PROMPTS, [1, 2, 3]), expected[side])
        one = sample(PROMPTS[1:2], [2])
        torch.testing.assert_close(one, expected[side][1:2])
    assert not torch.allclose(expected["base"], expected["tuned"])


def test_rates_count_what_falls_below_a_half() -> None:
    with_rates = with_anomaly_rates(BASE, ["judge"])
    assert with_rates.values["judge_anomaly_rate"].tolist() == [1, 1, 0, 1, 1, 0]
    assert with_rates.values["judge"].tolist() == BASE.values["judge"].tolist()
    with pytest.raises(ValueError, match="--clean must name measures, got other; there are"):
        with_anomaly_rates(BASE, ["other"])
    loud = dataclasses.replace(BASE, values={"judge": 5 * BASE.values["judge"]})
    with pytest.raises(ValueError, match=r"in \[0, 1\], got judge with 0.5 to 4.5; name those"):
        with_anomaly_rates(loud, ["judge"])


def test_the_summary_holds_the_reduction_and_its_test() -> None:
    sides = {
        "base": with_anomaly_rates(BASE, ["judge"]),
        "tuned": with_anomaly_rates(TUNED, ["judge"]),
    }
    comparisons, summary = compare_sides(sides, ["judge"])
    assert list(comparisons) == [("base", "tuned")]
    assert comparisons["base", "tuned"]["judge_anomaly_rate"].base == pytest.approx(4 / 6)
    assert summary["base"]["judge_anomaly_rate"] == pytest.approx(4 / 6)
    assert summary["tuned"]["judge_anomaly_rate"] == pytest.approx(1 / 6)
    assert summary["relative_reduction_judge"] == pytest.approx(0.75)
    low, high = summary["relative_reduction_judge_ci95"]
    assert low <= 0.75 <= high
    # Three pairs differ, all one way: 2 / 2^3.
    assert summary["mcnemar_p_judge"] == pytest.approx(0.25)


def test_a_base_without_faults_has_nothing_to_reduce() -> None:
    perfect = with_anomaly_rates(measured([0.9] * 4), ["judge"])
    _, summary = compare_sides({"base": perfect, "tuned": perfect}, ["judge"])
    assert "relative_reduction_judge" not in summary
    assert summary["mcnemar_p_judge"] == 1.0


def test_a_third_generator_is_compared_with_both() -> None:
    third = measured([0.9] * 6)
    sides = {
        name: with_anomaly_rates(one, ["judge"])
        for name, one in (("base", BASE), ("tuned", TUNED), ("other", third))
    }
    comparisons, summary = compare_sides(sides, ["judge"])
    assert list(comparisons) == [("base", "tuned"), ("base", "other"), ("other", "tuned")]
    rate = "judge_anomaly_rate"
    assert comparisons["base", "other"][rate].difference.value == pytest.approx(-4 / 6)
    assert comparisons["other", "tuned"][rate].difference.value == pytest.approx(1 / 6)
    entries = {tuple(entry["sides"]): entry for entry in summary["comparisons"]}
    # Four pairs differ, all one way: 2 / 2^4; one pair differs: a fair coin.
    assert entries["base", "other"]["mcnemar_p_judge"] == pytest.approx(0.125)
    assert entries["other", "tuned"]["mcnemar_p_judge"] == 1.0
    assert entries["base", "other"]["relative_reduction_judge"] == 1.0
    assert "relative_reduction_judge" not in entries["other", "tuned"]
    found = entries["base", "tuned"]["measures"][rate]
    assert found["means"] == pytest.approx([4 / 6, 1 / 6])
    assert found["difference"] == pytest.approx(-0.5)
    low, high = found["difference_ci95"]
    assert low <= found["difference"] <= high
    assert summary["mcnemar_p_judge"] == entries["base", "tuned"]["mcnemar_p_judge"] == 0.25


def test_the_videos_kept_are_those_shown_and_those_audited() -> None:
    assert shown_videos(100) == [0, 12, 25, 37, 50, 62, 75, 87]
    assert kept_videos(100) == [*range(32), 37, 50, 62, 75, 87]
    assert kept_videos(3) == shown_videos(3) == [0, 1, 2]


def test_results_are_written_for_machines_and_for_people(tmp_path: Path) -> None:
    sides = {
        name: with_anomaly_rates(one, ["judge"])
        for name, one in (("base", BASE), ("tuned", TUNED), ("my-other", TUNED))
    }
    comparisons, summary = compare_sides(sides, ["judge"])
    summary["missing"] = math.nan
    tables = result_tables(
        comparisons, summary, {"judge": [AuditRow("frozen", 0.5, 1.0, 0.25, 0.125)]}
    )
    page = write_results(tmp_path / "out", sides, summary, tables, fps=8.0)
    assert page == tmp_path / "out" / "report.html"
    written = json.loads(
        (tmp_path / "out" / "summary.json").read_text(), parse_constant=pytest.fail
    )
    assert written == summary | {"missing": None}
    names = ["report.html", "report.md", "summary.json"]
    assert sorted(path.name for path in page.parent.iterdir()) == names
    assert page.read_text().count("<figure>") == 18
    assert page.read_text().count("<b>my-other</b>") == 6
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| judge anomaly rate | 66.7% | 16.7% | -50.0 points |" in text
    assert "| judge | 45.0% | 68.3% | +23.3 points |" in text
    assert "McNemar's p-value by judge: judge: 0.25." in text
    assert "## base and my-other" in text
    assert "| frozen | 0.500 | 100.0% | 25.0% | 12.5% |" in text
    bare = {side: dataclasses.replace(one, reports={}) for side, one in sides.items()}
    page = write_results(tmp_path / "bare", bare, summary, tables, fps=8.0)
    assert page.read_text().count("<figure>") == 18


def test_only_the_kept_videos_are_needed(tmp_path: Path) -> None:
    long = measured([0.1, 0.9] * 20)
    kept = kept_videos(40)
    few = dataclasses.replace(long, videos=long.videos[kept])
    assert len(few.videos) < len(long.videos)
    sides = {"base": with_anomaly_rates(few, ["judge"]), "tuned": few}
    sides["tuned"] = sides["base"]
    comparisons, summary = compare_sides(sides, ["judge"])
    tables = result_tables(comparisons, summary, {})
    page = write_results(tmp_path, sides, summary, tables, fps=8.0)
    last = judged_clip(long.videos[35].float() / 255, 8.0, long.reports["judge"][35])
    assert data_uri(draw_clip(last), 8.0) in page.read_text()
