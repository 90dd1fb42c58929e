"""Both sides of an evaluation drawn from one generator, and what is written of them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from diffusion_rl.before_after import (
    build_samplers,
    compare_sides,
    with_anomaly_rates,
    write_results,
)
from diffusion_rl.evaluation import Measured
from diffusion_rl.lora import attach_lora, trained_parameters
from diffusion_rl.rollout import RolloutSettings, sample_videos
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
    assert comparisons["judge_anomaly_rate"].base == pytest.approx(4 / 6)
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


def test_results_are_written_for_machines_and_for_people(tmp_path: Path) -> None:
    sides = {
        "base": with_anomaly_rates(BASE, ["judge"]),
        "tuned": with_anomaly_rates(TUNED, ["judge"]),
    }
    comparisons, summary = compare_sides(sides, ["judge"])
    page = write_results(tmp_path / "out", sides, comparisons, summary, {}, fps=8.0)
    assert page == tmp_path / "out" / "report.html"
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "summary.json"]
    assert page.read_text().count("<figure>") == 12
    bare = {side: dataclasses.replace(one, reports={}) for side, one in sides.items()}
    page = write_results(tmp_path / "bare", bare, comparisons, summary, {}, fps=8.0)
    assert page.read_text().count("<figure>") == 12
