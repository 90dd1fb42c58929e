"""Every key of a stage's YAML: read, kept, overridden, and refused by its name."""

import copy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from cac_reward.frames import InspectSettings, JudgeSettings, ScanSettings
from cac_reward.training import grpo_settings
from cac_reward.training import settings as module
from cac_reward.training.rules import at_least, within
from cac_reward.training.settings import (
    JudgeView,
    LoraSettings,
    StageSettings,
    build_stage,
    load_stage,
    to_tree,
)

SMALL = {"model": {"path": "x"}, "data": {"train": ["a"]}, "lessons": {"scan": 1}, "output": "o"}
GRPO = {**SMALL, "trainer": "grpo", "lessons": {"inspect": 1}, "rewards": {"accuracy": 1}}
FULL = {
    **GRPO,
    "model": {
        "path": "x",
        "revision": "main",
        "base": "y",
        "dtype": "float32",
        "attention": "eager",
        "pictures_together": False,
        "learns": "all",
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "dora": True, "targets": ["q", "v"]},
        "gradient_checkpointing": False,
    },
    "judge": {
        "wording": "brief",
        "domain": "toys",
        "scan": {"fps": 3, "max_frames": 5, "pixels": 256},
        "inspect": {"fps": 6, "max_frames": 7, "pixels": 1024, "margin_seconds": 0},
    },
    "data": {
        "train": ["a", "b"],
        "held_out": ["c"],
        "videos": "v",
        "split": "train",
        "held_out_split": "val",
        "anomalous_share": 0.5,
        "workers": 0,
        "max_skipped_share": 1,
    },
    "options": {"turns": 2, "exact_windows": 0.25},
    "classes": ["a", "b"],
    "trackers": ["tensorboard"],
    "updates": 3,
    "seed": 5,
}


def changed(key: str, value: Any, base: dict[str, Any] = SMALL) -> dict[str, Any]:
    """A tree with one key set to something."""
    tree = copy.deepcopy(base)
    *path, last = key.split(".")
    place = tree
    for part in path:
        place = place.setdefault(part, {})
    place[last] = value
    return tree


