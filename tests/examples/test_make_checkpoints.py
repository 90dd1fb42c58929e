"""The driver of the toy checkpoints: order, resuming, prompts; the stages themselves are stubs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cac_reward import CaCScorer
from cac_reward.training.curricula import load_curriculum
from examples.toy_world import annotated_clips, demo, judge_bank, make_checkpoints
from examples.toy_world.make_checkpoints import PROMPTS, STAGES, Places, Stage
from examples.toy_world.make_stored_runs import STORED
from examples.toy_world.training_state import save_state
from examples.toy_world.world import split_of


@pytest.fixture
def places(tmp_path: Path) -> Places:
    names = ("state", "checkpoints", "prompts", "stored_runs")
    return Places(*(tmp_path / name for name in names))


def run(monkeypatch: pytest.MonkeyPatch, *words: str, stop: Callable | None = None) -> list[str]:
    """Names of the stages that ran; `stop` replaces the second one."""
    ran: list[str] = []

    def stub(name: str) -> Stage:
        return Stage(name, "about it", lambda _: ran.append(name))

    stages = [stub(stage.name) for stage in STAGES]
    if stop is not None:
        stages[1] = Stage(stages[1].name, "fails", stop)
    monkeypatch.setattr(make_checkpoints, "STAGES", stages)
    status = make_checkpoints.main(words)
    return [*ran, str(status)]


def test_stages_run_in_order_or_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [stage.name for stage in STAGES]
    assert names[:4] == ["autoencoder", "latents", "generator", "judge"]
    assert run(monkeypatch) == [*names, "0"]
    assert run(monkeypatch, "--only", "prompts") == ["prompts", "0"]


def test_an_interrupted_or_failed_stage_ends_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Places) -> None:
        raise KeyboardInterrupt

    assert run(monkeypatch, stop=interrupted) == ["autoencoder", "130"]
    assert "go on with: make toy-checkpoints" in capsys.readouterr().out

    def failed(_: Places) -> None:
        raise OSError("disk full")

    assert run(monkeypatch, stop=failed) == ["autoencoder", "1"]
    assert "OSError: disk full" in capsys.readouterr().err
    with pytest.raises(OSError, match="disk full"):
        run(monkeypatch, "--traceback", stop=failed)


def test_prompts_are_split_and_the_same_each_time(places: Places, repository: Path) -> None:
    make_checkpoints.make_prompts(places)
    lines = {}
    for split, (count, _) in PROMPTS.items():
        text = (places.prompts / f"{split}.txt").read_text()
        lines[split] = text.splitlines()
        assert len(set(lines[split])) == count
        assert {split_of(prompt) for prompt in lines[split]} == {split}
        shipped = repository / "examples" / "toy_world" / "prompts" / f"{split}.txt"
        assert shipped.read_text() == text
    assert not set(lines["train"]) & set(lines["evaluation"])


def test_training_seconds_come_from_the_states_and_the_judges_stages(
    places: Places, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = repository / make_checkpoints.JUDGE_RECIPE
    monkeypatch.setattr(make_checkpoints, "JUDGE_RECIPE", recipe)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must hold autoencoder\.pt.*stage autoencoder"):
        make_checkpoints.training_seconds(places.state)
    for name in ("autoencoder", "generator"):
        save_state(places.state / f"{name}.pt", {"step": 1, "seconds": 60.0})
    with pytest.raises(FileNotFoundError, match=r"result\.json must exist; run the stage judge"):
        make_checkpoints.training_seconds(places.state)
    stages = load_curriculum(recipe)
    for stage in stages:
        Path(stage.output).mkdir(parents=True)
        (Path(stage.output) / "result.json").write_text('{"seconds": 30.0}')
    assert make_checkpoints.training_seconds(places.state) == {
        "autoencoder": 60.0,
        "generator": 60.0,
        "judge": 30.0 * len(stages),
    }


def test_the_judge_is_made_of_its_recipe_alone(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not there yet is written; a second call changes nothing and trains nothing."""
    recipe = tmp_path / "recipe.yaml"
    monkeypatch.chdir(tmp_path)
    recipe.write_text(
        """
output: judge_run
all:
  model: {dtype: float32, learns: all, gradient_checkpointing: false}
  data: {train: [clips/rendered.jsonl], workers: 0}
  batch: 2
  updates: 1
stages:
  - name: frames
    model: {path: base}
    lessons: {frame: 1.0}
  - name: clips
    model: {path: previous}
    lessons: {scan: 1.0}
    loss: {frames: 1.0}
"""
    )
    monkeypatch.setattr(make_checkpoints, "JUDGE_RECIPE", recipe)
    monkeypatch.setattr(judge_bank, "build_judge_bank", lambda folder, bank: bank.touch() or {})
    real = annotated_clips.main
    monkeypatch.setattr(annotated_clips, "main", lambda words: real([*words, "--count", "6"]))
    places.state.mkdir()
    make_checkpoints.make_judge(places)
    trained = tmp_path / "judge_run" / "2_clips" / "judge"
    assert (trained / "cac_heads.safetensors").is_file()
    shipped = {one.name: one.read_bytes() for one in places.judge.iterdir()}
    assert set(shipped) == {
        one.name
        for one in trained.iterdir()
        if one.name not in ("README.md", "cac_heads.safetensors")
    }
    report = CaCScorer.from_pretrained(places.judge).inspect(
        torch.rand(1, 13, 3, 32, 32), ["a red circle moving left"], fps=8.0
    )
    assert len(report) == 1
    changed = (trained / "model.safetensors").stat().st_mtime_ns
    make_checkpoints.make_judge(places)
    assert {one.name: one.read_bytes() for one in places.judge.iterdir()} == shipped
    assert (trained / "model.safetensors").stat().st_mtime_ns == changed


