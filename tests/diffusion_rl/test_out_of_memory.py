"""What the message says when memory runs out, and whether its estimates are near."""

import dataclasses
import importlib
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from diffusion_rl import launch, out_of_memory
from diffusion_rl.before_after import build_samplers
from diffusion_rl.finetune import FinetuneSettings, finetune
from diffusion_rl.full_policies import FullPolicies, FullSettings
from diffusion_rl.generators.families import FAMILIES
from diffusion_rl.generators.wan import WanGenerator
from diffusion_rl.guards import GuardSettings
from diffusion_rl.held_out import EvaluationSettings, HeldOut
from diffusion_rl.lora import LoraSettings, tuner_layers
from diffusion_rl.memory_errors import OutOfMemoryError, Saving, explain_out_of_memory
from diffusion_rl.optimizers import OptimizerSettings
from diffusion_rl.out_of_memory import drawing_bytes, drawing_savings, smaller_passes
from diffusion_rl.policies import attach_policies, policies_of, trained_parameters
from diffusion_rl.reward_contract import RewardSettings
from diffusion_rl.rewards import Reward
from diffusion_rl.rollout import RolloutSettings, rollout
from diffusion_rl.samples import SampleSettings, write_samples
from diffusion_rl.sharding import shard
from diffusion_rl.update_memory import attaching_savings, kept_for_backward, update_savings
from tests.diffusion_rl.test_families import TINY
from tests.diffusion_rl.test_weight_files import run_settings
from tests.several import run_on
from tests.tiny_cogvideox import SIZE as COGVIDEOX_SIZE
from tests.tiny_cogvideox import build_tiny_cogvideox
from tests.tiny_wan import SIZE, build_tiny_wan, save_tiny_wan

LARGER = {**SIZE, "height": 64, "width": 64, "num_frames": 9}
SETTINGS = FinetuneSettings(
    rollout=RolloutSettings(num_inference_steps=4, micro_batch=8, update_micro_batch=4)
)


def build(
    learner: LoraSettings | FullSettings, dtype: torch.dtype = torch.float32, layers: int = 4
) -> WanGenerator:
    generator = WanGenerator(build_tiny_wan(layers=layers, heads=4).to(dtype), **LARGER)
    attach_policies(generator.transformer, learner, average=True)
    return generator