@pytest.mark.parametrize("tree", [SMALL, GRPO, FULL])
def test_settings_come_back_from_their_tree(tree: dict[str, Any], tmp_path: Path) -> None:
    settings = build_stage(tree, "a.yaml")
    assert build_stage(to_tree(settings), "b") == settings
    (tmp_path / "c.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(to_tree(settings))))
    assert load_stage(tmp_path / "c.yaml") == settings
    for key, value in OmegaConf.to_container(OmegaConf.create(tree)).items():
        kept = to_tree(settings)[key]
        if isinstance(value, dict):
            assert {name: kept[name] for name in value} == value
        else:
            assert kept == value


def test_every_key_has_a_line_on_it() -> None:
    for one in (module, grpo_settings):
        source = Path(one.__file__).read_text(encoding="utf-8")
        kinds = [kind for kind in vars(one).values() if is_dataclass(kind)]
        for kind in [kind for kind in kinds if kind.__module__ == one.__name__]:
            for key in fields(kind):
                line = source.partition(f"    {key.name}: ")[2].splitlines()[1]
                assert line.startswith('    """'), key.name


REFUSED: list[tuple[str, Any, str]] = [
    ("trainer", "sftt", r"trainer must be one of sft, grpo, got 'sftt'"),
    ("model.learns", "some", r"model.learns must be one of all, language, heads, got 'some'"),
    ("model", {"path": "x", "learns": "heads", "lora": {}}, r"model.lora must be null where"),
    ("model.lora.rank", 0, r"model.lora.rank must be at least 1, got 0"),
    ("model.lora.alpha", 0, r"model.lora.alpha must be at least 1, got 0"),
    ("model.lora.dropout", 1.0, r"model.lora.dropout must be in \[0, 1\), got 1.0"),
    ("model.lora.targets", [], r"model.lora.targets must name at least one layer, got none"),
    ("data.train", [], r"data.train must name at least one file, got none"),
    ("data.workers", -1, r"data.workers must be at least 0, got -1"),
    ("data.anomalous_share", 1.5, r"data.anomalous_share must be in \[0, 1\], got 1.5"),
    ("data.anomalous_share", float("nan"), r"data.anomalous_share must be in \[0, 1\], got nan"),
    ("data.max_skipped_share", -0.1, r"data.max_skipped_share must be in \[0, 1\], got -0.1"),
    ("loss.words", -1, r"loss.words must be at least 0, got -1"),
    ("loss.frames", float("inf"), r"loss.frames must be at least 0, got inf"),
    ("loss.caption_tokens", 0, r"loss.caption_tokens must be at least 1, got 0"),
    ("loss.words", 0, r"loss must have a part with a weight above 0, got none"),
    ("rollout.group", 1, r"rollout.group must be at least 2, got 1"),
    ("rollout.temperature", 0, r"rollout.temperature must be above 0, got 0"),
    ("rollout.max_call_tokens", 0, r"rollout.max_call_tokens must be at least 1, got 0"),
    ("rollout.max_answer_tokens", 0, r"rollout.max_answer_tokens must be at least 1, got 0"),
    ("rollout.vllm_memory", 1, r"rollout.vllm_memory must be in \(0, 1\), got 1"),
    ("grpo.kl_weight", -1, r"grpo.kl_weight must be at least 0, got -1"),
    ("grpo.loss_type", "ppo", r"grpo.loss_type must be one of grpo, .* got 'ppo'"),
    ("grpo.scale_rewards", "all", r"grpo.scale_rewards must be one of group, batch, none, got"),
    ("grpo.clip_low", 1.5, r"grpo.clip_low must be in \[0, 1\], got 1.5"),
    ("grpo.clip_high", -1, r"grpo.clip_high must be at least 0, got -1"),
    ("grpo.updates_per_rollout", 0, r"grpo.updates_per_rollout must be at least 1, got 0"),
    ("optimizer.name", "sgd", r"optimizer.name must be one of adamw, adamw_8bit, muon, got 'sgd'"),
    ("optimizer.learning_rate", 0, r"optimizer.learning_rate must be above 0, got 0"),
    ("optimizer.muon_rate", -1, r"optimizer.muon_rate must be above 0, got -1"),
    ("optimizer.max_grad_norm", float("nan"), r"optimizer.max_grad_norm must be above 0, got nan"),
    ("optimizer.weight_decay", -1, r"optimizer.weight_decay must be at least 0, got -1"),
    ("optimizer.warmup", -1, r"optimizer.warmup must be at least 0, got -1"),
    ("optimizer.schedule", "step", r"optimizer.schedule must be one of cosine, .* got 'step'"),
    (
        "optimizer",
        {"schedule": "constant", "warmup": 5},
        r"optimizer.warmup must be 0 for the schedule 'constant', got 5; 'constant_with_warmup'",
    ),
    ("evaluation.every", -1, r"evaluation.every must be at least 0, got -1"),
    ("evaluation.clips", 0, r"evaluation.clips must be at least 1, got 0"),
    ("evaluation.batch", 0, r"evaluation.batch must be at least 1, got 0"),
    ("judge.wording", "short", r"judge.wording must be one of brief, full, got 'short'"),
    ("judge.domain", "", r"judge.domain must be a name or null, got ''"),
    ("judge.scan.fps", -1, r"scan.fps must be above 0, got -1"),
    ("judge.inspect.max_frames", 1, r"inspect.max_frames must be an integer of at least 2, got 1"),
    ("lessons", {}, r"lessons must have at least one with a share above 0, got {}"),
    ("lessons.scan", 0, r"lessons must have at least one with a share above 0, got"),
    ("lessons.scan", -1, r"lessons.scan must be at least 0, got -1"),
    ("lessons.insepct", 1, r"lessons must name some of scan, .*, got 'insepct'; did you mean 'ins"),
    ("options.turn", 1, r"options must name some of .*, got 'turn'; did you mean 'turns'\?"),
    ("options.thinking", 2, r"options.thinking must be in \[0, 1\], got 2"),
    ("lessons.classification", 1, r"classes must be at least two for lessons.classification"),
    ("rewards", {"accuracy": 1}, r"rewards must be left out for 'sft'; it learns from written"),
    *((name, 0, rf"{name} must be at least 1, got 0") for name in ("updates", "batch", "keep")),
    *((name, 0, rf"{name} must be at least 1, got 0") for name in ("accumulation", "save_every")),
    ("per_update", 0, r"per_update must be at least 1, got 0"),
    ("seed", -1, r"seed must be at least 0, got -1"),
]


@pytest.mark.parametrize(("key", "value", "message"), REFUSED)
def test_rules_are_named_by_their_keys(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^some.yaml: {message}"):
        build_stage(changed(key, value), "some.yaml")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rewards", {}, r"rewards must have at least one with a share above 0, got {}"),
        ("rewards.acuracy", 1, r"rewards must name some of .*, got 'acuracy'; did you mean 'accur"),
        ("rewards.accuracy", -1, r"rewards.accuracy must be at least 0, got -1"),
        ("lessons.scan", 1, r"lessons must be ones that rewards can judge, got 'scan'"),
        ("model.learns", "heads", r"model.learns must be 'all' or 'language' for 'grpo', got"),
    ],
)
def test_rules_of_grpo(key: str, value: Any, message: str) -> None:
    build_stage(changed("lessons.scan", 0, GRPO), "a share of none is as if left out")
    with pytest.raises(ValueError, match=message):
        build_stage(changed(key, value, GRPO), "some.yaml")


