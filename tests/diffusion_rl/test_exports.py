"""One LoRA in every layout: the same numbers, and the loader of each ecosystem takes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from diffusers.loaders.single_file_utils import (
    convert_hunyuan_video_transformer_to_diffusers,
    convert_ltx_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
)
from peft import PeftModel
from peft.utils import load_peft_weights
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion_rl.__main__ import main
from diffusion_rl.exports.comfyui import comfyui_state
from diffusion_rl.exports.formats import FORMATS, export_lora, find_base
from diffusion_rl.exports.parts import LoraPart, read_lora
from diffusion_rl.generators.base import LORA_FILE, SECOND_LORA_FILE
from diffusion_rl.generators.families import FAMILIES
from diffusion_rl.generators.wan import WanGenerator
from diffusion_rl.loading import load_callable
from diffusion_rl.lora import LoraSettings, attach_lora, lora_state, trained_parameters
from diffusion_rl.lora_files import pack_lora, save_lora
from diffusion_rl.weight_files import COMPONENTS
from tests import tiny_cogvideox, tiny_hunyuan15, tiny_ltx, tiny_wan
from tests.tiny_cogvideox import build_tiny_cogvideox
from tests.tiny_hunyuan15 import build_tiny_hunyuan15
from tests.tiny_ltx import build_tiny_ltx
from tests.tiny_wan import build_tiny_wan
from tests.tiny_wan22 import A14B_SIZE, TI2V_SIZE, build_tiny_a14b, build_tiny_ti2v

RANK, ALPHA = 2, 3.0
PIPELINES: dict[str, tuple[str, Callable[[], Any]]] = {
    "wan": ("wan", build_tiny_wan),
    "a14b": ("wan2.2", build_tiny_a14b),
    "ti2v": ("wan2.2", build_tiny_ti2v),
    "cogvideox": ("cogvideox", build_tiny_cogvideox),
    "ltx": ("ltx", build_tiny_ltx),
    "hunyuan1.5": ("hunyuan1.5", build_tiny_hunyuan15),
}

SIZES = {
    "wan": tiny_wan.SIZE,
    "a14b": A14B_SIZE,
    "ti2v": TI2V_SIZE,
    "cogvideox": tiny_cogvideox.SIZE,
    "ltx": tiny_ltx.SIZE,
    "hunyuan1.5": tiny_hunyuan15.SIZE,
}


class Made:
    """A pipeline with a random LoRA: its folder, the LoRA's, and what the LoRA adds."""

    def __init__(self, name: str, folder: Path) -> None:
        self.family, build = PIPELINES[name]
        self.base, self.lora = folder / "base", folder / "run" / "lora"
        self.pipeline = build()
        self.pipeline.save_pretrained(self.base)
        self.lora.mkdir(parents=True)
        settings = LoraSettings(rank=RANK, alpha=ALPHA, targets=FAMILIES[self.family].lora_targets)
        self.states: dict[str, dict[str, Tensor]] = {}
        for number, (file, component) in enumerate(COMPONENTS.items()):
            transformer = getattr(self.pipeline, component, None)
            if transformer is None:
                continue
            attach_lora(transformer, settings, seed=number)
            for parameter in trained_parameters(transformer):
                parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
            self.states[component] = lora_state(transformer)
            content = pack_lora(self.states[component], settings)
            (self.lora / file).write_bytes(content)

    def updates(self, component: str) -> dict[str, Tensor]:
        """alpha / rank * B @ A in float64 by the layer's name."""
        state = self.states[component]
        modules = {name.split(".lora_")[0] for name in state}
        return {
            module: ALPHA
            / RANK
            * state[f"{module}.lora_B.weight"].double()
            @ state[f"{module}.lora_A.weight"].double()
            for module in modules
        }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Pipelines by name, each made once."""
    known: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in known:
            known[name] = Made(name, tmp_path_factory.mktemp("export"))
        return known[name]

    return get


def named_updates(transformer: nn.Module, adapter: str) -> dict[str, Tensor]:
    """What a loaded adapter adds, layer by layer, as PEFT itself computes it."""
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter).detach()
        for name, layer in transformer.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def assert_same_updates(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert len(found) > 5
    for name, update in expected.items():
        torch.testing.assert_close(found[name].double(), update, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PIPELINES)
def test_diffusers_loads_what_is_exported_for_it(
    name: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    one = made(name)
    files = export_lora(one.lora, tmp_path, "diffusers")
    assert [path.name for path in files] == list(COMPONENTS)[: len(one.states)]
    pipeline = type(one.pipeline).from_pretrained(one.base)
    for path in files:
        if name == "hunyuan1.5":  # Its pipeline of diffusers 0.42.1 has no load_lora_weights.
            pipeline.transformer.load_lora_adapter(tmp_path, weight_name=LORA_FILE)
            continue
        second = {"load_into_transformer_2": True} if path.name == SECOND_LORA_FILE else {}
        pipeline.load_lora_weights(tmp_path, weight_name=path.name, **second)
    for component, state in one.states.items():
        transformer = getattr(pipeline, component)
        (adapter,) = transformer.peft_config
        loaded = {
            key.replace(f".{adapter}.", "."): value
            for key, value in transformer.state_dict().items()
            if "lora_" in key
        }
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
        assert_same_updates(named_updates(transformer, adapter), one.updates(component))


@pytest.mark.parametrize("name", PIPELINES)
def test_peft_loads_what_is_exported_for_it(
    name: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    one = made(name)
    folders = export_lora(one.lora, tmp_path, "peft")
    two = len(one.states) == 2
    assert folders == ([tmp_path / part for part in one.states] if two else [tmp_path])
    fresh = type(one.pipeline).from_pretrained(one.base)
    for folder, (component, state) in zip(folders, one.states.items(), strict=True):
        weights = load_peft_weights(str(folder), device="cpu")
        assert all(
            torch.equal(weights[f"base_model.model.{key}"], value) for key, value in state.items()
        )
        assert len(weights) == len(state)
        model = PeftModel.from_pretrained(getattr(fresh, component), str(folder))
        assert_same_updates(named_updates(model, "default"), one.updates(component))
        assert str(one.base) not in (folder / "adapter_config.json").read_text()


def read_as_comfyui(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Updates by the model's own names, by the rules of ComfyUI's loader.

    `<key>.lora_up.weight` and `<key>.lora_down.weight`, scaled by `<key>.alpha` over the rows of
    the second; the key is the weight's name without `.weight`. What is left over is an error.
    """
    left, updates = dict(state), {}
    for name in state:
        if not name.endswith(".lora_up.weight"):
            continue
        key = name.removesuffix(".lora_up.weight")
        up, down = (left.pop(f"{key}.lora_{way}.weight") for way in ("up", "down"))
        scale = left.pop(f"{key}.alpha").item() / down.shape[0]
        assert key.startswith("diffusion_model.")
        updates[f"{key.removeprefix('diffusion_model.')}.weight"] = scale * (up @ down)
    assert not left
    return updates


