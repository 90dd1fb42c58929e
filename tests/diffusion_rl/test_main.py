"""The commands as a user types them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion_rl import rewards
from diffusion_rl.__main__ import INTERRUPTED, main
from diffusion_rl.checkpoint import latest_checkpoint
from diffusion_rl.launch import CHECKPOINTS, LORA
from diffusion_rl.rewards import Reward, RewardSettings
from diffusion_rl.sampling import draw_videos
from diffusion_rl.tracking import read_metrics
from tests.tiny_wan import save_tiny_wan

REWARDS = """
import time

def red(videos, prompts, *, fps):
    return videos[:, :, 0].mean((1, 2, 3))

def slow_red(videos, prompts, *, fps):
    time.sleep(0.3)
    return red(videos, prompts, fps=fps)

def clean(videos, prompts, *, fps):
    score = red(videos, prompts, fps=fps)
    reports = [{"findings": [{"type": "vanish", "window": [0.0, 0.25]}]} for _ in prompts]
    return {"score": (score > score.median()).float(), "reports": reports}

def loud(videos, prompts, *, fps):
    return 5 * red(videos, prompts, fps=fps)

class Faded:
    def __init__(self, share):
        self.share = share

    def __call__(self, videos, prompts, *, fps):
        return self.share * red(videos, prompts, fps=fps)
"""
CONFIG = """
generator:
  {path: wan, height: 16, width: 16, num_frames: 5, fps: 8, max_sequence_length: 12}
lora: {rank: 2}
rollout: {num_inference_steps: 3, stochastic_steps: 1, prompts_per_update: 2, videos_per_prompt: 2}
rewards: [{name: red, target: "tiny_rewards:red"}]
guards: [{statistic: contrast}]
prompts: prompts.txt
updates: 2
output: run
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("wan") / "wan")


