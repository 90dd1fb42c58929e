"""Every recipe loads; every wrong key and type in it is refused; the big one runs when tiny."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from omegaconf import OmegaConf
from torch import Tensor

from cac_reward.judges.local import LocalJudge
from cac_reward.training.curricula import load_curriculum
from cac_reward.training.settings import to_tree as stage_to_tree
from diffusion_rl.algorithms import ALGORITHMS
from diffusion_rl.configuration import build, load_config, save_config, to_tree
from diffusion_rl.guards import STATISTICS
from diffusion_rl.launch import LORA, prepare, train
from tests.tiny_judge import build_tiny_judge
from tests.tiny_wan import save_tiny_wan

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "rl"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
BIG = FOLDER / "wan2.1_1.3b_grpo.yaml"
CALL = '<tool_call>\n{"name": "inspect", "arguments": {"windows": [[0.00, 0.25]]}}\n</tool_call>'
FINDINGS = (
    '{"findings": [{"type": "vanish", "window": [0.00, 0.25], "boxes": '
    '[{"time": 0.00, "box": [100, 100, 500, 500]}], "severity": 2, "why": "gone"}]}'
)

Place = tuple[str | int, ...]
REQUIRED: list[Place] = [("generator", key) for key in ("path", "height", "width", "num_frames")]
REQUIRED += [("generator", "fps"), ("prompts",), ("output",)]


def tree_of(name: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(FOLDER / name), resolve=True)


def places(tree: Any, here: Place = ()) -> Iterator[Place]:
    """Where every key stands; what a reward is called with is its own affair."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*here, key)
            if key != "options":
                yield from places(value, (*here, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from places(value, (*here, index))


def spoil(tree: Any, place: Place) -> tuple[Any, Any]:
    """A deep copy and the mapping in it that holds the last key of `place`."""
    spoilt = copy.deepcopy(tree)
    parent = spoilt
    for key in place[:-1]:
        parent = parent[key]
    return spoilt, parent


def written(place: Place) -> str:
    text = ""
    for key in place:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def brightness(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
    return videos.mean((1, 2, 3, 4))


def test_there_are_recipes() -> None:
    assert {"toy_grpo.yaml", "toy_nft.yaml"} <= set(RECIPES)
    rows = {load_config(FOLDER / name).algorithm.name for name in RECIPES if "wan" in name}
    assert rows == set(ALGORITHMS)


@pytest.mark.parametrize("row", ALGORITHMS)
def test_every_row_has_a_recipe_that_marks_what_is_its_papers(row: str) -> None:
    name = f"wan2.1_1.3b_{row}.yaml"
    assert load_config(FOLDER / name).algorithm.name == row
    head, marked = (FOLDER / name).read_text().splitlines()[:5], []
    assert '"paper" marks' in head[1]
    for line in (FOLDER / name).read_text().splitlines()[5:]:
        key, _, comment = line.partition("# paper")
        marked += [key.split(":")[0].strip()] if comment or line.endswith("# paper") else []
    assert "name" in marked  # Its comment says which defaults of the row are the paper's, too.
    if row != "raft":  # A paper of text and pictures: only the choice is its own.
        assert {"num_inference_steps", "videos_per_prompt"} & set(marked)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_and_survives_saving(name: str, tmp_path: Path) -> None:
    settings = load_config(FOLDER / name)
    save_config(settings, tmp_path / name)
    assert load_config(tmp_path / name) == settings
    assert {reward.name for reward in settings.rewards} >= {"cac", "alignment"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_guarded_against_hacking(name: str) -> None:
    settings = load_config(FOLDER / name)
    assert {guard.statistic for guard in settings.guards} == set(STATISTICS)
    # One recipe shows what happens without: its guards and its second reward only watch.
    charges = [guard.weight for guard in settings.guards]
    weights = {reward.name: reward.weight for reward in settings.rewards}
    if name == "toy_unguarded.yaml":
        assert set(charges) == {weights["alignment"]} == {settings.algorithm.kl_weight} == {0.0}
    else:
        assert min(charges) > 0
        assert settings.algorithm.kl_weight > 0
        assert weights["alignment"] > 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_leaves_out_what_is_the_default_anyway(name: str) -> None:
    """Values equal to the default hide the ones that matter; sizes and weights may be repeated."""
    tree = tree_of(name)
    expected = to_tree(build(tree))
    for place in places(tree):
        spoilt, parent = spoil(tree, place)
        if place[0] in ("rewards", "guards") or place[-1] in ("name", "updates"):
            continue
        if isinstance(parent[place[-1]], dict | list) or place in REQUIRED:
            continue
        del parent[place[-1]]
        try:
            without = to_tree(build(spoilt))
        except ValueError:  # The rest of the recipe does not fit the default.
            continue
        assert without != expected, f"{name}: {written(place)} is the default"


@pytest.mark.parametrize("name", RECIPES)
def test_every_misspelt_key_is_refused_with_its_path(name: str) -> None:
    tree = tree_of(name)
    for place in places(tree):
        spoilt, parent = spoil(tree, place)
        parent[f"{place[-1]}x"] = parent.pop(place[-1])
        with pytest.raises(ValueError, match="must be a known key") as raised:
            build(spoilt)
        # The algorithm's name chooses which keys there are; without it the first one is named.
        if place != ("algorithm", "name"):
            assert str(raised.value).startswith(f"{written(place)}x must be a known key")
            assert f"did you mean {place[-1]}?" in str(raised.value)


@pytest.mark.parametrize("name", RECIPES)
def test_every_wrong_type_is_refused_with_its_path(name: str) -> None:
    tree = tree_of(name)
    for place in places(tree):
        spoilt, parent = spoil(tree, place)
        value = parent[place[-1]]
        parent[place[-1]] = "text" if isinstance(value, dict | list) else {"unexpected": 1}
        with pytest.raises(ValueError, match=" must be ") as raised:
            build(spoilt)
        assert str(raised.value).startswith(f"{written(place)} must be ")


def test_without_the_hub_the_big_recipe_fails_at_once(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    settings = load_config(
        BIG,
        [
            f"prompts={tmp_path / 'prompts.txt'}",
            f"output={tmp_path / 'run'}",
            f"rewards=[{{name: brightness, target: '{__name__}:brightness'}}]",
        ],
    )
    message = r"got Wan-AI/Wan2.1-T2V-1.3B-Diffusers; .*cache .*--local-path FOLDER"
    with pytest.raises(FileNotFoundError, match=message):
        prepare(settings)


def write_by_the_protocol(
    judge: LocalJudge, conversations: Sequence[Any], *, prefix: str = "", **options: Any
) -> list[str]:
    """What a trained judge writes; random weights write rubbish."""
    del judge, options
    return [CALL if prefix.startswith("<tool_call>") else FINDINGS] * len(conversations)


def test_a_tiny_wan_and_a_tiny_qwen_go_through_the_big_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalJudge, "generate", write_by_the_protocol)
    wan = save_tiny_wan(tmp_path / "wan", scheduler="unipc")
    judge = build_tiny_judge(tmp_path / "judge")
    (tmp_path / "prompts.txt").write_text("a red circle\nthe blue square\n")
    overrides = [
        f"generator.local_path={wan}",
        "generator.height=16",
        "generator.width=16",
        "generator.num_frames=5",
        "generator.device=cpu",
        "rollout.num_inference_steps=4",
        "rollout.prompts_per_update=2",
        "rollout.videos_per_prompt=2",
        f"prompts={tmp_path / 'prompts.txt'}",
        f"output={tmp_path / 'run'}",
        "updates=1",
    ]
    for reward in range(2):
        overrides += [
            f"rewards[{reward}].options.path_or_hub_id={judge}",
            f"rewards[{reward}].options.device=cpu",
            f"rewards[{reward}].options.dtype=float32",
        ]
    run = prepare(load_config(BIG, overrides))
    (report,) = train(run)
    assert report.rewards.keys() == {"cac", "alignment"}
    assert all(0 < score < 1 for score in report.rewards.values())
    assert report.guards.keys() == {"motion", "sharpness", "contrast", "diversity"}
    assert report.missing_share == 0.0
    assert report.videos_generated == 2 + 4 + 4
    assert (tmp_path / "run" / LORA).is_dir()


REWARD_FOLDER = FOLDER.parent / "reward"
REWARD_RECIPES = sorted(path.name for path in REWARD_FOLDER.glob("*.yaml"))
ACCELERATE_FOLDER = FOLDER.parent / "accelerate"
MAY_BE_DEFAULT = {"updates", "path", "name", "config", "max_frames"}
"""What a reader looks for, whatever its value."""


def test_each_published_system_has_its_recipes() -> None:
    systems = {name.partition("_")[0] for name in REWARD_RECIPES}
    assert systems == {"cac", "srvau", "toy", "vanguard", "vau"}
    trained = {
        stage.trainer for name in REWARD_RECIPES for stage in load_curriculum(REWARD_FOLDER / name)
    }
    assert trained == {"sft", "grpo"}


@pytest.mark.parametrize("name", REWARD_RECIPES)
def test_a_recipe_of_a_judge_loads_and_leaves_out_what_is_the_default(
    name: str, tmp_path: Path
) -> None:
    path = REWARD_FOLDER / name
    tree = OmegaConf.to_container(OmegaConf.load(path))
    expected = [stage_to_tree(stage) for stage in load_curriculum(path)]
    copy_of = tmp_path / name
    for other in REWARD_FOLDER.glob("*.yaml"):
        (tmp_path / other.name).write_text(other.read_text())
    for place in places(tree):
        spoilt, parent = spoil(tree, place)
        above = place[-2] if len(place) > 1 else None
        if isinstance(parent[place[-1]], dict | list) or place[-1] in MAY_BE_DEFAULT:
            continue
        if above in ("lessons", "rewards") or isinstance(place[-1], int):
            continue
        del parent[place[-1]]
        copy_of.write_text(OmegaConf.to_yaml(OmegaConf.create(spoilt)))
        try:
            without = [stage_to_tree(stage) for stage in load_curriculum(copy_of)]
        except ValueError:  # The rest of the recipe does not fit the default.
            continue
        assert without != expected, f"{name}: {written(place)} is the default"


@pytest.mark.parametrize("name", REWARD_RECIPES)
def test_groups_of_answers_are_whole_on_1_8_and_64_gpus(name: str) -> None:
    for stage in load_curriculum(REWARD_FOLDER / name):
        if stage.trainer == "grpo":
            for processes in (1, 8, 64):
                answers = stage.batch * stage.batches(processes) * processes
                assert answers % stage.rollout.group == 0


def test_a_papers_batch_is_the_same_on_1_8_and_64_gpus() -> None:
    (stage,) = load_curriculum(REWARD_FOLDER / "srvau_r1_grpo.yaml")
    assert [stage.batch * stage.batches(n) * n for n in (1, 8, 64)] == [128, 128, 128]
    (stage,) = load_curriculum(REWARD_FOLDER / "vau_r1_sft.yaml")
    assert stage.batches(1) == 1
    with pytest.raises(ValueError, match="got 1 on 8; launch 1, or set per_update=8"):
        stage.batches(8)


@pytest.mark.parametrize("path", sorted(ACCELERATE_FOLDER.glob("*.yaml")), ids=lambda one: one.name)
def test_accelerate_takes_its_configurations(path: Path) -> None:
    """It refuses keys that it does not know."""
    loaded = load_config_from_file(str(path))
    known = {"NO", "MULTI_GPU", "FSDP", "DEEPSPEED"}
    assert str(getattr(loaded.distributed_type, "value", loaded.distributed_type)) in known
    assert loaded.mixed_precision == "bf16"
    digits = "".join(one for one in path.stem.partition("_")[2] if one.isdigit())
    if "gpu" in path.stem and digits:
        assert loaded.num_processes == int(digits) == 8 * loaded.num_machines


def test_a_wrong_key_of_accelerate_is_noticed(tmp_path: Path) -> None:
    text = (ACCELERATE_FOLDER / "one_gpu.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(text + "machines: 1\n")
    with pytest.raises(ValueError, match="machines"):
        load_config_from_file(str(tmp_path / "wrong.yaml"))