def convert_hunyuan(updates: dict[str, Tensor]) -> dict[str, Tensor]:
    """From ComfyUI's names to the published checkpoint's, as its LoRA key map pairs them; on."""
    published = {}
    for name, update in updates.items():
        for here, there in (("_attn.", "_attn_"), ("mlp.0.", "mlp.fc1."), ("mlp.2.", "mlp.fc2.")):
            name = name.replace(here, there)
        published[name] = update
    return convert_hunyuan_video_transformer_to_diffusers(published)


def convert_cogvideox(updates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Back by the places of ComfyUI's layers in its block, one after the other."""
    layers = {"q": "attn1.to_q", "k": "attn1.to_k", "v": "attn1.to_v", "attn_out": "attn1.to_out.0"}
    layers |= {"ff_proj": "ff.net.0.proj", "ff_out": "ff.net.2"}
    found = {}
    for name, update in updates.items():
        blocks, index, layer, weight = name.split(".")
        assert (blocks, weight) == ("blocks", "weight")
        found[f"transformer_blocks.{index}.{layers[layer]}.weight"] = update
    return found


CONVERTERS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "wan": convert_wan_transformer_to_diffusers,
    "wan2.2": convert_wan_transformer_to_diffusers,
    "ltx": convert_ltx_transformer_checkpoint_to_diffusers,
    "hunyuan1.5": convert_hunyuan,
    "cogvideox": convert_cogvideox,
}
"""Diffusers' own way from the names that ComfyUI uses, by which whole checkpoints are loaded; none
of CogVideoX, whose names in ComfyUI are of no published checkpoint."""


