"""The benchmark of the scorer measures what it says: work, memory, and what forgetting costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from benchmarks import score
from benchmarks.judges import SHAPES, MeasuredJudge, random_config
from cac_reward.scorer import CaCScorer
from tests.conftest import CHECKPOINTS

BILLIONS = {"qwen3-vl-4b": 4.44, "qwen3-vl-8b": 8.77}
"""Parameters of the published models, from their cards on the hub."""


@pytest.fixture(scope="module")
def judge() -> MeasuredJudge:
    return MeasuredJudge.from_pretrained(CHECKPOINTS / "judge")


def test_what_is_counted_is_what_reports_say(judge: MeasuredJudge) -> None:
    count = judge.watch()
    clips = score.toy_clips(10, seed=1_000_000)
    scorer = CaCScorer(judge, mode="fast", clips_at_once=2)
    rows = {turns: score.measure(scorer, count, clips, turns, 1) for turns in score.TURNS}
    reports = scorer.inspect(clips)
    first = sum(len(report.scan_frames) for report in reports)
    again = [report for report in reports if report.windows]
    dense = sum(len(report.inspect_frames) for report in again)
    seen_twice = sum(len(report.scan_frames) for report in again)
    assert 0 < len(again) < len(reports)
    kept, naive = rows["continued"], rows["from scratch"]
    assert kept.frames_encoded == first + dense
    assert naive.frames_encoded == first + dense + seen_twice
    assert naive.tokens_read > kept.tokens_read
    assert kept.second_looks == len(again) / len(reports)
    assert kept.clips_per_second == pytest.approx(10 / kept.seconds)


def test_forgetting_changes_no_score(judge: MeasuredJudge) -> None:
    clips = score.toy_clips(3, seed=1_000_000)
    scorer = CaCScorer(judge, mode="fast")
    scores = []
    for judge.forgetful in (False, True):
        scores.append(torch.tensor([report.reward for report in scorer.inspect(clips)]))
    judge.forgetful = False
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-4)  # Other batches.


def test_scripted_answers_take_every_clip_through_both_turns(judge: MeasuredJudge) -> None:
    judge.scripted = True
    reports = CaCScorer(judge, max_call_tokens=3, max_findings_tokens=3).inspect(
        [score.Video(torch.zeros(40, 3, 32, 32, dtype=torch.uint8), 8.0)] * 2
    )
    judge.scripted = False
    assert [(one.score, one.error, len(one.findings)) for one in reports] == [
        (pytest.approx(0.1), None, 1)
    ] * 2


@pytest.mark.parametrize("name", SHAPES)
def test_random_weights_have_the_published_size(name: str, judge: MeasuredJudge) -> None:
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(random_config(name, judge._tokenizer))
    assert model.num_parameters() / 1e9 == pytest.approx(BILLIONS[name], abs=0.01)


def test_a_table_and_json_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--judge", str(CHECKPOINTS / "judge"), "--output", str(tmp_path), "--modes", "fast"]
    assert score.main([*given, "--clips", "2", "--batches", "2", "--repeats", "1"]) == 0
    saved = json.loads((tmp_path / "score.json").read_text())
    assert [row["turns"] for row in saved["rows"]] == list(score.TURNS)
    assert saved["rows"][0]["peak_bytes"] > 1e8
    table = (tmp_path / "score.md").read_text()
    assert table in capsys.readouterr().out
    assert "| fast | 2 | " in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="gpu: this machine has a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--random-weights", "qwen3-vl-4b", "--device", "cuda", "--output", str(tmp_path)]
    assert score.main(given) == 0
    assert "skipped: --device cuda was asked for and this machine has no CUDA" in (
        capsys.readouterr().out
    )


PEAKS = """
import torch
from benchmarks import score

score.reset_peak("cpu")
print(score.read_peak("cpu"))
block = torch.ones(50_000_000)
print(score.read_peak("cpu"))
del block
score.reset_peak("cpu")
print(score.read_peak("cpu"))
"""


def test_the_peak_is_forgotten_and_found() -> None:
    """In a process of its own: this one frees what other tests held at any time."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    before, held, after = map(float, done.stdout.split())
    assert held - before > 0.9 * 4 * 50_000_000
    assert after - before < 1e8