@pytest.mark.parametrize(
    ("lessons", "rewards", "message"),
    [
        (
            {"inspect": 1},
            {"question_answer": 1},
            r"rewards must have one that lessons.inspect can earn, got question_answer; add one of "
            r"accuracy, .*, or leave the lesson out",
        ),
        (
            {"inspect": 1, "qa": 1},
            {"accuracy": 1},
            r"rewards must have one that lessons.qa can earn, got accuracy; add one of "
            r"question_answer, format, or",
        ),
        (
            {"qa": 1},
            {"question_answer": 1, "temporal_iou": 1},
            r"rewards.temporal_iou must be one that a lesson can earn, got lessons qa; set it to "
            r"0, or add lessons.inspect",
        ),
        (
            {"qa": 1, "classification": 1},
            {"format": 1, "grounding_iou": 1},
            r"rewards.grounding_iou must be .* qa, classification; .* or add lessons.grounding",
        ),
        (
            {"inspect": 1},
            {"accuracy": 1, "question_answer": 1},
            r"rewards.question_answer must be one .* got lessons inspect; .* or add lessons.qa",
        ),
        (
            {"grounding": 1},
            {"grounding_iou": 1, "reflection_length": 1},
            r"rewards.reflection_length must be .*; set it to 0, or set options.reflection above 0",
        ),
    ],
)
def test_rewards_that_no_lesson_can_earn_are_refused(
    lessons: dict[str, float], rewards: dict[str, float], message: str
) -> None:
    """And lessons that no reward can judge."""
    tree = {**GRPO, "lessons": lessons, "rewards": rewards, "classes": ["a", "b"]}
    with pytest.raises(ValueError, match=f"^some.yaml: {message}"):
        build_stage(tree, "some.yaml")