@pytest.mark.parametrize("name", PIPELINES)
def test_comfyui_adds_what_diffusers_adds(
    name: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    one = made(name)
    files = export_lora(one.lora, tmp_path, "comfyui", base=one.base)
    two = len(one.states) == 2
    expected = ["high_noise", "low_noise"] if two else ["comfyui"]
    assert [path.stem.removeprefix("lora_comfyui_").removeprefix("lora_") for path in files] == (
        expected
    )
    for path, component in zip(files, one.states, strict=True):
        updates = read_as_comfyui(load_file(path))
        converted = CONVERTERS[one.family](dict(updates))
        found = {key.removesuffix(".weight"): value for key, value in converted.items()}
        assert_same_updates(found, one.updates(component))


@pytest.mark.parametrize("name", ["wan", "ti2v"])
def test_wan_pipelines_read_comfyuis_file_too(
    name: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    one = made(name)
    (path,) = export_lora(one.lora, tmp_path, "comfyui", base=one.base)
    pipeline = type(one.pipeline).from_pretrained(one.base)
    pipeline.load_lora_weights(path)
    (adapter,) = pipeline.transformer.peft_config
    assert_same_updates(named_updates(pipeline.transformer, adapter), one.updates("transformer"))


def test_every_number_of_a_fused_layer_is_one_of_its_parts(made: Callable[[str], Made]) -> None:
    part = read_lora(made("hunyuan1.5").lora)[0]
    state = comfyui_state(part, "hunyuan1.5")
    name = "diffusion_model.double_blocks.1.txt_attn.qkv"
    up, down = (state[f"{name}.lora_{way}.weight"] for way in ("up", "down"))
    width = up.shape[0] // 3
    for index, piece in enumerate("qkv"):
        module = f"transformer_blocks.1.attn.add_{piece}_proj"
        rows, columns = slice(index * width, (index + 1) * width), slice(2 * index, 2 * index + 2)
        assert torch.equal(down[columns], part.state[f"{module}.lora_A.weight"])
        assert torch.equal(up[rows, columns], part.state[f"{module}.lora_B.weight"])
    assert torch.count_nonzero(up) == 3 * width * RANK


def test_a_fused_layer_may_have_one_part_only(made: Callable[[str], Made]) -> None:
    whole = read_lora(made("hunyuan1.5").lora)[0]
    some = {key: value for key, value in whole.state.items() if ".attn.to_v." in key}
    part = LoraPart("transformer", some, whole.settings)
    updates = read_as_comfyui(comfyui_state(part, "hunyuan1.5"))
    converted = convert_hunyuan(updates)
    expected = made("hunyuan1.5").updates("transformer")
    for name, found in converted.items():
        module = name.removesuffix(".weight")
        if module.endswith("to_v"):
            torch.testing.assert_close(found.double(), expected[module], rtol=1e-5, atol=1e-6)
        else:
            assert not found.any()


def predictions(family: str, pipeline: Any, size: dict[str, Any]) -> Tensor:
    """Velocities of one video at a high and a low noise level."""
    generator = load_callable(FAMILIES[family].loader).__self__(pipeline, **size)
    embeddings = generator.encode_prompts(["a red circle moves left"])
    latent = generator.initial_latents([0])
    with torch.no_grad():
        levels = [torch.tensor(0.9), torch.tensor(0.4)]
        return torch.cat([generator.predict(latent, sigma, embeddings, 1.0) for sigma in levels])


@pytest.mark.parametrize("name", PIPELINES)
def test_a_merged_pipeline_is_the_one_with_the_adapter(
    name: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    one = made(name)
    (folder,) = export_lora(one.lora, tmp_path / "merged", "merged", base=one.base)
    kind, size = type(one.pipeline), SIZES[name]
    merged = kind.from_pretrained(folder)
    found = predictions(one.family, merged, size)
    torch.testing.assert_close(
        found, predictions(one.family, one.pipeline, size), rtol=0, atol=1e-5
    )
    base = predictions(one.family, kind.from_pretrained(one.base), size)
    assert (base - found).abs().amax((1, 2, 3, 4)).min() > 1e-2
    for component in one.states:
        keys = getattr(merged, component).state_dict()
        assert not any("lora" in key or "base_layer" in key for key in keys)
    assert not (tmp_path / "merged.partial").exists()
    texts = [path.read_text() for path in folder.rglob("*.json")]
    assert len(texts) > 5
    assert not any("_name_or_path" in text or str(one.base) in text for text in texts)


def test_merged_weights_are_rounded_once(made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made("wan")
    (folder,) = export_lora(one.lora, tmp_path, "merged", base=one.base, dtype="bfloat16")
    merged = WanPipeline.from_pretrained(folder, dtype=torch.bfloat16).transformer
    base = WanPipeline.from_pretrained(one.base, dtype=torch.bfloat16).transformer
    for module, update in one.updates("transformer").items():
        before = base.get_submodule(module).weight.float()
        expected = (before + update.float()).bfloat16()
        torch.testing.assert_close(merged.get_submodule(module).weight, expected)
        different = merged.get_submodule(module).weight != expected
        assert different.float().mean() < 0.02  # Sums in another order round apart, rarely.


def test_the_command_takes_the_base_from_the_run(
    made: Callable[[str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = made("wan")
    config = one.lora.parent / "config.yaml"
    config.write_text(
        f"generator: {{path: {one.base}, height: 16, width: 16, num_frames: 5, fps: 8}}\n"
        "rewards: [{name: a, target: 'b:c'}]\nprompts: p.txt\noutput: run\n"
    )
    for name in FORMATS:
        words = ["export", "--lora", str(one.lora), "--format", name]
        assert main([*words, "--output", str(tmp_path / name), "--traceback"]) == 0
        assert f"{name}: {tmp_path / name}" in capsys.readouterr().out
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {LORA_FILE, "lora_comfyui.safetensors", "adapter_model.safetensors"} <= written
    assert "model_index.json" in written
    config.unlink()


def test_a_hub_id_is_noted_and_a_folder_is_not(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    for path, noted in (("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",) * 2, (str(tmp_path), None)):
        config.write_text(
            f"generator: {{path: {path}, height: 16, width: 16, num_frames: 5, fps: 8}}\n"
            "rewards: [{name: a, target: 'b:c'}]\nprompts: p.txt\noutput: run\n"
        )
        found = find_base(tmp_path / "lora", None)
        assert found is not None
        assert found.hub_id == noted
    assert find_base(tmp_path / "elsewhere" / "lora", None) is None


def test_what_cannot_be_exported_is_refused(made: Callable[[str], Made], tmp_path: Path) -> None:
    wan = made("wan")

    def refuse(error: type[Exception], message: str, *words: Any, **options: Any) -> None:
        with pytest.raises(error, match=message):
            export_lora(*words, **options)

    target = tmp_path / "target"
    refuse(FileNotFoundError, r"base must be known.*--base", wan.lora, target, "comfyui")
    refuse(FileNotFoundError, f"a folder with a {LORA_FILE}", tmp_path, target, "diffusers")
    (tmp_path / "tuned" / "transformer").mkdir(parents=True)
    message = "with whole transformers; those are diffusers' own"
    refuse(FileNotFoundError, message, tmp_path / "tuned", target, "peft")
    refuse(ValueError, "format must be one of diffusers", wan.lora, target, "onnx")
    refuse(ValueError, "dtype must be left out", wan.lora, target, "peft", dtype="float16")
    message = "dtype must be one of float32"
    refuse(ValueError, message, wan.lora, target, "merged", base=wan.base, dtype="int8")
    two = made("a14b").lora
    message = "got one of a transformer_2, which .* has not"
    refuse(ValueError, message, two, target, "merged", base=wan.base)
    deeper = tmp_path / "deeper"
    build_tiny_wan(layers=3).save_pretrained(deeper)
    message = "lora of the transformer must fit the generator's transformer"
    refuse(ValueError, message, wan.lora, target, "merged", base=deeper)
    assert not target.exists()
    refuse(FileExistsError, "a new or an empty folder", wan.lora, deeper, "merged", base=wan.base)
    refuse(FileNotFoundError, "with a model_index.json", wan.lora, target, "peft", base=tmp_path)
    index = deeper / "model_index.json"
    index.write_text(re.sub('"WanPipeline"', '"OtherPipeline"', index.read_text()))
    refuse(ValueError, "a pipeline of .*, got a Other", wan.lora, target, "peft", base=deeper)


def test_a_layer_that_comfyui_has_not_is_named() -> None:
    state = {f"norm_out.linear.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    part = LoraPart("transformer", state, LoraSettings(rank=2))
    with pytest.raises(ValueError, match=r"ComfyUI's model has, got 'norm_out.linear' of family"):
        comfyui_state(part, "hunyuan1.5")


def test_a_dora_is_exported_where_it_can_be_held(tmp_path: Path) -> None:
    """PEFT's folder and a merged pipeline give the adapter's own outputs; ComfyUI's file cannot."""
    base, folder = tmp_path / "base", tmp_path / "run" / "lora"
    pipeline = build_tiny_wan()
    pipeline.save_pretrained(base)
    folder.mkdir(parents=True)
    generator = WanGenerator(pipeline, **tiny_wan.SIZE)
    attach_lora(generator.transformer, LoraSettings(rank=2, alpha=3, dora=True))
    for parameter in trained_parameters(generator.transformer):
        nn.init.normal_(parameter, std=0.3)
    save_lora(generator, folder)
    text = generator.encode_prompts(["a red circle"])
    inputs = (generator.initial_latents([0]), torch.tensor(0.5), text, 1.0)
    expected = generator.predict(*inputs).detach()

    (place,) = export_lora(folder, tmp_path / "peft", "peft")
    fresh = WanGenerator(build_tiny_wan(), **tiny_wan.SIZE)
    assert not torch.allclose(fresh.predict(*inputs), expected)
    PeftModel.from_pretrained(fresh.transformer, place)
    torch.testing.assert_close(fresh.predict(*inputs), expected)
    (place,) = export_lora(folder, tmp_path / "merged", "merged", base=base)
    merged = WanGenerator.from_pretrained(place, **tiny_wan.SIZE)
    torch.testing.assert_close(merged.predict(*inputs), expected, rtol=1e-4, atol=1e-4)  # Summed.
    with pytest.raises(ValueError, match="comfyui must be given a plain LoRA, got a DoRA"):
        export_lora(folder, tmp_path / "comfyui", "comfyui", base=base)
