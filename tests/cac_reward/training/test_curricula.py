"""A curriculum's stages from its YAML, and what is wrong with one by its place."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from cac_reward.training.curricula import load_curriculum

STAGE = {"model": {"path": "base"}, "data": {"train": ["a"]}, "lessons": {"scan": 1}}
NEXT = {**STAGE, "model": {"path": "previous"}, "lessons": {"inspect": 1}}


def saved(folder: Path, tree: Any, name: str = "stages.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(tree)))
    return path


def test_one_stage_is_a_curriculum_of_one(tmp_path: Path) -> None:
    path = saved(tmp_path, {**STAGE, "output": "out"})
    (stage,) = load_curriculum(path, ["updates=3", "output=other"])
    assert (stage.updates, stage.output, stage.model.path) == (3, "other", "base")


def test_stages_follow_one_another(tmp_path: Path) -> None:
    saved(tmp_path, {**STAGE, "output": "elsewhere", "updates": 9, "batch": 9}, "sub/first.yaml")
    path = saved(
        tmp_path,
        {
            "output": "runs/all",
            "all": {"seed": 4, "batch": 2, "updates": 5},
            "stages": [
                {"config": "sub/first.yaml", "batch": 3},
                {"name": "second", **NEXT},
                {**NEXT, "output": "third", "updates": 6},
                {"config": "sub/first.yaml", "model": {"path": "previous"}},
            ],
        },
    )
    stages = load_curriculum(path)
    assert [stage.output for stage in stages] == [
        "runs/all/1_first",
        "runs/all/2_second",
        "third",
        "runs/all/4_first",
    ]
    assert [stage.model.path for stage in stages] == [
        "base",
        "runs/all/1_first/judge",
        "runs/all/2_second/judge",
        "third/judge",
    ]
    # A stage's own settings go before those of all, and these before its file's.
    assert [stage.batch for stage in stages] == [3, 2, 2, 2]
    assert [stage.updates for stage in stages] == [5, 5, 6, 5]
    assert {stage.seed for stage in stages} == {4}
    assert [list(stage.lessons) for stage in stages] == [
        ["scan"],
        ["inspect"],
        ["inspect"],
        ["scan"],
    ]


def test_overrides_of_every_stage_and_of_one(tmp_path: Path) -> None:
    path = saved(tmp_path, {"output": "a", "stages": [STAGE, NEXT, {**NEXT, "name": "last"}]})
    stages = load_curriculum(
        path,
        ["updates=7", "2.updates=8", "output=b", "model.path=other", "3.output=c", "seed=2"],
    )
    assert [stage.updates for stage in stages] == [7, 8, 7]
    assert [stage.output for stage in stages] == ["b/1_stage", "b/2_stage", "c"]
    assert [stage.model.path for stage in stages] == [
        "other",
        "b/1_stage/judge",
        "b/2_stage/judge",
    ]
    assert {stage.seed for stage in stages} == {2}
    for wrong in ("4.updates=1", "0.updates=1"):
        with pytest.raises(ValueError, match=rf"overrides must be of stages 1 to 3, got '{wrong}'"):
            load_curriculum(path, [wrong])
    (only,) = load_curriculum(saved(tmp_path, {"stages": [STAGE]}), ["output=b"])
    assert only.output == "b/1_stage"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([STAGE], r"config must have keys, got a list"),
        ({"stages": [], "output": "a"}, r"stages must be a list of at least one, got \[\]"),
        ({"stages": "a.yaml", "output": "a"}, r"stages must be a list of at least one, got a.yaml"),
        ({"stages": None}, r"stages must be a list of at least one, got None"),
        ({"stages": ["a.yaml"]}, r"stage 1 must be `config: FILE` or settings, got 'a.yaml'"),
        ({"stages": [STAGE]}, r"output must be given, got nothing"),
        (
            {"stages": [STAGE], "output": "a", "al": {}},
            r"a curriculum must have no keys but stages, all, output, got 'al'; did you mean 'all'",
        ),
        (
            {"stages": [NEXT], "output": "a"},
            r"stage 1 \(stage\): model.path must be a judge for the first stage",
        ),
        (
            {"stages": [STAGE, {**NEXT, "output": "a/1_stage"}], "output": "a"},
            r"stage 2 \(stage\): output must be its own, got a/1_stage again",
        ),
        (
            {"stages": [STAGE, {**NEXT, "name": "x", "lessons": {"scna": 1}}], "output": "a"},
            r"stage 2 \(x\): lessons must name some of .*, got 'scna'; did you mean 'scan'",
        ),
        (
            {"stages": [STAGE], "output": "a", "all": {"updatse": 1}},
            r"stage 1 \(stage\): updatse must be a known key.*; did you mean 'updates'",
        ),
        ({"stages": [STAGE], "output": ""}, r"output must be the name of a folder, got ''"),
        ({"stages": [STAGE], "output": ["a"]}, r"output must be the name of a folder, got \['a'\]"),
        (
            {"stages": [{**STAGE, "output": " "}]},
            r"stage 1 \(stage\): output must be the name of a folder, got ' '",
        ),
        ({**STAGE, "output": ""}, r"output must be the name of a folder, got ''"),
        ({"stages": [STAGE], "output": "${oops}"}, r"output: Interpolation key 'oops' not found"),
        ({"stages": "${oops}", "output": "a"}, r"stages: Interpolation key 'oops' not found"),
        ({"stages": ["${oops}"], "output": "a"}, r"stage 1: Interpolation key 'oops' not found"),
        (
            {"stages": [{**STAGE, "model": {"path": "${oops}"}}], "output": "a"},
            r"stage 1 \(stage\): model.path: Interpolation key 'oops' not found",
        ),
        (
            {"stages": [{"config": "${oops}"}], "output": "a"},
            r"stage 1: config: Interpolation key 'oops' not found",
        ),
        ({"stages": [STAGE], "output": "a", "all": [1]}, r"all must be settings with .* got \[1\]"),
        (
            {"stages": [STAGE], "output": "a", "all": {5: 1}},
            r"stage 1 \(stage\): 5 must be a known key, got none of that name",
        ),
        ({"stages": [STAGE], "output": "a", "all": 5}, r"all must be settings with keys, got 5"),
        (
            {"stages": [{"config": ["base.yaml"]}], "output": "a"},
            r"stage 1: config must be text, got \['base.yaml'\]",
        ),
        ({"stages": [{**STAGE, "name": 5}], "output": "a"}, r"stage 1: name must be text, got 5"),
        (
            {"stages": [{**STAGE, "data": ["a"]}], "all": {"data": {"workers": 0}}, "output": "a"},
            r"stage 1 \(stage\): data must be of one kind, got a list and keys",
        ),
    ],
)
def test_what_is_wrong_is_named_by_its_place(tmp_path: Path, tree: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"stages.yaml: {message}"):
        load_curriculum(saved(tmp_path, tree))


def test_files_that_hold_no_keys(tmp_path: Path) -> None:
    for text, message in (
        ("5", r"config must be readable YAML, got .*base.yaml"),
        ("[1]", r"base.yaml: config must have keys, got a list"),
    ):
        (tmp_path / "base.yaml").write_text(text)
        path = saved(tmp_path, {"stages": [{"config": "base.yaml"}], "output": "a"})
        for file in (path, tmp_path / "base.yaml"):
            with pytest.raises(ValueError, match=message):
                load_curriculum(file)


def test_what_all_stages_share_may_refer_to_what_each_has(tmp_path: Path) -> None:
    shared = {"optimizer": {"warmup": "${updates}"}}
    stages = [{**STAGE, "updates": 3}, {**NEXT, "updates": 5}]
    path = saved(tmp_path, {"stages": stages, "all": shared, "output": "a"})
    assert [stage.optimizer.warmup for stage in load_curriculum(path)] == [3, 5]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output=''", r"overrides must name a folder as output, got \"output=''\""),
        ("output=[a", r"overrides must have values in YAML, got 'output=\[a'"),
    ],
)
def test_an_output_that_is_none(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_curriculum(saved(tmp_path, {"stages": [STAGE]}), [override])


def test_files_of_stages_must_exist(tmp_path: Path) -> None:
    saved(tmp_path, STAGE, "frames.yaml")
    path = saved(tmp_path, {"stages": [{"config": "frame.yaml"}], "output": "a"})
    with pytest.raises(FileNotFoundError, match=r"got .*frame.yaml; did you mean 'frames.yaml'"):
        load_curriculum(path)
