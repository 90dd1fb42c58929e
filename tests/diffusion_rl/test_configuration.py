"""YAML to settings and back; every wrong key, type and range with its full path."""

import dataclasses
import errno
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from diffusion_rl.configuration import (
    GeneratorSettings,
    RunSettings,
    build,
    load_config,
    save_config,
    to_tree,
)
from diffusion_rl.row_settings import SETTINGS, GrpoSettings, NftSettings

SMALLEST = """
generator: {path: some/folder, height: 16, width: 32, num_frames: 5, fps: 8}
rewards: [{name: red, target: "module:name"}]
prompts: prompts.txt
output: runs/x
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALLEST)
    return path


def test_what_is_left_out_takes_its_default(config: Path) -> None:
    settings = load_config(config)
    assert settings.generator == GeneratorSettings(
        path="some/folder", height=16, width=32, num_frames=5, fps=8.0
    )
    assert isinstance(settings.generator.fps, float)
    assert settings.algorithm == GrpoSettings()
    assert settings.updates == settings.finetune_settings().updates == 60
    assert settings.rewards[0].weight == 1.0


def test_guards_are_on_unless_they_are_switched_off(config: Path) -> None:
    recipe = load_config("configs/rl/toy_nft.yaml")
    assert load_config(config).guards == recipe.guards
    assert load_config(config, ["guards=[]"]).guards == ()
    one_frame = load_config(config, ["generator.num_frames=1"]).guards
    assert one_frame == recipe.guards[1:]
    assert "motion" not in {guard.statistic for guard in one_frame}


def test_a_held_out_judge_may_choose_the_best(config: Path) -> None:
    held_out = "evaluation={rewards: [{name: other, target: 'a:b'}]}"
    best = "best_by=evaluation/other"
    assert load_config(config, [held_out, best]).best_by == "evaluation/other"
    with pytest.raises(ValueError, match="best_by must be a metric of the run, got evaluation/oth"):
        load_config(config, [best])


def test_overrides_reach_every_depth(config: Path) -> None:
    settings = load_config(
        config,
        [
            "updates=3",
            "generator.fps=16",
            "optimizer.learning_rate=2e-5",
            "rewards[0].weight=0.5",
            "rewards[0].options.mode=fast",
            "generator.local_path=null",
            "lora.targets=[to_q,to_k]",
            "guards=[{statistic: motion, floor: 0.5}]",
        ],
    )
    assert settings.updates == 3
    assert settings.generator.fps == 16.0
    assert settings.optimizer.learning_rate == 2e-5
    assert settings.rewards[0].weight == 0.5
    assert settings.rewards[0].options == {"mode": "fast"}
    assert settings.lora.targets == ("to_q", "to_k")
    assert settings.guards[0].floor == 0.5


def test_the_row_chooses_its_options(config: Path) -> None:
    settings = load_config(config, ["algorithm.name=nft", "algorithm.beta=0.5"])
    assert settings.algorithm == NftSettings(beta=0.5)


@pytest.mark.parametrize(
    "overrides", [[], ["algorithm.name=nft"], ["guards=[{statistic: motion}]"]]
)
def test_saving_and_loading_gives_the_same_settings(
    config: Path, tmp_path: Path, overrides: list[str]
) -> None:
    settings = load_config(config, overrides)
    save_config(settings, tmp_path / "deep" / "saved.yaml")
    assert load_config(tmp_path / "deep" / "saved.yaml") == settings
    assert build(to_tree(settings)) == settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("updats=3", "^updats must be a known key, .*did you mean updates?"),
        ("rollout.guidance_scal=2", "^rollout.guidance_scal must be a known.*guidance_scale?"),
        (
            "optimizer.zzz=2",
            "^optimizer.zzz must be a known key.*known: name, learning_rate",
        ),
        ("rewards[0].wieght=2", r"^rewards\[0\].wieght must be a known key.*mean weight?"),
        ("algorithm.beta=1", "^algorithm.beta must be a known key, got none of that name"),
        ("updates=many", "^updates must be a whole number, got 'many' "),
        ("updates=2.5", "^updates must be a whole number, got 2.5 "),
        ("generator.fps=.nan", "^generator.fps must be a finite number, got nan"),
        ("rewards[0].weight=-.inf", r"^rewards\[0\].weight must be a finite number, got -inf"),
        ("updates=true", "^updates must be a whole number, got True "),
        ("generator.fps=fast", "^generator.fps must be a number, got 'fast' "),
        ("generator.path=7", "^generator.path must be a text, got 7 "),
        ("generator=7", "^generator must be a mapping, got 7 "),
        ("rewards=7", "^rewards must be a list, got 7 "),
        ("rewards[0].options=7", r"^rewards\[0\].options must be a mapping, got 7 "),
        ("lora.targets=[1]", r"^lora.targets\[0\] must be a text, got 1 "),
        ("prompts=null", "^prompts must be a text, got None "),
        ("updates=0", "^updates must be at least 1, got 0"),
        ("save_every=0", "^save_every must be at least 1, got 0"),
        ("rewards=[]", "^rewards must be at least one, got none"),
        ("algorithm.clip_range=2", r"^algorithm.clip_range must be in \(0, 1\], got 2"),
        ("lora.rank=0", "^lora.rank must be at least 1, got 0"),
        ("rollout.videos_per_prompt=1", "^rollout.videos_per_prompt must be at least 2, got 1"),
        ("generator.fps=0", "^generator.fps must be above 0 and finite, got 0"),
        (
            "generator.family=wam",
            "^generator.family must be one of wan, .*; did you mean wan",
        ),
        (
            "generator.options={learns: low}",
            "^generator.options.learns must be .* family wan takes",
        ),
        ("generator.max_sequence_length=0", "^generator.max_sequence_length must be at least 1"),
        (
            "algorithm.name=nfd",
            "^algorithm.name must be one of ddpo, .*, got nfd; did you mean",
        ),
        ("rollout.train_guidance=2", "^rollout.train_guidance must be left out with algorithm"),
        ("guards=[{statistic: montion}]", r"^guards\[0\].statistic must be one of .*'motion'"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_path(
    config: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(config, [override])


@pytest.mark.parametrize("row", SETTINGS)
def test_every_row_is_reached_by_its_name_and_survives_saving(
    config: Path, tmp_path: Path, row: str
) -> None:
    settings = load_config(config, [f"algorithm.name={row}"])
    assert settings.algorithm == SETTINGS[row]()
    save_config(settings, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == settings


def test_saved_settings_are_whole_or_those_of_before(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, saved = load_config(config), tmp_path / "own" / "saved.yaml"
    save_config(settings, saved)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    save_config(settings, saved)  # Nothing differs, so that nothing is written.
    with pytest.raises(OSError, match="No space left"):
        save_config(dataclasses.replace(settings, seed=5), saved)
    assert load_config(saved) == settings
    assert list(saved.parent.iterdir()) == [saved]


def test_options_of_another_row_are_refused(config: Path) -> None:
    with pytest.raises(ValueError, match="^algorithm.advantage_std must be a known key"):
        load_config(config, ["algorithm.name=ddpo", "algorithm.advantage_std=batch"])
    with pytest.raises(ValueError, match="^algorithm.window must be a known key"):
        load_config(config, ["algorithm.name=grpo", "algorithm.window=random"])
    with pytest.raises(ValueError, match="^rollout.shared_noise must be left out with .* 'awm'"):
        load_config(config, ["algorithm.name=awm", "rollout.shared_noise=true"])


@pytest.mark.parametrize("name", ["stochastic_steps", "eligible_steps", "noise_level"])
def test_settings_that_would_be_ignored_are_refused(config: Path, name: str) -> None:
    message = f"^rollout.{name} must be left out with algorithm 'nft', got 1; it would be ignored"
    with pytest.raises(ValueError, match=message):
        load_config(config, ["algorithm.name=nft", f"rollout.{name}=1"])
    load_config(config, [f"rollout.{name}=1", "rollout.stochastic_steps=1"])
    # Nor do their defaults stand in the way of a short schedule.
    load_config(config, ["algorithm.name=nft", "rollout.num_inference_steps=2"])


@pytest.mark.parametrize("missing", ["generator", "rewards", "prompts", "output"])
def test_what_must_be_given_is_asked_for(config: Path, missing: str) -> None:
    tree = OmegaConf.to_container(OmegaConf.load(config))
    del tree[missing]
    with pytest.raises(ValueError, match=f"^{missing} must be given, got nothing"):
        build(tree)


def test_names_and_statistics_stand_once(config: Path) -> None:
    twice = "[{name: a, target: 'm:n'}, {name: a, target: 'm:o'}]"
    with pytest.raises(ValueError, match=r"rewards must have different names, got \['a', 'a'\]"):
        load_config(config, [f"rewards={twice}"])
    with pytest.raises(ValueError, match="guards must watch different statistics"):
        load_config(config, ["guards=[{statistic: motion}, {statistic: motion}]"])


def test_files_that_are_no_configuration_are_refused(config: Path) -> None:
    with pytest.raises(FileNotFoundError, match="smal.yaml; did you mean small.yaml?"):
        load_config(config.with_name("smal.yaml"))
    with pytest.raises(ValueError, match="overrides must be key=value, got 'updates'"):
        load_config(config, ["updates"])
    with pytest.raises(ValueError, match="overrides must fit .*small.yaml, got"):
        load_config(config, ["rewards[7].weight=1"])
    with pytest.raises(ValueError, match="overrides must fit .*small.yaml, got 'rewards.0.weight"):
        load_config(config, ["rewards[0.weight=1"])
    config.write_text("a: [1, 2")
    with pytest.raises(ValueError, match="config must be readable YAML, got .*small.yaml"):
        load_config(config)
    config.write_text("a: ${nothing.there}")
    with pytest.raises(ValueError, match="config must hold values or references, got .*nothing"):
        load_config(config)
    config.write_bytes("a: caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match="config must be readable YAML"):
        load_config(config)
    config.write_text("- a list")
    with pytest.raises(ValueError, match="config must be a mapping, got"):
        load_config(config)


def test_every_setting_says_what_it_is() -> None:
    """Each field has a docstring below it: that is where its unit and range stand."""
    import ast
    import inspect

    def kinds(kind: type) -> set[type]:
        found = {kind}
        for entry in dataclasses.fields(kind):
            default = entry.default_factory
            if isinstance(default, type) and dataclasses.is_dataclass(default):
                found |= kinds(default)
        return found

    rows = {
        base for row in SETTINGS.values() for base in row.__mro__ if "Settings" in base.__name__
    }
    for kind in kinds(RunSettings) | {GeneratorSettings} | rows:
        body = ast.parse(inspect.getsource(kind)).body[0].body
        for place, node in enumerate(body):
            if isinstance(node, ast.AnnAssign):
                after = body[place + 1]
                assert isinstance(after, ast.Expr), f"{kind.__name__}.{node.target.id}"
                assert isinstance(after.value.value, str)