@pytest.mark.parametrize("learner", [LoraSettings(rank=2), FullSettings()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_pass_keeps_is_estimated_within_a_factor_of_two(
    learner: LoraSettings | FullSettings, dtype: torch.dtype
) -> None:
    generator = build(learner, dtype)
    weights = {p.untyped_storage().data_ptr() for p in generator.transformer.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    embeddings = generator.encode_prompts(["a red circle", "the blue square"])
    latent = generator.initial_latents([0, 1])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = generator.predict(latent, torch.tensor(0.5), embeddings, 1.0)
    assert prediction.requires_grad
    counted = sum(storage.nbytes() for storage in kept.values())
    assert 0.5 < kept_for_backward(generator, 2) / counted < 2


def test_savings_follow_from_the_shapes() -> None:
    generator = build(LoraSettings(rank=2))
    found = dict(update_savings(generator, SETTINGS))
    kept = kept_for_backward(generator, 4)
    assert found["rollout.update_micro_batch=2"] == pytest.approx(kept / 2)
    assert found["generator.height=48 generator.width=48"] == pytest.approx(kept * 7 / 16)
    assert found["generator.num_frames=5"] == pytest.approx(kept / 3)  # Two latent frames of three.
    checkpointing = found["generator.execution.gradient_checkpointing=true"]
    assert 0.5 * kept < checkpointing < 0.75 * kept  # One of four blocks is whole.
    count = sum(parameter.numel() for parameter in trained_parameters(generator.transformer))
    assert found["optimizer.name=adamw_8bit"] == 6 * count
    guided = dataclasses.replace(SETTINGS.rollout, guidance_scale=4.0)
    twice = dict(update_savings(generator, FinetuneSettings(rollout=guided)))
    assert twice["rollout.update_micro_batch=2"] == pytest.approx(kept)
    generator.transformer.enable_gradient_checkpointing()
    assert not any("checkpointing" in one.setting for one in update_savings(generator, SETTINGS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_fine_tuning_may_be_left_for_a_lora(dtype: torch.dtype) -> None:
    generator = build(FullSettings(), dtype)
    count = sum(parameter.numel() for parameter in trained_parameters(generator.transformer))
    found = dict(update_savings(generator, SETTINGS))
    own = dtype.itemsize
    # Gradient and two moments, float32 masters where the weights are not, reference.
    assert found["lora instead of full"] == count * (4 + 8 + (4 if own == 2 else 0) + own)
    assert found["full.copies=cpu"] == count * (own + 4)  # The average is float32.
    other = build(FullSettings(copies="cpu"), dtype)
    found = dict(update_savings(other, SETTINGS))
    assert "full.copies=cpu" not in found
    assert found["lora instead of full"] == count * (4 + 8 + (4 if own == 2 else 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_process_saves_what_it_holds_of_split_weights(dtype: torch.dtype) -> None:
    whole = dict(update_savings(build(FullSettings(), dtype), SETTINGS))

    def of_a_part() -> dict[str, float]:
        generator = WanGenerator(build_tiny_wan(layers=4, heads=4).to(dtype), **LARGER)
        shard(generator.transformer)
        attach_policies(generator.transformer, FullSettings(), average=True)
        return dict(update_savings(generator, SETTINGS))

    first, second = run_on(2, of_a_part)
    for name in ("lora instead of full", "full.copies=cpu"):
        assert first[name] + second[name] == pytest.approx(whole[name])
        assert 0.4 < first[name] / whole[name] < 0.6
    # Its state in 8 bits would not come together again.
    assert "optimizer.name=adamw_8bit" not in first
    assert "optimizer.name=adamw_8bit" in whole


def test_a_team_shares_out_what_a_pass_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = build(LoraSettings(rank=2))
    alone = kept_for_backward(generator, 4)
    monkeypatch.setattr(out_of_memory, "team_size", lambda: 2)
    assert kept_for_backward(generator, 4) == pytest.approx(alone / 2)


def test_a_decoder_may_work_tile_by_tile() -> None:
    generator = build(LoraSettings(rank=2))
    vae = generator.pipeline.vae
    vae.tile_sample_min_height, vae.tile_sample_min_width = 32, 64
    needed, tiled = (drawing_bytes(generator, 8, tiled=one) for one in (False, True))
    assert tiled == pytest.approx(needed / 2)
    found = dict(drawing_savings(generator, 8, 64))
    assert found["generator.execution.vae_tiling=true"] == pytest.approx(needed - tiled)
    vae.enable_tiling()
    vae.tile_sample_min_height, vae.tile_sample_min_width = 32, 64
    assert drawing_bytes(generator, 8) == tiled
    found = dict(drawing_savings(generator, 8, 64))
    assert "generator.execution.vae_tiling=true" not in found


@pytest.mark.parametrize("learning", [True, False])
def test_a_pass_holds_no_more_videos_than_an_update_has(learning: bool) -> None:
    few = dataclasses.replace(
        SETTINGS.rollout, prompts_per_update=1, videos_per_prompt=2, micro_batch=16
    )
    few = dataclasses.replace(few, update_micro_batch=16)
    settings = dataclasses.replace(SETTINGS, rollout=few)
    generator = build(LoraSettings(rank=2))
    drawing = drawing_savings(generator, 16, 2)
    found = dict(update_savings(generator, settings) if learning else drawing)
    name = "rollout.update_micro_batch=1" if learning else "rollout.micro_batch=1"
    assert found[name] > 0


@pytest.mark.parametrize("guards", [(), (GuardSettings(statistic="motion"),)])
def test_the_first_drawing_of_a_run_is_explained(
    guards: tuple[GuardSettings, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = build(LoraSettings(rank=2), layers=1)

    def exhausted(*inputs: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generator, "predict", exhausted)
    drawn = dataclasses.replace(SETTINGS.rollout, prompts_per_update=1, videos_per_prompt=2)
    settings = dataclasses.replace(SETTINGS, rollout=drawn, guards=guards, updates=1)
    red = Reward("red", lambda videos, prompts, *, fps: videos[:, :, 0].mean((1, 2, 3)))
    with pytest.raises(OutOfMemoryError, match="in drawing videos .*rollout.micro_batch=1 saves"):
        next(finetune(generator, [red], ["a red circle"], settings))


PAIRED = ("cogvideox", partial(build_tiny_cogvideox, version="1.5"), COGVIDEOX_SIZE)


@pytest.mark.parametrize("name", [*TINY, "paired frames"])
def test_the_sizes_it_names_are_those_that_the_family_takes(name: str) -> None:
    family, build_pipeline, size = TINY.get(name, PAIRED)
    module, _, path = FAMILIES[family].loader.partition(":")
    kind = getattr(importlib.import_module(module), path.split(".")[0])
    pipeline = build_pipeline()
    first = kind(pipeline, **size)
    lengths = [1 + first.frame_factor * count for count in (0, 1, 2, 3, 5, 6, 10, 20)]
    sides = [first.pixel_factor * count for count in (1, 2, 3, 5, 30)]
    named = []
    for frames, side in [(one, sides[2]) for one in lengths] + [(lengths[2], one) for one in sides]:
        own = {**size, "num_frames": frames, "height": side, "width": sides[-1]}
        for setting, saved in smaller_passes(kind(pipeline, **own), "rollout.micro_batch", 1, 1.0):
            found = dict(re.findall(r"generator\.(\w+)=(\d+)", setting))
            smaller = {key: int(value) for key, value in found.items()}
            assert all(value <= own[key] for key, value in smaller.items())
            assert smaller.items() - own.items()
            assert 0 < saved < 1
            kind(pipeline, **{**own, **smaller})  # It refuses what it does not take.
            named.append(tuple(smaller))
    assert set(named) == {("height", "width"), ("num_frames",)}
    smallest = {**size, "num_frames": 1, "height": sides[0], "width": sides[0]}
    assert smaller_passes(kind(pipeline, **smallest), "rollout.micro_batch", 1, 1.0) == []


def test_drawing_has_advice_of_its_own() -> None:
    generator = build(LoraSettings(rank=2))
    found = dict(drawing_savings(generator, 8, 64))
    needed = drawing_bytes(generator, 8)
    pixels = 4 * 8 * 9 * 64 * 64
    assert needed >= pixels * 3
    assert found["rollout.micro_batch=4"] == pytest.approx(needed / 2)
    assert not any("optimizer" in name for name in found)


@pytest.mark.parametrize(
    ("error", "phase"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "the update"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
            "drawing videos",
        ),
        (MemoryError(), "the update"),
    ],
)
def test_the_message_names_the_three_settings_that_help_most(error: Exception, phase: str) -> None:
    generator = build(LoraSettings(rank=2))
    found = drawing_savings(generator, 8, 64)
    if phase == "the update":
        found = update_savings(generator, SETTINGS)
    with (
        pytest.raises(OutOfMemoryError, match=f"memory ran out in {phase}") as raised,
        explain_out_of_memory(phase, lambda: found),
    ):
        raise error
    assert raised.value.__cause__ is error
    named = re.findall(r"(?:; )(\S.*?) saves about ([\d.e+-]+) GB", str(raised.value))
    expected = sorted(found, key=lambda one: -one.bytes)
    assert [name for name, _ in named] == [one.setting for one in expected[:3]]
    for (_, gigabytes), one in zip(named, expected, strict=False):
        assert gigabytes == f"{one.bytes / 1e9:.2g}"


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not fit"), OutOfMemoryError("memory ran out in it already")]
)
def test_other_errors_pass_as_they_are(error: RuntimeError) -> None:
    with (
        pytest.raises(RuntimeError) as raised,
        explain_out_of_memory("the update", lambda: [Saving("less", 1.0)]),
    ):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("drawn_for", ["held-out rewards", "samples", "a comparison"])
def test_drawing_for_others_than_training_is_explained(
    drawn_for: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    generator = build(LoraSettings(rank=2), layers=1)
    options, texts = RolloutSettings(num_inference_steps=2), ["a red circle", "a blue square"]
    embeddings = generator.encode_prompts(texts)
    own = rollout(generator, embeddings, torch.tensor([0]), [0], options)
    sample = build_samplers(generator, texts, options)["tuned"]
    settings = EvaluationSettings(rewards=(RewardSettings(name="red", target="m:red"),), prompts="")
    held_out = HeldOut(settings, [], texts, embeddings)
    shown = SampleSettings(prompts=tuple(texts))

    def exhausted(latent: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generator, "decode", exhausted)
    draw = {
        "held-out rewards": partial(
            held_out.measure, generator, options, missing_limit=0.5, own=own, texts=texts[:1]
        ),
        "samples": partial(
            write_samples, generator, [], shown, embeddings, options, tmp_path / "samples"
        ),
        "a comparison": partial(sample, texts, [0, 1]),
    }
    with pytest.raises(OutOfMemoryError, match="in drawing videos .*rollout.micro_batch=1 saves"):
        draw[drawn_for]()


@pytest.mark.parametrize("checked", [True, False])
def test_the_self_check_replays_with_gradient(
    checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = build(LoraSettings(rank=2), layers=1)
    predict = generator.predict

    def exhausted(*inputs: object) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(*inputs)

    monkeypatch.setattr(generator, "predict", exhausted)
    if not checked:
        monkeypatch.setattr("diffusion_rl.finetune.self_check", lambda *_: NoCheck())
    drawn = dataclasses.replace(
        SETTINGS.rollout, stochastic_steps=1, prompts_per_update=1, videos_per_prompt=2
    )
    settings = dataclasses.replace(SETTINGS, rollout=drawn, updates=1)
    red = Reward("red", lambda videos, prompts, *, fps: videos[:, :, 0].mean((1, 2, 3)))
    where = "in the self-check" if checked else "in the update"
    with pytest.raises(OutOfMemoryError, match=f"{where} .*rollout.update_micro_batch=1 saves"):
        next(finetune(generator, [red], ["a red circle"], settings))


@pytest.mark.parametrize("learning", [True, False])
def test_the_loop_explains_it(learning: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = build(LoraSettings(rank=2), layers=1)
    assert tuner_layers(generator.transformer)
    predict = generator.predict

    def exhausted(*inputs: object) -> torch.Tensor:
        if torch.is_grad_enabled() == learning:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(*inputs)

    monkeypatch.setattr("diffusion_rl.finetune.self_check", lambda *_: NoCheck())
    monkeypatch.setattr(generator, "predict", exhausted)
    settings = FinetuneSettings(
        rollout=RolloutSettings(
            num_inference_steps=2, stochastic_steps=1, prompts_per_update=1, videos_per_prompt=2
        ),
        optimizer=OptimizerSettings(),
        updates=1,
    )
    red = Reward("red", lambda videos, prompts, *, fps: videos[:, :, 0].mean((1, 2, 3)))
    where = "in the update" if learning else "in drawing videos"
    with pytest.raises(OutOfMemoryError, match=where):
        next(finetune(generator, [red], ["a red circle"], settings))


class NoCheck:
    """As of a row that records no steps."""

    videos = 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["device", "cpu"])
@pytest.mark.parametrize(("old_policy", "average"), [(False, True), (True, True), (True, False)])
def test_what_attaching_takes_is_what_it_says(
    dtype: torch.dtype, place: str, old_policy: bool, average: bool
) -> None:
    """Against the bytes of what is attached: masters, reference and copies."""
    transformer = build_tiny_wan(layers=2).to(dtype).transformer
    learner = FullSettings(copies=place)
    copies = {"old_policy": old_policy, "average": average}
    found = dict(attaching_savings(transformer, learner, **copies))
    assert attaching_savings(transformer, LoraSettings(), **copies) == []
    attach_policies(transformer, learner, **copies)
    policies = policies_of(transformer)
    assert isinstance(policies, FullPolicies)
    whole = sum(one.numel() * 4 for one in policies.trained.values())
    kept = sum(
        one.numel() * one.element_size()
        for kind in policies.copies.values()
        for one in kind.values()
    )
    masters = whole if dtype == torch.bfloat16 else 0
    if place == "cpu":
        assert found == ({"lora instead of full": masters} if masters else {})
        return
    expected = {"lora instead of full": masters + kept, "full.copies=cpu": kept}
    assert found == expected | ({"optimizer.average_decay=0": whole} if average else {})


def test_a_run_that_cannot_hold_what_learns_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(launch, "attach_policies", run_out)
    settings = run_settings(save_tiny_wan(tmp_path / "pipeline"), tmp_path, full={}, lora=None)
    message = r"memory ran out in attaching what learns .*; lora instead of full saves about "
    with pytest.raises(OutOfMemoryError, match=message):
        launch.prepare(settings)
