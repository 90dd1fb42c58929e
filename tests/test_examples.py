"""What ships under examples/: commands that start, recipes and checkpoints that hold their word."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_rl.configuration import load_config
from diffusion_rl.prompts import read_prompts
from examples.toy_world.demo import CONFIGS, UNGUARDED
from examples.toy_world.make_stored_runs import STORED
from examples.toy_world.world import split_of

SCRIPTS = ("demo", "make_checkpoints")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_takes(script: str, repository: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", f"examples.toy_world.{script}", "--help"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"python -m examples.toy_world.{script}" in run.stdout
    assert "--traceback" in run.stdout


@pytest.mark.parametrize("name", CONFIGS)
def test_the_demos_recipes_are_guarded(name: str) -> None:
    settings = load_config(CONFIGS[name])
    assert settings.algorithm.name == name
    assert settings.algorithm.kl_weight > 0
    weights = {reward.name: reward.weight for reward in settings.rewards}
    assert weights["cac"] > 0
    assert weights["alignment"] > 0
    watched = {guard.statistic for guard in settings.guards if guard.weight > 0}
    assert {"motion", "diversity"} <= watched


def test_the_unguarded_recipe_has_nothing_that_keeps_it_honest() -> None:
    settings = load_config(STORED[UNGUARDED])
    assert settings.algorithm.kl_weight == 0
    assert {reward.name: reward.weight > 0 for reward in settings.rewards} == {
        "cac": True,
        "alignment": False,
    }
    assert {guard.weight for guard in settings.guards} == {0.0}
    demo = load_config(CONFIGS["nft"])
    for same in ("generator", "rollout", "lora", "prompts", "updates"):
        assert getattr(settings, same) == getattr(demo, same)
    assert settings.optimizer.learning_rate > demo.optimizer.learning_rate  # A hack takes haste.


def test_no_prompt_is_trained_and_tested_on() -> None:
    settings = load_config(CONFIGS["nft"])
    training = read_prompts(settings.prompts)
    held_out = read_prompts(Path(settings.prompts).with_name("evaluation.txt"))
    assert not set(training) & set(held_out)
    assert {split_of(prompt) for prompt in training} == {"train"}
    assert {split_of(prompt) for prompt in held_out} == {"evaluation"}


def test_the_checkpoints_are_small_and_described(
    toy_generator_folder: Path, toy_judge_folder: Path
) -> None:
    folders = (toy_generator_folder, toy_judge_folder)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl"}]
    for folder in folders:
        card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
        for part in ("## Data", "## Training", "## Measured"):
            assert part in card
