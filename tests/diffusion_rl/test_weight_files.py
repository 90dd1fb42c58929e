"""Whole transformers on their way to diffusers and back, and runs in which they learn."""

import dataclasses
import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor

from diffusion_rl.__main__ import main
from diffusion_rl.checkpoint import read_checkpoint, restore, save_checkpoint, take_snapshot
from diffusion_rl.configuration import RunSettings, build, load_config
from diffusion_rl.finetune import begin, finetune
from diffusion_rl.full_policies import FullSettings
from diffusion_rl.generators.wan import WanGenerator
from diffusion_rl.generators.wan22 import Wan22Generator
from diffusion_rl.launch import build_generator, prepare, train
from diffusion_rl.lora import AVERAGE, OLD, TRAINED, LoraSettings
from diffusion_rl.lora_files import save_lora
from diffusion_rl.policies import (
    attach_policies,
    full_policies,
    policies_of,
    reference_policy,
    trained_parameters,
    update_average,
)
from diffusion_rl.rewards import Reward
from diffusion_rl.sampling import sample_videos
from diffusion_rl.weight_files import (
    TUNED,
    WEIGHTS_FILE,
    load_transformers,
    save_result,
    save_transformers,
)
from tests.tiny_wan import SIZE, build_tiny_wan, save_tiny_wan
from tests.tiny_wan22 import A14B_SIZE, build_tiny_a14b

PROMPTS = ["a red circle moves left", "the blue square"]
ALL = FullSettings()


def shake(generator: WanGenerator) -> None:
    with torch.no_grad():
        for parameter in trained_parameters(generator.transformer):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    policies_of(generator.transformer).sync()


def sample(generator: WanGenerator) -> Tensor:
    return sample_videos(generator, PROMPTS, [3, 4], num_inference_steps=3)


def redness(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
    return videos[:, :, 0].mean((1, 2, 3))


RED = Reward("red", redness)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_diffusers_loads_the_transformer_and_makes_the_same_videos(
    dtype: str, tmp_path: Path
) -> None:
    folder = save_tiny_wan(tmp_path / "pipeline")
    generator = WanGenerator.from_pretrained(folder, **SIZE, dtype=dtype)
    base = sample(generator)
    attach_policies(generator.transformer, FullSettings(targets=("attn1", "ffn")))
    shake(generator)
    videos = sample(generator)
    assert not torch.allclose(videos, base)
    assert save_result(generator, tmp_path) == tmp_path / TUNED
    save_result(generator, tmp_path)  # Over the earlier one.
    assert [path.name for path in (tmp_path / TUNED).iterdir()] == ["transformer"]
    assert "_name_or_path" not in (tmp_path / TUNED / "transformer" / "config.json").read_text()

    types = {"default": getattr(torch, dtype), "vae": torch.float32}
    stock = WanTransformer3DModel.from_pretrained(
        tmp_path / TUNED, subfolder="transformer", dtype=types["default"]
    )
    pipeline = WanPipeline.from_pretrained(folder, transformer=stock, dtype=types)
    assert torch.equal(sample(WanGenerator(pipeline, **SIZE)), videos)

    again = WanGenerator.from_pretrained(folder, **SIZE, dtype=dtype)
    load_transformers(again, tmp_path / TUNED)
    assert torch.equal(sample(again), videos)
    with reference_policy(again.transformer):
        assert torch.equal(sample(again), base)


def test_the_average_is_what_is_saved(tmp_path: Path) -> None:
    generator = WanGenerator(build_tiny_wan(), **SIZE)
    attach_policies(generator.transformer, ALL, average=True)
    shake(generator)
    update_average(generator.transformer, 0.25, update=100)
    save_transformers(generator, tmp_path)
    average = policies_of(generator.transformer).state(AVERAGE)
    saved = WanTransformer3DModel.from_pretrained(tmp_path / "transformer").state_dict()
    trained = policies_of(generator.transformer).state()
    assert all(torch.equal(saved[name], value) for name, value in average.items())
    assert not any(torch.equal(saved[name], value) for name, value in trained.items())


@pytest.mark.parametrize("learns", ["high", "low", "both"])
def test_both_transformers_of_a14b(learns: str, tmp_path: Path) -> None:
    def fresh() -> Wan22Generator:
        return Wan22Generator(build_tiny_a14b(), **A14B_SIZE, learns=learns)

    generator = fresh()
    base = sample(generator)
    attach_policies(generator.transformer, ALL)
    shake(generator)
    save_transformers(generator, tmp_path)
    expected = {
        "high": ["transformer"],
        "low": ["transformer_2"],
        "both": ["transformer", "transformer_2"],
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == expected[learns]
    for name in expected[learns]:
        stock = WanTransformer3DModel.from_pretrained(tmp_path, subfolder=name).state_dict()
        own = getattr(generator.pipeline, name).state_dict()
        assert all(torch.equal(own[key], stock[key]) for key in own)
    again = fresh()
    load_transformers(again, tmp_path)
    assert torch.equal(sample(again), sample(generator))
    with reference_policy(again.transformer):
        assert torch.equal(sample(again), base)


def test_what_is_no_transformer_of_this_model_is_refused(tmp_path: Path) -> None:
    generator = WanGenerator(build_tiny_wan(), **SIZE)
    with pytest.raises(FileNotFoundError, match="with transformer in it, .*, got no .*config.json"):
        load_transformers(generator, tmp_path)
    build_tiny_wan().transformer.save_pretrained(tmp_path / "transformer")
    with pytest.raises(FileNotFoundError, match=f"did you mean the folder it is in, {tmp_path}"):
        load_transformers(generator, tmp_path / "transformer")
    weights = tmp_path / "transformer" / WEIGHTS_FILE
    whole = weights.read_bytes()
    for content in (b"", whole[:-8]):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match="must be a diffusers folder of safetensors, got"):
            load_transformers(generator, tmp_path)
    build_tiny_wan(layers=1).transformer.save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match="must fit the generator's transformer"):
        load_transformers(generator, tmp_path)
    assert full_policies(generator.transformer) is None  # Refused before anything was touched.


