"""The demo's words and numbers, on evaluations made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cac_reward.report import AnomalyReport, TimeWindow
from cac_reward.report import Finding as JudgeFinding
from diffusion_rl.evaluation import Measured
from examples.toy_world import demo, demo_report
from examples.toy_world.demo_evaluation import (
    JUDGE,
    ORACLE,
    UNWORLDLY,
    Evaluation,
    EvaluationSettings,
    evaluation_prompts,
    fault_rates,
    judge_fault_rates,
    oracle_diversity,
    outcomes,
    side_summary,
)
from examples.toy_world.oracle import OracleReport
from examples.toy_world.tracks import Finding


def test_how_to_go_on() -> None:
    assert demo.again([]).startswith("make demo")
    assert demo.again(["--seed", "2", "--fresh"]) == f"{demo.COMMAND} --seed 2"


def test_where_it_stopped_before_the_first_update(tmp_path: Path) -> None:
    options = demo.build_parser().parse_args(["--output", str(tmp_path)])
    assert demo.where_it_stopped(options) == "stopped before the first update was done"


def test_headline() -> None:
    found = {"relative_reduction_oracle": 0.615, "relative_reduction_oracle_ci95": [0.5, 0.7]}
    assert "62% fewer (95% interval 50% to 70%)" in demo.headline(found)
    nothing = {"relative_reduction_oracle": None, "relative_reduction_oracle_ci95": [None, None]}
    assert "nothing to reduce" in demo.headline(nothing)


@pytest.mark.parametrize(
    ("name", "value"),
    [("videos_per_prompt", 1), ("batch_size", 0), ("audit_videos", 0), ("oracle_clips", 0)],
)
def test_evaluation_settings_are_checked(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        EvaluationSettings(**{name: value})


def test_evaluation_prompts_come_in_order(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("b\na\n")
    assert evaluation_prompts(EvaluationSettings(prompts=str(file)), ["c"]) == ["b", "a"]


def oracle_report(*kinds: str, unworldly: tuple[str, ...] = (), followed: bool = True):
    findings = tuple(Finding(kind, (0.0, 0.5), (), "red circle") for kind in kinds)
    return OracleReport(bool(kinds or unworldly), findings, unworldly, (), 0.02, followed)


def measured(reports: list[OracleReport], score: list[float], prompts: str = "aabb") -> Measured:
    """What one generator's videos measured, from the oracle's reports and the judge's scores."""
    ones = torch.ones(len(reports))
    oracle_score = torch.tensor([float(not report.broken) for report in reports])
    values = {ORACLE: oracle_score, JUDGE: torch.tensor(score), "alignment": ones}
    values |= {"diversity": ones * 0.1, "sharpness": ones, "contrast": ones}
    videos = torch.zeros(len(reports), 5, 3, 16, 16, dtype=torch.uint8)
    seeds = tuple(range(len(reports)))
    judged = {ORACLE: reports, JUDGE: [{"score": one} for one in score]}
    return Measured(tuple(prompts), seeds, values, judged, videos)


@pytest.fixture
def evaluation() -> Evaluation:
    """Three of four broken before, one after."""
    base = [oracle_report("vanish"), oracle_report("freeze", "freeze"), oracle_report()]
    base.append(oracle_report(unworldly=("no object",), followed=False))
    tuned = [oracle_report(), oracle_report(), oracle_report("flicker"), oracle_report()]
    return Evaluation(
        measured(base, [0.1, 0.2, 0.9, 0.3]),
        measured(tuned, [0.8, 0.9, 0.2, float("nan")]),
        8.0,
        [],
        {},
    )


def test_the_page_says_what_guidance_alone_does(evaluation: Evaluation) -> None:
    rates = {"base": {"anomaly_rate_oracle": 0.5, "motion": 0.05}}
    rates["tuned"] = {"anomaly_rate_oracle": 0.25, "motion": 0.0625}
    (table,) = demo_report._guided(replace(evaluation, guided=rates)).tables
    assert table.rows == [["anomaly rate oracle", "50.0%", "25.0%"], ["motion", "0.0500", "0.0625"]]