@pytest.fixture
def place(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a user has it, and the current one."""
    (tmp_path / "wan").symlink_to(pipeline)
    (tmp_path / "tiny_rewards.py").write_text(REWARDS)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "prompts.txt").write_text("a red circle\nthe blue square\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_train_says_what_runs_and_where_it_went(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "tiny.yaml", "updates=3"]) == 0
    printed = capsys.readouterr()
    assert "lora: run/lora   metrics: run/metrics.jsonl" in printed.out
    assert "3/3" in printed.err
    assert "reward 0." in printed.err
    assert (place / "run" / LORA).is_dir()
    assert len(read_metrics(place / "run" / "metrics.jsonl")) == 3


def test_overrides_may_follow_options(place: Path) -> None:
    assert main(["train", "tiny.yaml", "--restart", "updates=1", "output=other"]) == 0
    assert len(read_metrics(place / "other" / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny.yaml", "updats=3"], "updats must be a known key"),
        (["small.yaml"], "config must be an existing YAML file"),
        (["tiny.yaml", "rewards[0].target=tiny_rewards:rd"], "target .*near.*: red"),
        (["tiny.yaml", "generator.path=Wan-AI/none"], "got Wan-AI/none; .*--local-path FOLDER"),
        (["tiny.yaml", "--local-path", "nothing"], "--local-path must be an existing folder"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    import re

    assert main(["train", *words]) == 1
    printed = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, printed[-1])
    assert "Traceback" not in "".join(printed)
    with pytest.raises((ValueError, OSError, ImportError), match=message):
        main(["train", *words, "--traceback"])


def test_an_unknown_option_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "tiny.yaml", "--resume"])
    assert "unrecognized arguments: --resume" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved_and_says_how_to_go_on(
    place: Path, repository: Path, number: signal.Signals
) -> None:
    words = ["train", "tiny.yaml", "updates=500", "rewards[0].target=tiny_rewards:slow_red"]
    paths = os.pathsep.join([str(repository), str(place)])
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusion_rl", *words],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # A job in the background of a script ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = place / "run" / "metrics.jsonl"
    while process.poll() is None and len(read_metrics(metrics)) < 2:
        time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate()
    assert process.returncode == INTERRUPTED
    step = int(latest_checkpoint(place / "run" / CHECKPOINTS).name[5:])
    assert step >= 1
    again = "python -m diffusion_rl " + " ".join(words)
    assert f"stopped after update {step} of 500; go on with: {again}" in printed

    again_words = [*words[:2], f"updates={step + 1}", words[3]]
    assert main(again_words) == 0
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, step + 2))


def test_sample_writes_a_video_for_each_prompt(place: Path) -> None:
    main(["train", "tiny.yaml", "updates=1"])
    words = ["sample", "tiny.yaml", "--prompts", "prompts.txt", "--output"]
    assert main([*words, "base"]) == 0
    assert main([*words, "tuned", "--lora", "run/lora", "--format", "webp", "--scale", "2"]) == 0
    assert main([*words, "noisy", "--noise-level", "0.7"]) == 0
    noisy, plain = ((place / side / "0000.mp4").read_bytes() for side in ("noisy", "base"))
    assert noisy != plain
    assert sorted(path.name for path in (place / "base").iterdir()) == ["0000.mp4", "0001.mp4"]
    assert sorted(path.name for path in (place / "tuned").iterdir()) == ["0000.webp", "0001.webp"]


def test_a_lora_of_another_model_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", "tiny.yaml", "updates=1"])
    save_tiny_wan(place / "deeper", layers=3)
    words = ["sample", "tiny.yaml", "generator.path=deeper", "--prompts", "prompts.txt"]
    assert main([*words, "--lora", "run/lora"]) == 1
    assert "must fit the generator's transformer" in capsys.readouterr().err


def test_evaluate_compares_and_writes_a_report(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", "tiny.yaml", "updates=1", "optimizer.learning_rate=0.1"])
    words = ["evaluate", "--lora", "run/lora", "--prompts", "prompts.txt"]
    words += ["--measure", "held_out=tiny_rewards:clean", "--clean", "held_out"]
    assert main([*words, "--videos-per-prompt", "3"]) == 0
    printed = capsys.readouterr().out
    assert "held_out_anomaly_rate" in printed
    assert "report: evaluation/report.html" in printed
    summary = json.loads((place / "evaluation" / "summary.json").read_text())
    assert summary["base"]["videos"] == summary["tuned"]["videos"] == 6
    assert summary["base"].keys() == {
        "videos",
        "red",
        "held_out",
        "held_out_anomaly_rate",
        "motion",
        "sharpness",
        "contrast",
        "diversity",
    }
    assert summary["base"]["red"] != summary["tuned"]["red"]
    assert 0 < summary["base"]["held_out_anomaly_rate"] < 1
    assert {"mcnemar_p_held_out", "relative_reduction_held_out"} <= summary.keys()
    page = (place / "evaluation" / "report.html").read_text()
    assert "vanish" in page
    assert "Can the judge be fooled? (held_out)" in page
    (audit,) = summary["audits"].values()
    assert [row["copy"] for row in audit] == ["original", "frozen", "blurred", "darkened"]
    assert audit[0]["unjudged"] == 0.0


def test_evaluate_asks_held_out_judges_of_the_run_and_measures_with_options(place: Path) -> None:
    judge = "evaluation={rewards: [{name: other, target: 'tiny_rewards:clean'}]}"
    main(["train", "tiny.yaml", "updates=1", judge])
    words = ["evaluate", "--lora", "run/lora", "--prompts", "prompts.txt"]
    words += ["--measure", "faded=tiny_rewards:Faded{share: 0.25}", "--clean", "red"]
    assert main([*words, "--videos-per-prompt", "1"]) == 0
    base = json.loads((place / "evaluation" / "summary.json").read_text())["base"]
    assert base["faded"] == pytest.approx(0.25 * base["red"], abs=1e-5)
    assert "other" in base


def test_evaluate_takes_further_generators_and_writes_for_vbench(
    place: Path, pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", "tiny.yaml", "updates=1", "optimizer.learning_rate=0.1"])
    main(["train", "tiny.yaml", "updates=1", "optimizer.learning_rate=0.3", "output=second"])
    words = ["evaluate", "--lora", "run/lora", "--prompts", "prompts.txt", "--batch-size", "2"]
    words += ["--also", "second=second/lora", "--also", "stock=wan", "--vbench", "vb"]
    assert main([*words, "--videos-per-prompt", "2", "--clean", "red"]) == 0
    summary = json.loads((place / "evaluation" / "summary.json").read_text())
    assert summary["second"]["red"] != summary["tuned"]["red"]
    assert summary["stock"]["red"] == summary["base"]["red"]
    assert summary["videos_generated"] == summary["reward_calls"] == 16
    assert [entry["sides"] for entry in summary["comparisons"]] == [
        ["base", "tuned"],
        ["base", "second"],
        ["second", "tuned"],
        ["base", "stock"],
        ["stock", "tuned"],
    ]
    assert "## second and tuned" in (place / "evaluation" / "report.md").read_text()
    names = ["a red circle-0.mp4", "a red circle-1.mp4"]
    names += ["the blue square-0.mp4", "the blue square-1.mp4"]
    for side in ("base", "tuned", "second", "stock"):
        assert sorted(path.name for path in (place / "vb" / side).iterdir()) == names
    assert "vbench tuned: 2 of 2 prompts have not the 5 videos" in capsys.readouterr().out
    assert not (place / "evaluation" / "parts").exists()


def test_an_interrupted_evaluation_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["train", "tiny.yaml", "updates=1", "optimizer.learning_rate=0.1"])
    words = ["evaluate", "--lora", "run/lora", "--prompts", "prompts.txt", "--batch-size", "1"]
    words += ["--videos-per-prompt", "1", "--clean", "red"]
    assert main([*words, "--output", "whole"]) == 0
    calls = []

    def stop_at_the_third(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw_videos(*arguments, **options)

    monkeypatch.setattr("diffusion_rl.before_after.draw_videos", stop_at_the_third)
    assert main(words) == INTERRUPTED
    assert "stopped; what is measured is kept, and the same command goes on" in (
        capsys.readouterr().out
    )
    assert len(list((place / "evaluation" / "parts").glob("*.safetensors"))) == 2
    assert main(words) == 0
    assert len(calls) == 5
    found, whole = (
        json.loads((place / folder / "summary.json").read_text())
        for folder in ("evaluation", "whole")
    )
    for summary in (found, whole):
        summary.pop("seconds")
    assert found == whole
    assert whole["noise_level"] == 0
    calls[:] = [()]
    assert main(words) == INTERRUPTED
    assert main([*words, "--noise-level", "7"]) == 1
    assert "noise_level must be in [0, 1], got 7.0" in capsys.readouterr().err
    assert list((place / "evaluation" / "parts").glob("*.safetensors"))  # A slip costs nothing.
    assert main([*words, "--noise-level", "0.7"]) == 0
    assert len(calls) == 3 + 4  # What was measured of plain videos is of no use.
    noisy = json.loads((place / "evaluation" / "summary.json").read_text())
    assert noisy["noise_level"] == 0.7
    assert "`--noise-level 0.7`" in (place / "run" / "lora" / "README.md").read_text()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--measure", "held_out"],
            "--measure must be NAME=MODULE:CALLABLE, or .*, got 'held_o",
        ),
        (["--measure", "m=a:b{c: [}"], "--measure must have options as YAML, got 'm=a:b{c: "),
        (
            ["--measure", "red=tiny_rewards:clean"],
            "measures must have names of their own, got red twice",
        ),
        (["--measure", "motion=tiny_rewards:clean"], "names of their own, got motion twice"),
        (["--measure", "a_anomaly_rate=tiny_rewards:clean"], "own, got a_anomaly_rate twice"),
        (["--clean", "other"], "--clean must name measures, got other; there are"),
        (
            ["--measure", "loud=tiny_rewards:loud", "--clean", "loud"],
            r"--clean must name measures in \[0, 1\], got loud",
        ),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--also", "other"], "--also must be NAME=FOLDER with a name of letters, .*, got 'other'"),
        (["--also", "tuned=run/lora"], "--also must have a name of its own, got tuned twice"),
        (["--also", "other=run"], "--also must be the folder of a LoRA, .* got other=run"),
        (["--videos-per-prompt", "0"], "--videos-per-prompt must be at least 1, got 0"),
        (["--base", "none.yaml"], "config must be an existing YAML file, got none.yaml"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    import re

    main(["train", "tiny.yaml", "updates=1"])
    words = ["evaluate", "--lora", "run/lora", "--prompts", "prompts.txt"]
    assert main([*words, "--videos-per-prompt", "1", *extra]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "--lora", "run/lora", "--videos-per-prompt", "1"],
        ["best-of-n", "tiny.yaml"],
    ],
)
def test_a_reward_is_closed_where_a_later_one_cannot_be_built(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    main(["train", "tiny.yaml", "updates=1"])
    closed, build = [], rewards.build_reward

    def opened(settings: RewardSettings) -> Reward:
        return dataclasses.replace(build(settings), end=lambda: closed.append(settings.name))

    second = "rewards=[{name: red, target: 'tiny_rewards:red'}, {name: b, target: 'none:no'}]"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "build_reward", opened)
        assert main([*words, "--prompts", "prompts.txt", second]) == 1
    assert "none" in capsys.readouterr().err
    assert closed == ["red"]
