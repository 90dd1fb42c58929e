"""The figures of the model cards, against brute force and by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cac_reward.report import AnomalyReport, Finding, TimeWindow
from diffusion_rl.evaluation import Measured
from examples.toy_world import measure
from examples.toy_world.model_cards import generator_card, judge_card
from examples.toy_world.oracle import OracleReport
from examples.toy_world.tracks import Finding as OracleFinding
from tests.tiny_wan import build_tiny_wan

FIGURES = {
    name: {
        **{"num_inference_steps": 10, "guidance_scale": scale},
        "generator": {
            **{"videos": 256, "anomaly_rate_oracle": 0.512 + shift, "prompt_match": 0.874},
            **{"motion": 0.0321, "diversity": 0.0911, "faults": {"vanish": 0.123}},
        },
        "judge": {
            **{
                mode: {
                    **{"verdict_auc": auc - shift, "verdict_accuracy": 0.88, "window_iou": 0.61},
                    "unjudged": math.nan,
                }
                for mode, auc in (("full", 0.934), ("fast", 0.921))
            },
            "alignment_auc": 0.777,
        },
    }
    for name, scale, shift in (("guided", 2.5, 0.0), ("unguided", 1.0, 0.2))
} | {
    "oracle": {"clips": 2000, "accuracy": 0.98, "false_alarm_rate": 0.01, "miss_rate": 0.03},
    "rendered": {"clips": 512, "verdict_auc": 0.95, "verdict_accuracy": 0.9},
}


def test_roc_auc_counts_pairs() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        score = random.integers(0, 5, 30) / 4
        positive = random.random(30) < 0.4
        pairs = [(a > b) + (a == b) / 2 for a in score[positive] for b in score[~positive]]
        assert measure.roc_auc(score, positive) == pytest.approx(np.mean(pairs))
    assert math.isnan(measure.roc_auc(score, np.ones(30, bool)))


def report(score: float, *windows: tuple[float, float]) -> AnomalyReport:
    findings = tuple(Finding("vanish", TimeWindow(*window)) for window in windows)
    return AnomalyReport(score=score, judge_id="j", fps=8.0, num_frames=13, findings=findings)


def truth(*windows: tuple[float, float]) -> OracleReport:
    findings = tuple(OracleFinding("vanish", window, (), "red circle") for window in windows)
    return OracleReport(bool(windows), findings, (), (), 0.0, True)


def test_windows_are_compared_where_both_call_a_clip_broken() -> None:
    judge = [report(0.1, (0.0, 1.0)), report(0.9, (0.0, 1.0)), report(0.2, (0.0, 0.5))]
    judge.append(report(0.1, (0, 0.25)))
    oracle = [truth((0.5, 1.0)), truth((0.0, 1.0)), truth(), truth((0.5, 0.75))]
    assert measure.mean_window_overlap(judge, oracle) == pytest.approx((0.5 + 0.0) / 2)
    asked = replace(report(0.1), windows=(TimeWindow(0.5, 1.0),))
    assert measure.mean_window_overlap([asked], oracle[:1]) == pytest.approx(1.0)
    assert math.isnan(measure.mean_window_overlap([report(0.9)], [truth()]))


def test_a_judge_is_measured_against_the_oracle() -> None:
    """Broken, sound, broken, sound; the last clip but one could not be judged."""
    truths = [truth((0.0, 0.5)), truth(), truth((0.5, 1.0)), truth()]
    scores = torch.tensor([0.1, 0.8, math.nan, 0.3])
    reports = [report(0.1, (0.0, 0.5)), report(0.8), report(0.5), report(0.3, (0.0, 0.5))]
    ones = torch.ones(4)
    measured = Measured(
        prompts=("a",) * 4,
        seeds=(0, 1, 2, 3),
        values={
            **{"cac": scores, "oracle": torch.tensor([0.0, 1.0, 0.0, 1.0]), "diversity": ones},
            **{"alignment": torch.tensor([0.1, 0.9, 0.8, 0.2]), "sharpness": ones},
            "contrast": ones,
        },
        reports={
            "cac": reports,
            "oracle": [
                replace(one, prompt_followed=row in (1, 2)) for row, one in enumerate(truths)
            ],
        },
        videos=torch.zeros(0, 5, 3, 16, 16, dtype=torch.uint8),
    )
    figures = measure.judge_figures(measured, "cac")
    assert figures["verdict_auc"] == 1.0
    assert figures["verdict_accuracy"] == pytest.approx(2 / 3)
    assert figures["window_iou"] == 1.0
    assert figures["unjudged"] == 0.25
    assert measure.alignment_auc(measured) == 1.0


def test_rendered_figures_of_a_judge_that_knows() -> None:
    """A judge that sees everything clean is right about the sound half only."""
    vae = build_tiny_wan().vae

    def optimist(videos, prompts, *, fps):
        return torch.full((len(videos),), 0.9)

    figures = measure.rendered_figures(optimist, vae, 8)
    assert figures["clips"] == 8
    assert figures["verdict_auc"] == pytest.approx(0.5)
    assert 0 < figures["verdict_accuracy"] < 1


def test_round_trip_keeps_layout_and_range() -> None:
    videos = torch.rand(2, 5, 3, 16, 16)
    back = measure.round_trip(build_tiny_wan().vae, list(videos))
    assert back.shape == videos.shape
    assert back.min() >= 0
    assert back.max() <= 1


def test_parameters_and_size_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, tmp_path / "x.safetensors")
    save_file({"c": torch.zeros(5)}, tmp_path / "part" / "y.safetensors")
    assert measure.parameter_count(tmp_path) == 15
    total = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert measure.size_mb(tmp_path) == pytest.approx(total / 1e6)


def test_bars_say_what_is_not_reached() -> None:
    reached = {name: good for name, _, _, good in measure.bars(FIGURES)}
    assert all(reached.values())
    assert len(reached) == 5
    guided = FIGURES["guided"]
    generator = {**guided["generator"], "anomaly_rate_oracle": 0.8}
    low = {**FIGURES, "guided": {**guided, "generator": generator}}
    failed = [name for name, _, _, good in measure.bars(low) if not good]
    assert failed == ["generator's broken share"]


def test_cards_state_what_was_measured(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000, 1250)}, tmp_path / "x.safetensors")
    seconds = {"autoencoder": 600.0, "generator": 1800.0, "judge": 2400.0}
    card = generator_card(tmp_path, FIGURES, seconds, "2 cores of a CPU")
    for text in ("1.25M parameters", "5.0 MB", "51.2%", "87.4%", "30 minutes", "2 cores of a CPU"):
        assert text in card
    assert "guidance_scale=2.5" in card
    assert "| figure | guidance 2.5, 10 steps | without guidance, 10 steps |" in card
    assert "| videos with a fault | 51.2% | 71.2% |" in card
    card = judge_card(tmp_path, FIGURES, seconds, "2 cores of a CPU")
    for text in ("0.934", "0.921", "0.610", "0.777", "40 minutes", "not measurable", "98.0%"):
        assert text in card
    assert "| verdict ROC-AUC, mode full | 0.934 | 0.734 |" in card
    assert card.isascii()