def test_a_transformer_in_several_files_is_read(tmp_path: Path) -> None:
    generator = WanGenerator(build_tiny_wan(), **SIZE)
    other = build_tiny_wan(seed=1)
    other.transformer.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    load_transformers(generator, tmp_path)
    state = generator.transformer.state_dict()
    assert all(torch.equal(state[key], v) for key, v in other.transformer.state_dict().items())


def test_lora_and_transformer_are_told_apart(tmp_path: Path) -> None:
    folder = save_tiny_wan(tmp_path / "pipeline")
    settings = run_settings(folder, tmp_path).generator
    generator = WanGenerator(build_tiny_wan(), **SIZE)
    attach_policies(generator.transformer, LoraSettings(rank=2))
    save_lora(generator, tmp_path / "lora")
    tuned = WanGenerator(build_tiny_wan(), **SIZE)
    attach_policies(tuned.transformer, ALL)
    save_transformers(tuned, tmp_path / "tuned")
    with pytest.raises(FileNotFoundError, match="it holds a LoRA, give it with --lora"):
        build_generator(settings, transformer=tmp_path / "lora")
    for wrong in ("tuned", "tuned/transformer"):
        with pytest.raises(FileNotFoundError, match="whole transformers, give it with --transf"):
            build_generator(settings, lora=tmp_path / wrong)
    with pytest.raises(ValueError, match="--transformer must be left out with --lora"):
        build_generator(settings, lora=tmp_path / "lora", transformer=tmp_path / "tuned")


def run_settings(pipeline: Path, place: Path, **changes: object) -> RunSettings:
    (place / "prompts.txt").write_text("a red circle\nthe blue square\n")
    tree = {
        "generator": {**SIZE, "path": str(pipeline)},
        "full": {"targets": ["ffn", "attn1.to_q"]},
        "algorithm": {"name": "nft"},
        "rollout": {"num_inference_steps": 4, "prompts_per_update": 2, "videos_per_prompt": 2},
        "optimizer": {"learning_rate": 1e-2, "average_decay": 0.5},
        "rewards": [{"name": "red", "target": f"{__name__}:redness"}],
        "prompts": str(place / "prompts.txt"),
        "updates": 3,
        "output": str(place / "run"),
    }
    return build(tree | changes)


