"""The demo from end to end at toy size: trains, is interrupted, goes on, measures and reports."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers.utils.logging
import pytest
import torch
import transformers.utils.logging
import yaml
from transformers import AutoModelForImageTextToText, AutoTokenizer

from diffusion_rl.checkpoint import checkpoints
from diffusion_rl.configuration import load_config, save_config
from diffusion_rl.launch import build_generator, prepare
from diffusion_rl.lora import tuner_layers
from diffusion_rl.rewards import RewardSettings
from diffusion_rl.tracking import read_metrics
from examples.toy_world import demo, demo_evaluation
from examples.toy_world.demo_evaluation import (
    JUDGE,
    EvaluationSettings,
    build_judges,
    measure_side,
)
from tests.examples.stand_in_judge import WHY
from tests.tiny_judge import build_tiny_judge
from tests.tiny_wan import SIZE, save_tiny_wan

SIDE_KEYS = {
    *("videos", "anomaly_rate_oracle", "anomaly_rate_judge"),
    *("motion", "prompt_match", "diversity"),
}
SUMMARY_KEYS = {
    *("base", "tuned", "relative_reduction_oracle", "relative_reduction_oracle_ci95"),
    "with_guidance",
    *("videos_generated_in_training", "reward_calls", "training_seconds", "peak_memory_mb"),
    *("seed", "versions"),
}
STAND_IN = {
    "cac": ("tests.examples.stand_in_judge:StandInJudge", {"mode": "fast"}),
    "alignment": ("tests.examples.stand_in_judge:StandInAlignment", {}),
}


@pytest.fixture(scope="module")
def generator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(autouse=True)
def what_main_changes() -> Iterator[None]:
    """Put back the process-wide settings of a command."""
    levels = {name: logging.getLogger(name).level for name in demo.QUIET}
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    diffusers.utils.logging.enable_progress_bar()
    transformers.utils.logging.enable_progress_bar()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def write_config(folder: Path, generator: Path, rewards: dict = STAND_IN, **more: object) -> Path:
    """A YAML of a run that takes a second."""
    train = folder / "train.txt"
    train.write_text("a red circle moves left\na blue square moves up\n", encoding="utf-8")
    (folder / "held_out.txt").write_text("a green circle\na red square\n", encoding="utf-8")
    tree = {
        "generator": {"path": str(generator), **SIZE},
        "lora": {"rank": 2, "alpha": 2},
        "algorithm": {"name": "nft", "inner_steps": 1},
        "rollout": {
            **{"num_inference_steps": 4, "prompts_per_update": 2, "videos_per_prompt": 2},
            **{"micro_batch": 4, "guidance_scale": 2.0},
        },
        "rewards": [
            {"name": name, "target": target, "options": options}
            for name, (target, options) in rewards.items()
        ],
        "guards": [{"statistic": "motion"}, {"statistic": "diversity"}],
        "prompts": str(train),
        "updates": 2,
        "output": "unused",
        "save_every": 1,
        **more,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def words(folder: Path, config: Path, *more: str) -> list[str]:
    """The command line of a small demo in `folder`."""
    return [
        *("--config", str(config), "--output", str(folder / "demo"), "--traceback"),
        *("--prompts", str(folder / "held_out.txt"), "--videos-per-prompt", "2"),
        *("--oracle-clips", "8", *more),
    ]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, generator_folder: Path
) -> tuple[Path, list[str]]:
    """Folder and command of a demo that ran to its end."""
    folder = tmp_path_factory.mktemp("finished")
    command = words(folder, write_config(folder, generator_folder), "--seed", "3")
    assert demo.main(command) == 0
    return folder / "demo", command


def test_everything_the_issue_asks_for_is_there(finished: tuple[Path, list[str]]) -> None:
    output, _ = finished
    summary = json.loads((output / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS
    assert set(summary["base"]) == set(summary["tuned"]) == SIDE_KEYS
    assert summary["base"]["videos"] == summary["tuned"]["videos"] == 4
    assert summary["seed"] == 3
    # 4 for the guards' reference levels, 4 in each of 2 updates; two rewards each.
    assert summary["videos_generated_in_training"] == 12
    assert summary["reward_calls"] == 16
    assert summary["training_seconds"] > 0
    assert 50 < summary["peak_memory_mb"] < 8000
    assert {"python", "torch", "diffusers", "transformers"} <= set(summary["versions"])
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl")] == [1, 2]
    settings = load_config(output / "config.yaml")
    assert settings.seed == 3
    build_generator(settings.generator, lora=output / "lora")


def test_the_page_opens_without_network_and_shows_both_judges(
    finished: tuple[Path, list[str]],
) -> None:
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:)[a-z/]""", page)
    assert "<script" not in page
    for text in ("Which faults", "Training", "Videos before and after", "How far to believe"):
        assert text in page
    for text in ("McNemar", "frozen", "Oracle: ", "diversity", "image/webp", "P(clean)"):
        assert text in page
    assert WHY not in page  # Escaped where it is shown.