def test_cards_need_figures(places: Places) -> None:
    with pytest.raises(FileNotFoundError, match=r"figures\.json must exist; run the stage figures"):
        make_checkpoints.make_cards(places)


def test_cards_keep_what_a_person_added(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.toy_world import model_cards

    for name in ("generator_card", "judge_card"):
        monkeypatch.setattr(model_cards, name, lambda *given: "# A card\n")
    monkeypatch.setattr(make_checkpoints, "training_seconds", lambda state: {})
    places.state.mkdir()
    (places.state / "figures.json").write_text("{}")
    for folder in (places.generator, places.judge):
        folder.mkdir(parents=True)
    added = "\n## How these files came about\n\nIn two runs.\n"
    (places.generator / "MODEL_CARD.md").write_text(f"# An older card\n{added}")
    for _ in range(2):
        make_checkpoints.make_cards(places)
        assert (places.generator / "MODEL_CARD.md").read_text() == f"# A card\n{added}"
        assert (places.judge / "MODEL_CARD.md").read_text() == "# A card\n"


def test_figures_are_measured_once_for_the_same_weights(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples.toy_world import measure

    calls = []

    def measure_once(config: str) -> dict:
        calls.append(config)
        return {}

    monkeypatch.setattr(measure, "measure_checkpoints", measure_once)
    monkeypatch.setattr(measure, "bars", lambda figures: [("a figure", 0.5, "1 to 2", False)])
    places.generator.mkdir(parents=True)
    weights = places.generator / "model.safetensors"
    weights.write_bytes(b"1")
    make_checkpoints.make_figures(places)
    make_checkpoints.make_figures(places)
    assert len(calls) == 1
    weights.write_bytes(b"2")
    make_checkpoints.make_figures(places)
    assert len(calls) == 2
    assert "checkpoints" in json.loads((places.state / "figures.json").read_text())


def test_every_row_that_the_demo_offers_can_be_stored() -> None:
    assert {demo.UNGUARDED, *demo.CONFIGS} == set(STORED)
    assert all(Path(path).is_file() for path in STORED.values())


def test_the_machine_has_a_name() -> None:
    assert " cores of " in make_checkpoints.describe_machine()
