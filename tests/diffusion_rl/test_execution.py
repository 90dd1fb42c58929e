"""What saves memory and time changes no result, and what cannot be had is refused."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers.hooks.group_offloading as group_offloading
import pytest
import torch
from diffusers.models import attention_dispatch
from torch import Tensor, nn

from diffusion_rl.full_policies import FullSettings
from diffusion_rl.generators import execution
from diffusion_rl.generators.families import FAMILIES
from diffusion_rl.generators.pipeline import AbstractPipelineGenerator
from diffusion_rl.generators.settings import (
    ATTENTION_BACKENDS,
    ContextParallelSettings,
    ExecutionSettings,
    OffloadSettings,
)
from diffusion_rl.generators.wan import WanGenerator
from diffusion_rl.launch import build_generator
from diffusion_rl.lora import (
    LoraSettings,
    attach_lora,
    old_policy,
    trained_parameters,
    tuner_layers,
)
from tests.diffusion_rl.test_families import TINY
from tests.family_checks import PROMPTS, run_settings, sample
from tests.tiny_cogvideox import build_tiny_cogvideox
from tests.tiny_wan import SIZE, build_tiny_wan, save_tiny_wan

CPU = torch.device("cpu")
SIGMAS = (0.95, 0.2)


def build(name: str, settings: ExecutionSettings | None = None) -> AbstractPipelineGenerator:
    """The tiny generator of a family, run as the settings say."""
    family, build_tiny, size = TINY[name]
    module, _, path = FAMILIES[family].loader.partition(":")
    kind = getattr(importlib.import_module(module), path.split(".")[0])
    pipeline = build_tiny()
    if settings is not None:
        execution.place(pipeline, settings, CPU, kind.text_encoders)
    generator = kind(pipeline, **size)
    if settings is not None:
        generator.execution = settings
    return generator


def gradients(generator: AbstractPipelineGenerator) -> list[Tensor]:
    """Of every LoRA weight, the adapter being one that does something."""
    with torch.no_grad():
        embeddings = generator.encode_prompts(PROMPTS)
    parameters = attach_lora(generator.transformer, LoraSettings(rank=2))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.1)
    latent = generator.initial_latents([0, 1])
    for sigma in SIGMAS:
        velocity = generator.predict(latent, torch.tensor(sigma), embeddings, 3.0)
        velocity.square().mean().backward()
    found = [parameter.grad for parameter in trained_parameters(generator.transformer)]
    assert any(one is not None and one.abs().sum() > 0 for one in found)
    return [torch.zeros(()) if one is None else one for one in found]


@functools.cache
def expected_gradients(name: str) -> list[Tensor]:
    return gradients(build(name))


@functools.cache
def expected_videos(name: str) -> Tensor:
    return sample(build(name), 3.0)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", TINY)
def test_checkpointing_gives_the_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    again: list[str] = []
    whole = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *a, **o: again.append("x") or whole(*a, **o)
    )
    generator = build(name, ExecutionSettings(gradient_checkpointing=True))
    sample(generator, 3.0)
    assert not again, "sampling keeps nothing, so it computes nothing again"
    assert_same(gradients(generator), expected_gradients(name))
    assert len(again) >= len(SIGMAS) * 2


class Weights:
    """Stands in for a card: weights that wait off it are NaN, so that using them shows."""

    def __init__(self) -> None:
        self.away: dict[int, tuple[Tensor, Tensor]] = {}
        self.whole = self.here = self.most_here = 0

    def offload(self, group: Any) -> None:
        for tensor in tensors_of(group):
            if id(tensor) not in self.away:
                self.away[id(tensor)] = (tensor, tensor.data)
                nothing = float("nan") if tensor.is_floating_point() else -1
                tensor.data = torch.full_like(tensor.data, nothing)
                self.here -= tensor.numel()

    def onload(self, group: Any) -> None:
        for tensor in tensors_of(group):
            if id(tensor) in self.away:
                tensor.data = self.away.pop(id(tensor))[1]
                self.here += tensor.numel()
        self.most_here = max(self.most_here, self.here)

    def start(self) -> None:
        """Count from here, where everything waits."""
        self.whole = sum(tensor.numel() for tensor, _ in self.away.values())
        self.here = self.most_here = 0


def tensors_of(group: Any) -> list[Tensor]:
    """Everything that a group moves."""
    inside = [one for part in group.modules for one in [*part.parameters(), *part.buffers()]]
    return [*inside, *group.parameters, *group.buffers]


def is_layer(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d | nn.Embedding)


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> Weights:
    card, group = Weights(), group_offloading.ModuleGroup
    monkeypatch.setattr(group, "_onload_from_memory", lambda self: card.onload(self))
    monkeypatch.setattr(group, "_offload_to_memory", lambda self: card.offload(self))
    return card


@pytest.mark.parametrize(
    ("name", "level"), [*((name, "block") for name in TINY), ("wan", "leaf"), ("ltx", "leaf")]
)
def test_offloaded_weights_are_there_when_used(name: str, level: str, weights: Weights) -> None:
    settings = ExecutionSettings(gradient_checkpointing=True, offload=OffloadSettings(level=level))
    generator = build(name, settings)
    weights.start()
    for part in ("transformer", "vae", *generator.text_encoders):
        layers = [one for one in getattr(generator.pipeline, part).modules() if is_layer(one)]
        assert not any(bool(layer.weight.isfinite().any()) for layer in layers), part
    assert torch.equal(sample(generator, 3.0), expected_videos(name))
    assert weights.here == 0
    assert weights.most_here < weights.whole
    assert_same(gradients(generator), expected_gradients(name))
    assert weights.here == 0, "computing again must send the weights away too"
    layers = [name for name, _ in generator.transformer.named_parameters() if "lora_" in name]
    assert layers
    waiting = {id(tensor) for tensor, _ in weights.away.values()}
    assert not waiting & {id(one) for one in trained_parameters(generator.transformer)}


def test_blocks_take_turns(weights: Weights) -> None:
    generator = WanGenerator(build_tiny_wan(layers=6), **SIZE)
    counted = {}
    for number in (1, 3):
        transformer = build_tiny_wan(layers=6).transformer
        execution.offload(transformer, CPU, "block", number)
        weights.start()
        generator.transformer = generator.pipeline.transformer = transformer
        sample(generator, 1.0)
        counted[number] = weights.most_here
    blocks = [one for one in generator.transformer.blocks[0].modules() if is_layer(one)]
    block = sum(one.weight.numel() for one in blocks)
    assert counted[3] - counted[1] == 2 * block


def test_decoding_in_tiles_and_slices() -> None:
    settings = ExecutionSettings(vae_tiling=True, vae_slicing=True)
    for name in TINY:
        vae = build(name, settings).pipeline.vae
        assert vae.use_tiling, name
        assert vae.use_slicing, name
    generator = build("wan", settings)
    torch.testing.assert_close(sample(generator, 3.0), expected_videos("wan"))
    latent = torch.randn(1, *generator.latent_shape[:2], 4, 4)
    whole = generator.decode(latent)
    generator.pipeline.vae.enable_tiling(16, 16, 8, 8)
    tiled = generator.decode(latent)
    assert tiled.shape == whole.shape
    assert 0 < (tiled - whole).abs().mean() < whole.std()


@pytest.fixture
def restored_attention() -> Iterator[None]:
    """Diffusers also keeps the last backend for the whole process."""
    registry = attention_dispatch._AttentionBackendRegistry
    before = registry._active_backend
    yield
    registry.set_active_backend(before)


@pytest.mark.usefixtures("restored_attention")
def test_attention_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    assert set(ATTENTION_BACKENDS) <= {one.value for one in registry.list_backends()}
    generator = build("wan", ExecutionSettings(attention="native"))
    assert torch.equal(sample(generator, 3.0), expected_videos("wan"))
    assert_same(gradients(generator), expected_gradients("wan"))
    asked = []
    own = registry._backends[attention_dispatch.AttentionBackendName._NATIVE_MATH]
    monkeypatch.setitem(
        registry._backends,
        attention_dispatch.AttentionBackendName._NATIVE_MATH,
        lambda *given, **more: asked.append("math") or own(*given, **more),
    )
    videos = sample(build("wan", ExecutionSettings(attention="_native_math")), 3.0)
    torch.testing.assert_close(videos, expected_videos("wan"))
    assert asked


@pytest.mark.usefixtures("restored_attention")
@pytest.mark.parametrize("backend", ["flash", "xformers", "_flash_3"])
def test_attention_that_is_not_there_is_refused(backend: str) -> None:
    if importlib.util.find_spec(backend if backend == "xformers" else "flash_attn"):
        pytest.skip(f"{backend} is installed")
    transformer = build_tiny_wan().transformer
    with pytest.raises(ValueError, match=f"backend that is installed, got {backend}: .*not usa"):
        execution.set_attention(transformer, backend)
    processor = transformer.blocks[0].attn1.processor
    assert processor._attention_backend is None, "nothing is switched"


@pytest.mark.parametrize(
    ("switch", "what"), [(execution.set_attention, "native"), (execution.compile_blocks, "eager")]
)
def test_a_transformer_without_the_feature_is_refused(switch: Any, what: str) -> None:
    with pytest.raises(ValueError, match=f"left out for CogVideoXTransformer3DModel, got {what}; "):
        switch(build_tiny_cogvideox().transformer, what)


def test_blocks_are_compiled() -> None:
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["frames"]["ok"]
    generator = build("wan", ExecutionSettings(compile_blocks="eager"))
    assert torch.equal(sample(generator, 3.0), expected_videos("wan"))
    assert torch._dynamo.utils.counters["frames"]["ok"] > before
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="compile_blocks must be one of .*inductor.*, got nvfuser"):
        execution.compile_blocks(generator.transformer, "nvfuser")


def test_tokens_are_shared_only_where_it_can_be() -> None:
    settings = ContextParallelSettings(ring=2, ulysses=2)
    for name in ("cogvideox", "hunyuan1.5", "ltx"):
        with pytest.raises(ValueError, match="left out for .*Transformer3DModel, got ring=2, "):
            execution.share_tokens(build(name).transformer, settings)
    transformer = build_tiny_wan().transformer
    with pytest.raises(ValueError, match="must divide the processes that run, got ring=2 x ulyss"):
        execution.share_tokens(transformer, settings)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (OffloadSettings, {"parts": ()}, "parts must be named once each, at least one, got"),
        (OffloadSettings, {"parts": ("vae", "vae")}, "parts must be named once each"),
        (OffloadSettings, {"parts": ("unet",)}, "parts must be of transformer, .*, got unet"),
        (OffloadSettings, {"level": "row"}, "level must be one of block, leaf, got row"),
        (OffloadSettings, {"blocks_per_group": 0}, "blocks_per_group must be at least 1, got 0"),
        (
            OffloadSettings,
            {"level": "leaf", "blocks_per_group": 2},
            "blocks_per_group must be left out with level leaf, got 2",
        ),
        (ContextParallelSettings, {"ring": 0}, "ring must be at least 1, got 0"),
        (ContextParallelSettings, {}, "ring or ulysses must be above 1, got 1 and 1"),
        (
            ExecutionSettings,
            {"attention": "fast"},
            "attention must be one of native, .*, got fast",
        ),
        (ExecutionSettings, {"attention": "sage"}, "got sage; sage has no backward pass"),
        (ExecutionSettings, {"attention": "flash_hub"}, "got flash_hub; it would run code from"),
        (ExecutionSettings, {"offload": OffloadSettings()}, "gradient_checkpointing must be true"),
        (
            ExecutionSettings,
            {
                "offload": OffloadSettings(),
                "gradient_checkpointing": True,
                "compile_blocks": "inductor",
            },
            "compile_blocks must be left out where offload.parts has the transformer, got induct",
        ),
    ],
)
def test_settings_refuse(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_a_run_takes_its_settings_from_the_yaml(tmp_path: Path) -> None:
    folder = save_tiny_wan(tmp_path / "pipeline")
    execution_tree = {"gradient_checkpointing": True, "vae_tiling": True, "attention": "native"}
    tree = {"path": str(folder), **SIZE, "execution": execution_tree}
    settings = run_settings("wan", folder, tmp_path / "run", tree)
    generator = build_generator(settings.generator)
    assert generator.pipeline.transformer.is_gradient_checkpointing
    assert generator.pipeline.vae.use_tiling
    tree["execution"] = {"gradient_checkpointing": True, "offload": {}}
    with pytest.raises(ValueError, match="execution.offload must be left out with device=cpu"):
        run_settings("wan", folder, tmp_path / "run", tree)
    settings = run_settings("wan", folder, tmp_path / "run", {**tree, "device": "cuda"})
    assert settings.generator.execution.offload == OffloadSettings()
    with pytest.raises(ValueError, match="must leave out the transformer where full is given, got"):
        dataclasses.replace(settings, lora=None, full=FullSettings())


def test_the_old_policy_runs_as_an_adapter_where_weights_wait() -> None:
    transformer = build_tiny_wan().transformer
    attach_lora(transformer, LoraSettings(rank=2), old_policy=True)
    (layer, *_) = tuner_layers(transformer)
    with old_policy(transformer):
        assert layer.disable_adapters, "its update is added to weights that are there"
    layer.base_layer.to("meta")
    with old_policy(transformer):
        assert not layer.disable_adapters
        assert layer.active_adapters == ["old"]
    assert layer.active_adapters == ["default"]