@pytest.mark.parametrize(("name", "dtype"), [("nft", "bfloat16"), ("grpo", "float32")])
def test_a_full_run_goes_on_bit_for_bit(name: str, dtype: str, tmp_path: Path) -> None:
    folder = save_tiny_wan(tmp_path / "pipeline")
    size = {**SIZE, "path": str(folder), "dtype": dtype}
    whole = run_settings(folder, tmp_path, generator=size, algorithm={"name": name})
    expected = prepare(dataclasses.replace(whole, output=str(tmp_path / "whole")))
    list(train(expected))
    with closing(train(prepare(whole))) as reports:
        for report in reports:
            if report.step == 2:
                break
    run = prepare(whole)
    assert run.state.step == 2
    list(train(run))
    policies, others = (policies_of(one.generator.transformer) for one in (run, expected))
    assert policies.has(OLD) == (name == "nft")
    for policy in (TRAINED, OLD, AVERAGE) if name == "nft" else (TRAINED, AVERAGE):
        state, other = policies.state(policy), others.state(policy)
        assert all(torch.equal(state[key], other[key]) for key in state | other)
    assert run.result == tmp_path / "run" / TUNED
    tuned = build_generator(whole.generator, transformer=run.result)
    stock, average = tuned.transformer.state_dict(), policies.state(AVERAGE)
    for key, value in average.items():
        assert torch.equal(stock[key], value.to(stock[key].dtype))
    assert load_config(tmp_path / "run" / "config.yaml") == whole


def test_a_checkpoint_of_the_other_way_to_learn_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_wan(tmp_path / "pipeline")
    full = run_settings(folder, tmp_path)
    lora = dataclasses.replace(full, full=None, lora=LoraSettings(rank=2))
    parts = []
    for settings in (full, lora):
        generator = WanGenerator(build_tiny_wan(), **SIZE)
        attach_policies(generator.transformer, settings.learner, old_policy=True, average=True)
        parts.append((generator, begin(generator, settings.finetune_settings())))
    snapshots = [take_snapshot(*part) for part in parts]
    with pytest.raises(ValueError, match="must hold full weights, got a LoRA; let what learns be"):
        restore(*parts[0], snapshots[1])
    with pytest.raises(ValueError, match="must hold a LoRA, got full weights; let what learns be"):
        restore(*parts[1], snapshots[0])
    prepare(full)
    save_checkpoint(tmp_path / "run" / "checkpoints", dataclasses.replace(snapshots[0], step=1))
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "step-000001").step == 1
    with pytest.raises(ValueError, match="hold a run of the same settings, .* made with lora=None"):
        prepare(lora)


def test_one_way_to_learn_is_chosen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="full must be left out where lora is given, got both"):
        run_settings(tmp_path, tmp_path, lora={"rank": 2})
    with pytest.raises(ValueError, match="lora must be given where full is not, got neither"):
        run_settings(tmp_path, tmp_path, lora=None, full=None)
    assert run_settings(tmp_path, tmp_path, full={}).learner == ALL
    assert run_settings(tmp_path, tmp_path, full=None).learner.targets


def test_sample_and_evaluate_take_whole_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_wan(tmp_path / "pipeline")
    settings = run_settings(folder, tmp_path)
    run = prepare(dataclasses.replace(settings, updates=1))
    list(train(run))
    prompts = ["--prompts", settings.prompts]
    config = [str(tmp_path / "run" / "config.yaml"), "--transformer", str(run.result)]
    assert main(["sample", *config, *prompts, "--output", str(tmp_path / "videos")]) == 0
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2
    report = ["--output", str(tmp_path / "report"), "--videos-per-prompt", "2"]
    clean = ["--clean", "red"]
    assert main(["evaluate", "--transformer", str(run.result), *prompts, *report, *clean]) == 0
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert "red" in json.dumps(summary)
    assert "red" in capsys.readouterr().out


def test_the_loop_wants_something_that_learns(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, tmp_path).finetune_settings()
    generator = WanGenerator(build_tiny_wan(), **SIZE)
    with pytest.raises(ValueError, match="must carry a LoRA or weights that learn, got none"):
        begin(generator, settings)
    attach_policies(generator.transformer, ALL)
    with pytest.raises(RuntimeError, match=r"must have an old policy; attach_policies\("):
        next(finetune(generator, [RED], PROMPTS, settings))
