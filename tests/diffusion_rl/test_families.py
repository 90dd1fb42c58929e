"""The table of families: every row loads, names real layers, and is described."""

import importlib
from pathlib import Path

import pytest

from diffusion_rl.configuration import load_config
from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.generators.families import FAMILIES, check_options, default_targets
from diffusion_rl.lora import LoraSettings, attach_lora
from tests.toy_gaussian import ToyGenerator

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RECIPES = sorted((REPOSITORY / "configs" / "rl").glob("*.yaml"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_names_a_generator_and_its_transformer(name: str) -> None:
    module, _, path = FAMILIES[name].loader.partition(":")
    kind, method = path.split(".")
    generator = getattr(importlib.import_module(module), kind)
    assert issubclass(generator, AbstractVideoGenerator)
    assert callable(getattr(generator, method))
    import diffusers

    assert hasattr(diffusers, FAMILIES[name].transformer)
    assert default_targets(FAMILIES[name].transformer) == FAMILIES[name].lora_targets


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
