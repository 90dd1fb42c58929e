"""The options that `score` and `serve` share: what they load, and what is refused by name."""

import argparse
import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from cac_reward.__main__ import main
from cac_reward.frames import JudgeSettings, ScanSettings
from cac_reward.judge_options import (
    JudgeOptions,
    add_judge_arguments,
    given_judge_options,
    judge_options,
)
from cac_reward.records import read_records
from cac_reward.scorer import CaCScorer
from cac_reward.video import Video
from tests.cac_reward.test_judges_endpoint import serving
from tests.tiny_judge import build_tiny_judge

URL = "http://127.0.0.1:1/v1"


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny_judge(tmp_path_factory.mktemp("judge"))
    scan = ScanSettings(fps=8.0, max_frames=6, pixels=1024)
    JudgeSettings(wording="brief", scan=scan).save(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    generator = torch.Generator().manual_seed(0)
    Video.from_float(torch.rand(20, 3, 32, 32, generator=generator), 8.0).save(path)
    return path


def parsed(*arguments: str) -> JudgeOptions:
    parser = argparse.ArgumentParser()
    parser.add_argument("--judge")
    add_judge_arguments(parser)
    return judge_options(parser.parse_args(["--judge", "J", *arguments]))


def test_every_field_has_its_argument_and_every_default_is_left_out() -> None:
    assert parsed() == JudgeOptions(judge="J")
    given = ["--revision", "r", "--base", "b", "--device", "cuda", "--dtype", "bfloat16"]
    given += ["--attention", "eager", "--quantization", "4bit", "--mode", "fast"]
    given += ["--num-votes", "4", "--seed", "7", "--scan", "fps=4", "pixels=65536"]
    found = parsed(*given, "--inspect", "margin_seconds=0.5")
    expected = JudgeOptions(
        judge="J",
        revision="r",
        base="b",
        device="cuda",
        dtype="bfloat16",
        attention="eager",
        quantization="4bit",
        mode="fast",
        num_votes=4,
        seed=7,
        scan={"fps": 4, "pixels": 65536},
        inspect={"margin_seconds": 0.5},
    )
    assert found == expected
    assert JudgeOptions(**json.loads(json.dumps(asdict(found)))) == found, "as the server sends it"
    elsewhere = parsed("--endpoint", URL, "--family", "qwen3_5", "--seed", "3")
    assert elsewhere == JudgeOptions(judge="J", endpoint=URL, family="qwen3_5", seed=3)
    parser = argparse.ArgumentParser()
    add_judge_arguments(parser)
    declared = {one.dest for one in parser._actions} - {"help"}
    assert declared == {one.name for one in fields(JudgeOptions)} - {"judge"}
    assert given_judge_options(parser.parse_args([])) == []
    assert given_judge_options(parser.parse_args(["--scan", "fps=2", "--mode", "fast"])) == [
        "mode",
        "scan",
    ]


def test_a_judge_here_is_loaded_as_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(
        CaCScorer, "from_pretrained", lambda judge, **rest: loaded.append((judge, rest))
    )
    given = {"base": "b", "device": "cuda", "attention": "eager", "quantization": "8bit", "seed": 5}
    JudgeOptions(judge="J", num_votes=3, scan={"fps": 4}, **given).load(cache="c")
    JudgeOptions(judge="J").load()
    asked = {"mode": "full", "scan": {"fps": 4}, "inspect": None, "num_votes": 3, "cache": "c"}
    assert loaded[0] == ("J", {**asked, **given})
    plain = {"mode": "full", "scan": None, "inspect": None, "num_votes": None, "cache": None}
    assert loaded[1] == ("J", plain)


def test_an_endpoint_is_asked_as_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai", reason="the extra 'serve' is not installed")
    asked: list[Any] = []
    monkeypatch.setattr(CaCScorer, "from_endpoint", lambda *a, **rest: asked.append((a, rest)))
    JudgeOptions(judge="M", endpoint=URL, mode="fast", inspect={"fps": 2}).load(cache="c")
    JudgeOptions(judge="M", endpoint=URL, family="qwen2_5_vl", num_votes=3, seed=9).load()
    (where, first), (_, second) = asked
    assert where == (URL, "M")
    assert (first["mode"], first["cache"]) == ("fast", "c")
    assert first["settings"] == JudgeSettings().seen_as(None, {"fps": 2})
    assert (first["options"].probabilities, first["options"].seed) == ("auto", 0)
    options = second["options"]
    assert (options.probabilities, options.num_votes, options.seed) == ("votes", 3, 9)
    assert options.family == "qwen2_5_vl"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--endpoint", "127.0.0.1:8000"], "endpoint must begin with one of"),
        (["--judge", URL], "judge must be a folder, a hub id or a model's name, .* as endpoint"),
        (["--family", "qwen3_5"], "family must be left out without endpoint; .*got 'qwen3_5'"),
        (["--patch-factor", "8"], "patch_factor must be left out without endpoint; .*got 8"),
        (["--settings", "f"], "settings must be left out without endpoint; .*got 'f'"),
        (["--endpoint", URL, "--settings", "/no"], "settings must be a folder with a cac_judge.j"),
        (["--seed", "0"], "seed must be left out without num_votes; nothing else .*got 0"),
        *(
            (["--endpoint", URL, f"--{name}", "x"], f"{name} must be left out with endpoint; .*'x'")
            for name in ("device", "dtype", "attention", "revision", "base", "quantization")
        ),
        (["--num-votes", "1"], "num_votes must be at least 2, got 1"),
        (["--scan", "frames=3"], "scan must have no key but .*'max_frames', .*got 'frames'"),
        (["--inspect", "max_frames=1"], "inspect.max_frames must be an integer of at least 2, got"),
        (["--attention", "fast"], "attention must be one of .*got 'fast'"),
        (["--quantization", "2bit"], "quantization must be None or one of .*got '2bit'"),
        (["--base", "b"], "base must be None for a whole checkpoint, got 'b'"),
        (["--endpoint", URL, "--judge", "M"], "endpoint http://127.0.0.1:1/v1 must answer for the"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    judge: Path,
    clip: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_: 0.0)
    assert main(["score", str(clip), "--judge", str(judge), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    with pytest.raises(ValueError, match=f"error: {message}"):
        raise ValueError(printed.err)


@pytest.mark.parametrize("value", ["fps", "fps=", "=3", "fps=two", "fps=true", "clip.mp4"])
def test_a_setting_must_be_a_number(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed("--scan", value)
    assert f"must be KEY=NUMBER, got '{value}'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_judge_at_an_endpoint_says_what_it_says_here(
    toy_judge_folder: Path, toy_videos: torch.Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("openai", reason="the extra 'serve' is not installed")
    (tmp_path / "clips").mkdir()
    for name, frames in zip(("a", "b"), toy_videos, strict=True):
        Video.from_float(frames, 8.0).save(tmp_path / "clips" / f"{name}.mp4")
    clips = ["score", str(tmp_path / "clips"), "--mode", "fast", "--scan", "max_frames=5"]
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    main([*clips, "--judge", str(toy_judge_folder), "--output", str(here)])
    how = ["--patch-factor", "8", "--settings", str(toy_judge_folder)]
    with serving() as url:
        main([*clips, "--endpoint", url, "--judge", "toy", *how, "--output", str(there)])
    for path, record in read_records(there).items():
        found, expected = record.report, read_records(here)[path].report
        assert found is not None
        assert expected is not None
        assert found.scan_frames == expected.scan_frames
        assert len(found.scan_frames) == 5
        assert found.settings == expected.settings
        assert found.reward == pytest.approx(expected.reward, abs=1e-3, nan_ok=True)
    # With so few frames it may fail to judge one of them; not to be judged is an answer, too.
    rewards = [record.report.reward for record in read_records(there).values() if record.report]
    assert not all(math.isnan(reward) for reward in rewards)


def test_without_openai_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'cac-reward\[serve\]'"):
        JudgeOptions(judge="M", endpoint=URL).load()


def test_the_settings_given_reach_the_judge_and_its_reports(
    judge: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "r.jsonl"
    asked = ["score", str(clip), "--judge", str(judge), "--output", str(output), "--mode", "fast"]
    given = ["--scan", "max_frames=3", "fps=4", "--num-votes", "2", "--attention", "eager"]
    given += ["--seed", "4"]
    assert main([*asked, *given]) in (0, 3)
    report = read_records(output)[str(clip)].report
    assert report is not None
    assert len(report.scan_frames) == 3
    assert report.attention == "eager"
    assert report.decoder.startswith("verdict by 2 sampled votes at temperature 1, seed 4;")
    assert report.settings == {
        "family": "qwen3_vl",
        "quantization": None,
        "wording": "brief",
        "domain": None,
        "scan.fps": 4,
        "scan.max_frames": 3,
        "scan.pixels": 1024,
        "inspect.fps": 8.0,
        "inspect.max_frames": 24,
        "inspect.pixels": 262144,
        "inspect.margin_seconds": 0.25,
        "calibration.temperature": 1.0,
    }
    for more, message in (
        ([*given, "--scan", "max_frames=4", "fps=4"], "scan.max_frames must be .*is 3 .*got 4"),
        ([*given, "--inspect", "margin_seconds=0"], "inspect.margin_seconds must be .*is 0.25"),
        ([*given, "--seed", "5"], "decoder must be as in .*seed 4; .*got '.*seed 5;"),
        (given[:3], "decoder must be as in .*'verdict by 2 .*got 'greedy'"),
    ):
        capsys.readouterr()
        before = output.read_bytes()
        assert main([*asked, *more]) == 2
        with pytest.raises(ValueError, match=f"error: {message}"):
            raise ValueError(capsys.readouterr().err)
        assert output.read_bytes() == before
    assert main([*asked, *given]) in (0, 3), "the same question goes on"
    assert len(output.read_bytes()) == len(before)
