"""Stored runs survive the way to the disk and back; a damaged one is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from examples.toy_world.demo_curves import hack_verdict
from examples.toy_world.stored_run import (
    FOLDER,
    SCHEMA_VERSION,
    StoredPair,
    StoredRun,
    digest,
    load_stored_run,
    pack_video,
    read_curves,
    save_stored_run,
    unpack_video,
)


def some_run(**changes: object) -> StoredRun:
    video = torch.randint(0, 256, (5, 3, 16, 24), dtype=torch.uint8)
    numbers = {"videos": 4, "anomaly_rate_oracle": 0.5, "motion": math.nan}
    values: dict = {
        **{"name": "unguarded", "algorithm": "nft", "config": "a.yaml", "machine": "2 cores"},
        **{"made_with": "abc", "updates": 2, "training_seconds": 3.0, "videos_generated": 8},
        **{"curves": {"step": [1, 2], "reward": [0.5, None]}, "base": numbers, "tuned": numbers},
        **{"base_faults": {"vanish": 0.5}, "tuned_faults": {"vanish": 0.0}, "fps": 8.0},
        "pairs": [StoredPair("a red, circle", video, 255 - video)],
    }
    return StoredRun(**{**values, **changes})


def test_a_video_comes_back_pixel_for_pixel() -> None:
    video = torch.randint(0, 256, (7, 3, 8, 16), dtype=torch.uint8)
    assert torch.equal(unpack_video(pack_video(video)), video)


def test_a_run_comes_back(tmp_path: Path) -> None:
    run = some_run()
    path = save_stored_run(run, tmp_path)
    assert path == tmp_path / "unguarded.json"
    assert "NaN" not in path.read_text()
    found = load_stored_run("unguarded", tmp_path)
    assert found is not None
    assert found.curves == run.curves
    assert found.base["motion"] is None
    assert (found.name, found.fps, found.tuned_faults) == ("unguarded", 8.0, {"vanish": 0.0})
    assert found.pairs[0].prompt == "a red, circle"
    assert torch.equal(found.pairs[0].tuned, run.pairs[0].tuned)
    assert load_stored_run("grpo", tmp_path) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: text.replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 9'),
        lambda text: text.replace('"machine"', '"engine"'),
        lambda text: text.replace('"webp": "', '"webp": "AAAA'),
        lambda text: "[]",
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage) -> None:
    path = save_stored_run(some_run(), tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=r"stored run must be .* got .*unguarded\.json: "):
        load_stored_run("unguarded", tmp_path)


def test_curves_keep_what_is_drawn(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "reward": 0.123456, "rewards/cac": 0.2, "guards/motion": 1.0, "loss": 3.0},
        {"step": 2, "reward": None, "rewards/cac": 0.3, "guards/motion": 0.9, "loss": 2.0},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_curves(file) == {
        "step": [1, 2],
        "reward": [0.1235, None],
        "rewards/cac": [0.2, 0.3],
        "guards/motion": [1.0, 0.9],
    }
    assert read_curves(tmp_path / "nothing.jsonl") == {}


def test_a_digest_follows_the_weights(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    weights = tmp_path / "one" / "model.safetensors"
    weights.write_bytes(b"1")
    before = digest(tmp_path / "one")
    (tmp_path / "one" / "README.md").write_text("words")
    assert digest(tmp_path / "one") == before
    weights.write_bytes(b"2")
    assert digest(tmp_path / "one") != before


def test_a_digest_follows_the_recipe_but_not_its_comments(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    digests = []
    for text in ("# slow\nupdates: 3\n", "# fast\nupdates: 3\n", "updates: 4\n"):
        recipe.write_text(text)
        digests.append(digest(recipe))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_runs_load_and_are_small(path: Path) -> None:
    assert path.stat().st_size < 400_000
    run = load_stored_run(path.stem)
    assert run is not None
    assert len(run.curves["step"]) == run.updates
    assert run.pairs


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "nothing was hacked"),
        ({"prompt_match": 0.58}, "nothing was hacked"),
        ({"prompt_match": 0.5}, "paid for it: prompts followed fell by 10.0 points."),
        ({"motion": 0.02, "diversity": 0.05}, "motion fell to 40% of the base and diversity fell"),
    ],
)
def test_a_hack_is_called_one_and_nothing_else_is(changes: dict, said: str) -> None:
    base = {"prompt_match": 0.6, "motion": 0.05, "diversity": 0.1}
    assert said in hack_verdict(some_run(base=base, tuned={**base, **changes}))