def test_a_finished_run_is_kept_and_the_next_starts_anew(
    finished: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    output, command = finished
    before = (output / "metrics.jsonl").read_text()
    assert demo.main([*command, "--updates", "1"]) == 0
    kept = output.with_name("demo.previous-1")
    assert (kept / "metrics.jsonl").read_text() == before
    assert len(read_metrics(output / "metrics.jsonl")) == 1
    lines = capsys.readouterr().out.strip().splitlines()
    assert any(f"kept in {kept}; starting anew" in line for line in lines)
    assert lines[-1] == f"report: {output / 'report.html'}"
    head = next(place for place, line in enumerate(lines) if line.startswith("measure"))
    assert [line.split("  ")[0] for line in lines[head + 2 : head + 7]] == [
        *("anomaly rate oracle", "anomaly rate judge", "motion", "prompt match", "diversity"),
    ]


@pytest.mark.parametrize(("average_decay", "adapter"), [(0.0, "default"), (0.9, "average")])
def test_base_is_measured_without_the_lora_and_tuned_with_what_is_saved(
    tmp_path: Path,
    generator_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    average_decay: float,
    adapter: str,
) -> None:
    config = write_config(tmp_path, generator_folder)
    changes = [f"output={tmp_path / 'run'}", f"optimizer.average_decay={average_decay}"]
    run = prepare(load_config(config, changes), keep_text_encoder=True)
    seen = {}

    def look(generator, *rest):
        layers = tuner_layers(generator.transformer)
        seen[rest[-1]] = [None if one.disable_adapters else one.active_adapters for one in layers]
        assert rest[-2].guidance_scale == (3.0 if "guidance" in rest[-1] else 2.0)
        return measure_side(generator, *rest)

    monkeypatch.setattr(demo_evaluation, "measure_side", look)
    sizes = EvaluationSettings(videos_per_prompt=2, oracle_clips=2)
    demo_evaluation.evaluate_run(run, ["a green circle"], sizes)
    assert list(seen) == ["base", "tuned", "base with guidance", "tuned with guidance"]
    for side, adapters in seen.items():
        wanted = [adapter] if side.startswith("tuned") else None
        assert all(active == wanted for active in adapters)


def test_control_c_saves_and_the_same_command_goes_on(
    tmp_path: Path,
    generator_folder: Path,
    repository: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = words(tmp_path, write_config(tmp_path, generator_folder))
    metrics = tmp_path / "demo" / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "examples.toy_world.demo", *command, "--updates", "100000"],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # A job in the background of a script is started deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            # An update is noted before it is saved, and may be interrupted between the two.
            wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 3, process)
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == demo.INTERRUPTED
    saved = checkpoints(tmp_path / "demo" / "checkpoints")[-1]
    done = int(saved.name[5:])
    assert done >= 2
    assert f"everything up to {saved} is saved; go on with: {demo.COMMAND}" in said
    assert not (tmp_path / "demo" / "summary.json").exists()

    assert demo.main([*command, "--updates", str(done + 1)]) == 0
    assert f"going on with the unfinished run in {tmp_path / 'demo'}" in capsys.readouterr().out
    steps = [line["step"] for line in read_metrics(metrics)]
    assert steps == list(range(1, done + 2))


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Poll for at most four minutes while the process lives."""
    for _ in range(2400):
        if condition():
            return
        assert process.poll() is None, f"ended with {process.returncode}"
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def test_a_run_interrupted_in_its_evaluation_only_evaluates(
    tmp_path: Path,
    generator_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = words(tmp_path, write_config(tmp_path, generator_folder), "--updates", "1")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(demo, "evaluate_run", interrupt)
        assert demo.main(command) == demo.INTERRUPTED
    assert "step-000001 is saved" in capsys.readouterr().out
    monkeypatch.setattr(demo, "train_with_bar", None)
    assert demo.main(command) == 0
    assert (tmp_path / "demo" / "lora" / "pytorch_lora_weights.safetensors").is_file()


def judge_that_says_clean(folder: Path) -> Path:
    """A Qwen3-VL folder whose weights prefer the token "Verdict: clean" to a tool call."""
    build_tiny_judge(
        folder,
        whole_tokens=("Verdict: clean",),
        settings={
            **{"schema_version": 1, "wording": "brief", "domain": "toy_world"},
            "scan": {"fps": 8.0, "max_frames": 4, "pixels": 256},
            "inspect": {"fps": 8.0, "max_frames": 4, "pixels": 256, "margin_seconds": 0.25},
        },
    )
    model = AutoModelForImageTextToText.from_pretrained(folder)
    call = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<tool_call>")
    with torch.no_grad():
        # Every state points along the first axis, and so do all tokens but one.
        table = model.get_input_embeddings().weight
        table[:, 0] = 5.0
        table[call, 0] = -5.0
    model.save_pretrained(folder)
    return folder


def test_the_demo_runs_with_a_real_judge(tmp_path: Path, generator_folder: Path) -> None:
    judge = judge_that_says_clean(tmp_path / "judge")
    options = {"path_or_hub_id": str(judge)}
    rewards = {
        "cac": ("cac_reward:CaCScorer.from_pretrained", {**options, "mode": "fast"}),
        "alignment": ("cac_reward:PromptAlignment.from_pretrained", options),
    }
    config = write_config(tmp_path, generator_folder, rewards, updates=1)
    assert demo.main(words(tmp_path, config)) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["base"]["anomaly_rate_judge"] == 0.0


def test_a_judge_that_answers_rubbish_stops_the_run_with_advice(
    tmp_path: Path, generator_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rubbish = {**STAND_IN, "cac": (STAND_IN["cac"][0], {"mode": "fast", "rubbish": True})}
    config = write_config(tmp_path, generator_folder, rewards=rubbish)
    assert demo.main([word for word in words(tmp_path, config) if word != "--traceback"]) == 1
    error = capsys.readouterr().err
    assert re.search(r"reward 'cac' returned NaN for 4 of 4 videos", error)
    assert "run the same command again" in error


def refuse(tmp_path: Path, *more: str, match: str) -> None:
    """The demo ends with an error before it loads anything."""
    with pytest.raises((ValueError, OSError), match=match):
        demo.main(words(tmp_path, tmp_path / "run.yaml", *more))


@pytest.fixture
def fake_generator(tmp_path: Path) -> Path:
    """A folder that looks like a pipeline until it is loaded."""
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "model_index.json").write_text("{}")
    return tmp_path / "wan"


def test_missing_checkpoints_are_named(tmp_path: Path, fake_generator: Path) -> None:
    write_config(tmp_path, tmp_path / "nowhere")
    refuse(tmp_path, match="nowhere must be a folder with a model_index.json.*toy-checkpoints")
    rewards = {**STAND_IN, "other": ("math:sqrt", {"path_or_hub_id": "no/judge"})}
    write_config(tmp_path, fake_generator, rewards)
    refuse(tmp_path, match="no/judge must be a folder with a config.json")


def test_held_out_prompts_must_be_held_out(tmp_path: Path, fake_generator: Path) -> None:
    write_config(tmp_path, fake_generator)
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("a red circle moves left\n")
    refuse(tmp_path, match="must not be trained on, got 'a red circle moves left'")
    held_out.write_text("a red square\na red square\n")
    refuse(tmp_path, match="evaluation prompts must be different, got one twice")
    held_out.write_text("\n")
    refuse(tmp_path, match="prompts must be at least one line")
    held_out.write_bytes(b"caf\xe9\n")
    refuse(tmp_path, match="prompts must be UTF-8")
    held_out.unlink()
    refuse(tmp_path, match="prompts must be an existing text, .jsonl")


def test_rewards_must_hold_judge_and_alignment(tmp_path: Path, fake_generator: Path) -> None:
    write_config(tmp_path, fake_generator, {"cac": STAND_IN["cac"]})
    refuse(tmp_path, match="rewards must hold one named alignment, got cac")


def test_an_output_folder_of_something_else_is_left_alone(
    tmp_path: Path, fake_generator: Path
) -> None:
    write_config(tmp_path, fake_generator)
    output = tmp_path / "demo"
    output.write_text("a file")
    refuse(tmp_path, match="output must be a folder, got the file")
    output.unlink()
    output.mkdir()
    (output / "thesis.txt").write_text("precious")
    refuse(tmp_path, "--fresh", match="output must be a new folder or one of an earlier demo")
    assert (output / "thesis.txt").read_text() == "precious"


def test_an_unfinished_run_of_other_settings_is_not_mixed_up(
    tmp_path: Path, fake_generator: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, fake_generator)
    options = demo.build_parser().parse_args(words(tmp_path, config))
    settings = demo.demo_settings(options)
    output = Path(settings.output)
    (output / "checkpoints" / "step-000007").mkdir(parents=True)
    save_config(settings, output / "config.yaml")
    demo.make_room(settings, fresh=False)
    assert "going on with the unfinished run" in capsys.readouterr().out
    refuse(tmp_path, "--seed", "5", match="with seed=0, now 5; .*--fresh")
    demo.make_room(settings, fresh=True)
    assert not output.exists()
    assert (tmp_path / "demo.previous-1" / "checkpoints" / "step-000007").is_dir()


def test_build_judges_asks_for_findings(tmp_path: Path, fake_generator: Path) -> None:
    settings = load_config(write_config(tmp_path, fake_generator))
    assert settings.rewards[0].options["mode"] == "fast"
    assert build_judges(settings)[JUDGE].mode == "full"
    assert isinstance(settings.rewards[0], RewardSettings)
