"""The best of n: the curve against all subsets, files that fit together, a run that goes on."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from diffusion_rl.__main__ import main
from diffusion_rl.best_of_n import (
    BestOfNSettings,
    best_of_n,
    expected_best,
    summarise,
    write_summary,
)
from diffusion_rl.commands.best_of_n import claim_scores
from diffusion_rl.rewards import Reward
from tests.tiny_wan import save_tiny_wan

NAN = float("nan")


def test_the_curve_is_the_mean_over_all_subsets() -> None:
    source = torch.Generator().manual_seed(0)
    for count in (1, 4, 7):
        scores = torch.randn(count, generator=source).tolist()
        for k, found in enumerate(expected_best(scores), start=1):
            best = [max(subset) for subset in itertools.combinations(scores, k)]
            assert found == pytest.approx(sum(best) / len(best))
    found = expected_best([1.0, NAN, 5.0])
    assert found[:2] == [3.0, 5.0]
    assert math.isnan(found[2])


def sample(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """Clips of one shade of red, which only the seed decides."""
    shades = torch.tensor([(37 * seed % 11) / 11 for seed in seeds])
    videos = torch.zeros(len(seeds), 2, 3, 16, 16)
    videos[:, :, 0] = shades.view(-1, 1, 1, 1)
    return videos


def red(videos: Tensor, prompts: Sequence[str], *, fps: float) -> Tensor:
    score = videos[:, :, 0].mean((1, 2, 3))
    score[score == 0] = NAN
    return score


REWARDS = [
    Reward("red", red, 2.0),
    Reward("pale", lambda v, p, *, fps: 1 - v[:, :, 0].mean((1, 2, 3)), 0.0),
]


def settings(folder: Path, **changes: object) -> BestOfNSettings:
    return BestOfNSettings(**{"n": 4, "seed": 3, "fps": 8.0, "output": str(folder), **changes})


def test_the_best_of_each_prompt_is_kept_with_all_scores(tmp_path: Path) -> None:
    records = list(best_of_n(sample, REWARDS, ["a", "b", "c"], settings(tmp_path)))
    for number, record in enumerate(records):
        assert record["seeds"] == [3 + 4 * number + place for place in range(4)]
        reds = [(37 * seed % 11) / 11 for seed in record["seeds"]]
        assert record["best"] == reds.index(max(reds))
        assert record["scores"] == [
            None if not one else pytest.approx(2 * one, abs=1e-6) for one in reds
        ]
        assert (tmp_path / record["file"]).stat().st_size > 0
    assert sum(score is None for record in records for score in record["scores"]) == 1
    summary = json.loads(write_summary(tmp_path, records).read_text())
    assert summary["prompts"] == 3
    assert summary["n"] == 4
    assert summary["unjudged_videos"] == 1
    assert summary["prompts_at_k"] == [3, 3, 3, 2]
    first = [
        sum(s for s in r["scores"] if s) / sum(s is not None for s in r["scores"]) for r in records
    ]
    assert summary["expected_best"][0] == pytest.approx(sum(first) / 3)
    whole = [max(r["scores"]) for r in records if None not in r["scores"]]
    assert summary["expected_best"][3] == pytest.approx(sum(whole) / 2)
    assert summary["rewards"]["red"]["best"] > summary["rewards"]["red"]["all"]
    assert summary["rewards"]["pale"]["best"] < summary["rewards"]["pale"]["all"]
    assert summary["videos"] == records


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    whole = list(best_of_n(sample, REWARDS, ["a", "b", "c"], settings(tmp_path / "whole")))
    running = best_of_n(sample, REWARDS, ["a", "b", "c"], settings(tmp_path / "cut"))
    assert [next(running), next(running)] == whole[:2]
    running.close()
    lines = tmp_path / "cut" / "scores.jsonl"
    lines.write_text(lines.read_text()[:-20])  # As a crash in the middle of a line leaves it.
    drawn = []

    def counted(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        drawn.append(prompts[0])
        return sample(prompts, seeds)

    assert list(best_of_n(counted, REWARDS, ["a", "b", "c"], settings(tmp_path / "cut"))) == whole
    assert drawn == ["b", "c"]
    with pytest.raises(ValueError, match="same prompts, seed and n, got .*'a' and seeds from 3"):
        list(best_of_n(sample, REWARDS, ["other"], settings(tmp_path / "cut")))
    lines.write_text("{\n" + lines.read_text())
    with pytest.raises(ValueError, match="one JSON object a line, got '{' in line 1"):
        list(best_of_n(sample, REWARDS, ["a"], settings(tmp_path / "cut")))


def test_scores_of_something_else_are_not_taken_for_these(tmp_path: Path) -> None:
    asked = {"weights": [["a", 1, 2]], "rewards": [{"target": "one", "retries": 0}]}
    claim_scores(tmp_path, {**asked, "weights": None})  # Nothing is scored yet.
    claim_scores(tmp_path, asked)
    list(best_of_n(sample, REWARDS, ["a"], settings(tmp_path)))
    claim_scores(tmp_path, {**asked, "weights": [("a", 1, 2)]})
    patient = {"target": "one", "retries": 3}
    claim_scores(tmp_path, {**asked, "rewards": [patient]})
    other = {**asked, "rewards": [{**patient, "target": "other"}]}
    with pytest.raises(ValueError, match=r"made with rewards\[0\].target=one, now other; choose"):
        claim_scores(tmp_path, other)
    with pytest.raises(
        ValueError, match=r"same settings, got .* with weights=\[.*\], now None; ch"
    ):
        claim_scores(tmp_path, {**asked, "rewards": [patient], "weights": None})
    (tmp_path / "asked.json").unlink()
    with pytest.raises(ValueError, match="made with weights=None, now"):
        claim_scores(tmp_path, asked)


def test_a_prompt_without_a_judged_video_has_no_best(tmp_path: Path) -> None:
    nothing = Reward("nothing", lambda v, p, *, fps: torch.full((len(v),), NAN), 0.0)
    unsure = Reward("unsure", lambda v, p, *, fps: torch.tensor([NAN, 1.0, NAN, 1.0]))
    with pytest.raises(RuntimeError, match="'nothing' returned NaN for 4 of 4"):
        list(best_of_n(sample, [nothing, unsure], ["a"], settings(tmp_path)))
    records = list(best_of_n(sample, [unsure], ["a"], settings(tmp_path, missing_limit=0.5)))
    assert records[0]["best"] == 1
    lone = {"scores": [None], "rewards": {"red": [None]}, "best": None}
    assert summarise([lone])["expected_best"] == [None]
    assert summarise([lone])["rewards"]["red"] == {"all": None, "best": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"n": 0}, "n must be at least 1, got 0"), ({"seed": -1}, "seed must be at least 0, got -1")],
)
def test_settings_outside_their_range_are_refused(
    tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


def test_the_command_draws_judges_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wan = save_tiny_wan(tmp_path / "wan")
    (tmp_path / "prompts.txt").write_text("a red circle\nthe blue square\n")
    tree = {
        "generator": {
            **{"path": str(wan), "height": 16, "width": 16, "num_frames": 5, "fps": 8.0},
            "max_sequence_length": 12,
        },
        "lora": {"rank": 2},
        "rollout": {"num_inference_steps": 2, "stochastic_steps": 1},
        "rewards": [{"name": "red", "target": f"{__name__}:red"}],
        "prompts": str(tmp_path / "prompts.txt"),
        "output": str(tmp_path / "run"),
    }
    OmegaConf.save(OmegaConf.create(tree), tmp_path / "run.yaml")
    output = tmp_path / "best"
    words = ["best-of-n", str(tmp_path / "run.yaml"), "--n", "3", "--output", str(output)]
    assert main([*words, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    summary = json.loads((output / "best_of_n.json").read_text())
    curve = summary["expected_best"]
    assert curve == sorted(curve)
    assert curve[0] < curve[2]
    assert {path.name for path in output.glob("*.mp4")} == {"0000.mp4", "0001.mp4"}
    assert str(output) in capsys.readouterr().out
    words += ["--prompts", str(tmp_path / "prompts.txt")]
    assert main(words) == 0
    assert main([*words, "--noise-level", "0.5"]) == 1
    assert "noise_level" in capsys.readouterr().err
    assert main([*words, "rewards.0.weight=-1"]) == 1
    assert (
        "made with rewards[0].weight=1.0, now -1.0; choose another output"
        in capsys.readouterr().err
    )