def test_outcomes_and_rates(evaluation: Evaluation) -> None:
    found = side_summary(evaluation.base)
    assert found["anomaly_rate_oracle"] == 0.75
    assert found["anomaly_rate_judge"] == 0.75
    assert found["prompt_match"] == 0.75
    assert found["motion"] == pytest.approx(0.02)
    # The video that could not be judged takes no part.
    assert side_summary(evaluation.tuned)["anomaly_rate_judge"] == pytest.approx(1 / 3)
    assert outcomes(evaluation.tuned)["anomaly_rate_judge"].isnan().tolist() == [False] * 3 + [True]
    rates = fault_rates(evaluation.base)
    assert (rates["vanish"], rates["freeze"], rates["flicker"], rates[UNWORLDLY]) == (
        *(0.25, 0.25, 0.0, 0.25),
    )


def test_the_judges_own_types_are_counted(evaluation: Evaluation) -> None:
    def report(*kinds: str) -> AnomalyReport:
        findings = tuple(JudgeFinding(kind, TimeWindow(0.0, 0.5)) for kind in kinds)
        return AnomalyReport(score=0.1, judge_id="j", fps=8.0, num_frames=13, findings=findings)

    judged = [report("vanish", "vanish"), report("vanish", "melt"), report(), report("freeze")]
    reports = {**evaluation.base.reports, JUDGE: judged}
    rates = judge_fault_rates(replace(evaluation.base, reports=reports))
    assert (rates["vanish"], rates["freeze"], rates["another"]) == (0.5, 0.25, 0.25)


def test_reduction_and_tests(evaluation: Evaluation) -> None:
    reduction = evaluation.reduction()
    assert reduction is not None
    assert reduction.value == pytest.approx(1 - 0.25 / 0.75)
    tests = evaluation.tests()
    assert (tests["oracle"].only_base, tests["oracle"].only_tuned) == (3, 1)
    assert (tests["judge"].only_base, tests["judge"].only_tuned) == (2, 1)
    sound = measured([oracle_report()] * 4, [0.9] * 4)
    assert Evaluation(sound, evaluation.tuned, 8.0, [], {}).reduction() is None


def test_the_summary_says_what_the_table_says(evaluation: Evaluation) -> None:
    """The judge's rates are over the pairs judged on both sides, in both places."""
    state = SimpleNamespace(videos_generated=9, reward_calls=18, seconds=1.26)
    run = SimpleNamespace(state=state, settings=SimpleNamespace(seed=7))
    summary = demo_report.build_summary(run, evaluation)
    assert summary["base"]["anomaly_rate_judge"] == pytest.approx(2 / 3)
    assert summary["tuned"]["anomaly_rate_judge"] == pytest.approx(1 / 3)
    assert (summary["base"]["videos"], summary["seed"]) == (4, 7)
    assert (summary["videos_generated_in_training"], summary["reward_calls"]) == (9, 18)
    assert summary["training_seconds"] == 1.3
    assert "66.7%" in demo_report.console_table(evaluation)


def test_the_pairs_shown_are_the_first_not_the_best(evaluation: Evaluation) -> None:
    assert demo_report.choose_pairs(evaluation) == ([0, 3], [2])
    # What was broken before as well is no loss.
    both = [oracle_report("vanish"), oracle_report()]
    worse = [oracle_report("vanish"), oracle_report("freeze")]
    pair = [measured(reports, [0.5, 0.5], "ab") for reports in (both, worse)]
    assert demo_report.choose_pairs(Evaluation(*pair, 8.0, [], {})) == ([0], [1])


def test_diversity_is_within_prompts() -> None:
    videos = torch.zeros(4, 4, 3, 16, 16)
    videos[1] = 0.5
    found = oracle_diversity(videos, ["a", "a", "b", "c"], fps=8.0)
    assert found[:2].tolist() == pytest.approx([0.5, 0.5])
    assert found[2:].isnan().all()


def test_the_console_table_has_aligned_columns(evaluation: Evaluation) -> None:
    lines = demo_report.console_table(evaluation).splitlines()
    assert lines[0].split() == ["measure", "base", "tuned", "change", "95%", "interval", "pairs"]
    assert set(lines[1]) == {"-"}
    assert len(lines) == 7
    ends = {len(line) for line in lines if line != lines[1]}
    assert len(ends) == 1
    assert "75.0%" in lines[2]


def test_summary_is_strict_json_even_without_a_reduction(tmp_path: Path) -> None:
    demo_report.save_summary({"relative_reduction_oracle": None}, tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "relative_reduction_oracle": None
    }
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        demo_report.save_summary({"x": float("nan")}, tmp_path / "summary.json")


def test_versions_of_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_report, "PACKAGES", ("torch", "no-such-package"))
    found = demo_report.versions()
    assert found["no-such-package"] == "not installed"
    assert found["torch"].startswith("2.")