def test_rewards_that_some_lesson_can_earn_are_taken() -> None:
    """Those of no weight are only watched, lessons of no share never asked."""
    lessons = {"inspect": 1, "grounding": 1, "qa": 0}
    rewards = {"accuracy": 1, "grounding_iou": 1, "reflection_quality": 0}
    asked: dict[str, Any] = {**GRPO, "lessons": lessons}
    reflecting = {**GRPO, "lessons": {"qa": 1}, "options": {"reflection": 0.5}}
    for tree, earned in (
        (asked, rewards),
        (asked, {"format": 1}),
        (reflecting, {"reflection_quality": 1, "reflection_length": 1}),
    ):
        stage = build_stage({**tree, "rewards": earned}, "some.yaml")
        assert stage.rewards == earned
        assert stage.lessons == tree["lessons"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("updates", "many", r"updates: Value 'many' of type 'str' could not be converted to Int"),
        ("batch", 1.5, r"batch: Value '1.5' of type 'float' could not be converted to Integer"),
        ("bf16", "perhaps", r"bf16: Value 'perhaps' is not a valid bool"),
        ("data.train", "a.jsonl", r"data.train must be a list, as \[A, B\]"),
        ("data", 5, r"data: Invalid type assigned: int is not a subclass of DataSettings"),
        ("lessons", "scan", r"lessons: Cannot assign str to Dict\[str, float\]"),
        ("options.boxes", "few", r"options.boxes: Value 'few' of type 'str' could not be conv"),
        ("model.lora.rank", "x", r"model.lora.rank: Value 'x' of type 'str' could not be conv"),
        ("model.paht", "x", r"model.paht must be a known key, .* did you mean 'path'\?"),
        ("modle", {}, r"modle must be a known key, got none of that name; did you mean 'model'\?"),
        ("judge.scan", {"zzz": 1}, r"judge.scan.zzz must be a known key.* known: fps, max_frames"),
        ("model", {}, r"model.path must be given, got nothing"),
    ],
)
def test_wrong_types_and_unknown_keys(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^some.yaml: {message}"):
        build_stage(changed(key, value), "some.yaml")


@pytest.mark.parametrize("key", SMALL)
def test_what_must_be_given(key: str) -> None:
    tree = {name: value for name, value in SMALL.items() if name != key}
    with pytest.raises(ValueError, match=rf"^some.yaml: {key} must be given, got nothing"):
        build_stage(tree, "some.yaml")


def test_overrides() -> None:
    settings = build_stage(
        SMALL,
        "some.yaml",
        ["updates=7", "data.train=[c, d]", "model.lora.rank=2", "lessons.scan=0", "lessons.qa=3"],
    )
    assert settings.updates == 7
    assert settings.data.train == ["c", "d"]
    assert settings.model.lora == LoraSettings(rank=2)
    assert settings.lessons == {"scan": 0, "qa": 3}
    for wrong in ("updates", "=3", "updates="):
        with pytest.raises(ValueError, match=rf"overrides must be key=value, got '{wrong}'"):
            build_stage(SMALL, "some.yaml", [wrong])
    with pytest.raises(ValueError, match=r"overrides must have values in YAML, got .*train=\[a"):
        build_stage(SMALL, "some.yaml", ["data.train=[a"])
    with pytest.raises(ValueError, match=r"updatse must be a known key.*did you mean 'updates'"):
        build_stage(SMALL, "some.yaml", ["updatse=3"])


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "stage_one.yaml").write_text("a: [")
    with pytest.raises(
        FileNotFoundError, match=r"must be an existing .* did you mean 'stage_one.yaml'"
    ):
        load_stage(tmp_path / "stage_on.yaml")
    with pytest.raises(FileNotFoundError, match=r"config must be an existing YAML file, got .*z$"):
        load_stage(tmp_path / "z")
    with pytest.raises(ValueError, match=r"config must be readable YAML, got .*stage_one.yaml"):
        load_stage(tmp_path / "stage_one.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=r"config must be readable YAML, got .*bytes.yaml"):
        load_stage(tmp_path / "bytes.yaml")


def test_a_judges_own_view_stays_where_nothing_is_said() -> None:
    known = JudgeSettings(
        wording="brief",
        domain="toys",
        scan=ScanSettings(fps=3.0),
        inspect=InspectSettings(pixels=256),
    )
    assert JudgeView().over(known) == known
    other = JudgeView(wording="full", domain="all", scan=ScanSettings(fps=1.0)).over(known)
    assert other == JudgeSettings(
        wording="full", domain="all", scan=ScanSettings(fps=1.0), inspect=known.inspect
    )
    assert JudgeView(inspect=InspectSettings()).over(known).inspect == InspectSettings()


def test_an_update_is_as_large_on_any_number_of_processes() -> None:
    plain = build_stage({**SMALL, "batch": 2, "accumulation": 3}, "a")
    assert [plain.batches(processes) for processes in (1, 8)] == [3, 3]
    fixed = build_stage({**SMALL, "batch": 2, "per_update": 128}, "a")
    assert [fixed.batches(processes) for processes in (1, 8, 64)] == [64, 8, 1]
    with pytest.raises(
        ValueError, match=r"accumulation must be left out where per_update is 8, go"
    ):
        build_stage({**SMALL, "accumulation": 2, "per_update": 8}, "a")


@pytest.mark.parametrize(
    ("batch", "per_update", "processes", "message"),
    [
        (1, 1, 8, r"of the processes, got 1 on 8; launch 1, or set per_update=8 \(and the rate"),
        (1, 20, 8, r"of the processes, got 20 on 8; launch 5, or set per_update=24"),
        (4, 24, 4, r"of batch \* processes, got 24 with 4 \* 4; set batch=3"),
        (8, 4, 1, r"of batch \* processes, got 4 with 8 \* 1; set batch=4"),
    ],
)
def test_an_update_that_cannot_be_shared_out(
    batch: int, per_update: int, processes: int, message: str
) -> None:
    stage = build_stage({**SMALL, "batch": batch, "per_update": per_update}, "a")
    with pytest.raises(ValueError, match=f"^per_update must be a multiple {message}"):
        stage.batches(processes)


def test_rules_hold_at_their_ends() -> None:
    at_least("a", 1, 1)
    within("a", 0, 0, 1)
    within("a", 1, 0, 1, closed=True)
    for value in (1.0, -1e-9, float("nan")):
        with pytest.raises(ValueError, match=r"a must be in \[0, 1\)"):
            within("a", value, 0, 1)
    with pytest.raises(ValueError, match=r"a must be at least 1, got inf"):
        at_least("a", float("inf"), 1)


def test_the_smallest_stage_has_the_documented_defaults() -> None:
    assert build_stage(SMALL, "a") == StageSettings(
        model=module.ModelSettings(path="x"),
        data=module.DataSettings(train=["a"]),
        lessons={"scan": 1.0},
        output="o",
    )
