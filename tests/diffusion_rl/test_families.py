"""The table of families: every row loads, names real layers, and is described."""

import importlib
from pathlib import Path

import diffusers
import pytest
import torch

from diffusion_rl.configuration import load_config
from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.generators.families import (
    FAMILIES,
    check_options,
    check_pipeline_class,
    default_targets,
)
from diffusion_rl.generators.wan import WanGenerator
from diffusion_rl.lora import LoraSettings, attach_lora
from diffusion_rl.sampling import sample_videos
from tests.family_checks import check_learns, sample
from tests.tiny_cogvideox import SIZE as COGVIDEOX_SIZE
from tests.tiny_cogvideox import build_tiny_cogvideox
from tests.tiny_hunyuan15 import SIZE as HUNYUAN_SIZE
from tests.tiny_hunyuan15 import build_tiny_hunyuan15
from tests.tiny_ltx import SIZE as LTX_SIZE
from tests.tiny_ltx import build_tiny_ltx
from tests.tiny_wan import SIZE as WAN_SIZE
from tests.tiny_wan import build_tiny_wan
from tests.tiny_wan22 import A14B_SIZE, TI2V_SIZE, build_tiny_a14b, build_tiny_ti2v
from tests.toy_gaussian import ToyGenerator

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TINY = {
    "wan": ("wan", build_tiny_wan, WAN_SIZE),
    "a14b": ("wan2.2", build_tiny_a14b, A14B_SIZE),
    "ti2v": ("wan2.2", build_tiny_ti2v, TI2V_SIZE),
    "cogvideox": ("cogvideox", build_tiny_cogvideox, COGVIDEOX_SIZE),
    "ltx": ("ltx", build_tiny_ltx, LTX_SIZE),
    "hunyuan1.5": ("hunyuan1.5", build_tiny_hunyuan15, HUNYUAN_SIZE),
}
RECIPES = sorted((REPOSITORY / "configs" / "rl").glob("*.yaml"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_names_a_generator_and_its_transformer(name: str) -> None:
    module, _, path = FAMILIES[name].loader.partition(":")
    kind, method = path.split(".")
    generator = getattr(importlib.import_module(module), kind)
    assert issubclass(generator, AbstractVideoGenerator)
    assert callable(getattr(generator, method))
    assert generator.pipeline_class.__name__ == FAMILIES[name].pipeline
    assert hasattr(diffusers, FAMILIES[name].transformer)
    assert default_targets(FAMILIES[name].transformer) == FAMILIES[name].lora_targets


@pytest.mark.parametrize("name", TINY)
def test_half_precision_makes_nearly_the_same_videos(name: str) -> None:
    """Transformer and text in bfloat16, latents and velocities in float32, as recipes run it."""
    family, build, size = TINY[name]
    module, _, path = FAMILIES[family].loader.partition(":")
    kind = getattr(importlib.import_module(module), path.split(".")[0])
    expected = sample(kind(build(), **size), 3.0)
    pipeline = build()
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module) and part != "vae":
            module.to(torch.bfloat16)
    generator = kind(pipeline, **size)
    videos = sample(generator, 3.0)
    assert generator.dtype == torch.bfloat16
    assert videos.dtype == torch.float32
    assert 0 < (videos - expected).abs().mean() < 0.1 * expected.std()
    check_learns(generator, "nft")


@pytest.mark.parametrize("name", TINY)
def test_groups_explore_at_steps_of_their_own_and_videos_are_drawn_with_noise(name: str) -> None:
    """Replays of videos at different noise levels are exact, by two transformers, too."""
    family, build, size = TINY[name]
    module, _, path = FAMILIES[family].loader.partition(":")
    kind = getattr(importlib.import_module(module), path.split(".")[0])
    generator = kind(build(), **size)
    drawn = [
        sample_videos(generator, ["a", "b"], [3, 4], num_inference_steps=3, noise_level=level)
        for level in (0.0, 0.7, 0.7)
    ]
    assert torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert bool(drawn[1].isfinite().all())
    check_learns(generator, "grpo", steps_of="group", prompts_per_update=3)


def test_every_family_is_tried() -> None:
    assert {family for family, _, _ in TINY.values()} == set(FAMILIES)


def test_another_familys_folder_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    message = "must be a WanPipeline, got a CogVideoXPipeline in .*; use generator.family=cogvideox"
    with pytest.raises(ValueError, match=message):
        WanGenerator.from_pretrained(tmp_path, **WAN_SIZE)
    check_pipeline_class(tmp_path, "CogVideoXPipeline")
    # diffusers would load it, and leave out what only that class has.
    (tmp_path / "model_index.json").write_text('{"_class_name": "LTXConditionPipeline"}')
    with pytest.raises(ValueError, match="got a LTXConditionPipeline in .*; no family loads that"):
        check_pipeline_class(tmp_path, "LTXPipeline")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_a_recipe_and_a_place_in_the_page(name: str) -> None:
    families = {load_config(path).generator.family for path in RECIPES}
    assert name in families
    page = (REPOSITORY / "docs" / "generators.md").read_text(encoding="utf-8")
    assert f"`{name}`" in page
    assert f"`{FAMILIES[name].transformer}`" in page
    assert all(f"`{option}`" in page for option in FAMILIES[name].options)


def test_the_file_to_copy_is_short() -> None:
    """docs/generators.md promises it of every family's file."""
    folder = REPOSITORY / "diffusion_rl" / "generators"
    for family in FAMILIES.values():
        module = family.loader.partition(":")[0].rpartition(".")[2]
        assert len((folder / f"{module}.py").read_text(encoding="utf-8").splitlines()) < 120


def test_without_targets_a_run_adapts_the_familys_own_layers() -> None:
    for path in RECIPES:
        settings = load_config(path)
        assert settings.lora.targets == FAMILIES[settings.generator.family].lora_targets


def test_options_of_another_family_are_refused() -> None:
    check_options("wan2.2", {"learns": "low"})
    with pytest.raises(ValueError, match=r"options.learn must be .*family wan2.2 takes \(learns, "):
        check_options("wan2.2", {"learn": "low"})
    with pytest.raises(ValueError, match="got another name; did you mean learns\\?"):
        check_options("wan2.2", {"learn": "low"})
    with pytest.raises(ValueError, match="options.learns must be .*wan takes \\(it takes none\\)"):
        check_options("wan", {"learns": "low"})


def test_a_transformer_of_no_family_needs_targets() -> None:
    with pytest.raises(ValueError, match="targets must be given .*, got none for ToyTransformer"):
        attach_lora(ToyGenerator().transformer, LoraSettings())
