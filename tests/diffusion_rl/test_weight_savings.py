"""What is advised where a pipeline's weights do not fit, and whether it would save that much."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_rl.configuration import load_config
from diffusion_rl.generators import pipeline as pipelines
from diffusion_rl.generators.settings import (
    OFFLOADED_PARTS,
    ContextParallelSettings,
    ExecutionSettings,
    OffloadSettings,
)
from diffusion_rl.generators.wan import WanGenerator
from diffusion_rl.generators.weight_savings import (
    count_numbers,
    placing_savings,
    precision_savings,
)
from diffusion_rl.memory_errors import OutOfMemoryError
from tests.diffusion_rl.test_families import TINY
from tests.tiny_wan import SIZE, save_tiny_wan

RECIPE = Path(__file__).resolve().parent.parent.parent / "configs" / "rl" / "toy_grpo.yaml"
ALL = "generator.execution.offload.parts=[transformer,text_encoder,vae]"
LEARNS = " generator.execution.gradient_checkpointing=true, where a LoRA learns,"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("wan") / "pipeline")


def numbers_of(part: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in part.state_dict().values())


@pytest.mark.parametrize("name", TINY)
def test_numbers_are_counted_without_loading_them(name: str, tmp_path: Path) -> None:
    pipeline = TINY[name][1]()
    pipeline.save_pretrained(tmp_path)
    for kind in OFFLOADED_PARTS:
        modules = [
            part
            for own, part in pipeline.components.items()
            if own.startswith(kind) and isinstance(part, torch.nn.Module)
        ]
        # What two layers share is in the file once.
        held = {one.data_ptr(): one.numel() for part in modules for one in part.parameters()}
        assert 0 <= count_numbers(tmp_path, kind) - sum(held.values()) < 0.1 * sum(held.values())
        assert count_numbers(tmp_path, kind) <= sum(map(numbers_of, modules))


def test_variants_and_other_formats_are_not_counted(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "pipeline"))
    weights = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = count_numbers(copied, "transformer")
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert count_numbers(copied, "transformer") == whole > 0
    weights.rename(weights.with_suffix(".bin"))
    weights.with_name("diffusion_pytorch_model.fp16.safetensors").unlink()
    assert count_numbers(copied, "transformer") == 0
    assert precision_savings(copied, "float32", ("transformer",)) == []


def test_half_precision_and_waiting_are_advised_where_they_help(folder: Path) -> None:
    numbers = {part: count_numbers(folder, part) for part in OFFLOADED_PARTS}
    learning = numbers["transformer"] + numbers["text_encoder"]
    found = dict(placing_savings(folder, "float32", ExecutionSettings(), OFFLOADED_PARTS))
    assert found == {
        "generator.dtype=bfloat16": 2 * learning,
        "generator.execution.offload.parts=[text_encoder,vae]": 4
        * (numbers["text_encoder"] + numbers["vae"]),
        ALL + LEARNS: 4 * (learning + numbers["vae"]),
    }
    text = ExecutionSettings(offload=OffloadSettings(parts=("text_encoder",)))
    found = dict(placing_savings(folder, "bfloat16", text, OFFLOADED_PARTS))
    assert found == {
        "generator.execution.offload.parts=[text_encoder,vae]": 4 * numbers["vae"],
        ALL + LEARNS: 2 * numbers["transformer"] + 4 * numbers["vae"],
    }
    shared = ExecutionSettings(context_parallel=ContextParallelSettings(ring=2))
    found = dict(placing_savings(folder, "bfloat16", shared, ("transformer", "vae")))
    assert found == {"generator.execution.offload.parts=[vae]": 4 * numbers["vae"]}
    every = ExecutionSettings(gradient_checkpointing=True, offload=OffloadSettings())
    assert placing_savings(folder, "bfloat16", every, OFFLOADED_PARTS) == []


def test_a_run_takes_what_is_advised(folder: Path) -> None:
    execution = ExecutionSettings()
    for setting, _ in placing_savings(folder, "float32", execution, OFFLOADED_PARTS):
        words = setting.removesuffix(", where a LoRA learns,").split()
        taken = load_config(RECIPE, ["generator.device=cuda", *words]).generator
        offload = taken.execution.offload
        asked = taken.dtype if offload is None else f"[{','.join(offload.parts)}]"
        assert words[0].endswith(f"={asked}")


def exhausted(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_loading_and_moving_are_explained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipelines, "place", exhausted)
        message = r"in moving the generator to cpu \(CUDA.*; generator.dtype=bfloat16 saves about"
        with pytest.raises(OutOfMemoryError, match=message):
            WanGenerator.from_pretrained(folder, **SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(WanGenerator.pipeline_class, "from_pretrained", exhausted)
        message = "in loading the generator .*; generator.dtype=bfloat16 saves about"
        with pytest.raises(OutOfMemoryError, match=message):
            WanGenerator.from_pretrained(folder, **SIZE)
        message = (
            "in loading the generator .*; no setting is known to help: it takes a smaller model"
        )
        with pytest.raises(OutOfMemoryError, match=message):
            WanGenerator.from_pretrained(folder, dtype="bfloat16", **SIZE)


def test_encoding_prompts_is_explained(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = WanGenerator.from_pretrained(folder, prompt_cache=tmp_path / "cache", **SIZE)
    message = "in encoding prompts .*; generator.dtype=bfloat16 saves about"
    with monkeypatch.context() as patch:
        patch.setattr(WanGenerator, "load_text_encoders", exhausted)
        with pytest.raises(OutOfMemoryError, match=message):
            generator.encode_prompts(["a red circle"])
    monkeypatch.setattr(WanGenerator, "encode_one", exhausted)
    with pytest.raises(OutOfMemoryError, match=message):
        generator.encode_prompts(["a red circle"])
    monkeypatch.setattr(WanGenerator, "device", torch.device("meta"))
    with pytest.raises(OutOfMemoryError, match=r"in encoding prompts .*offload.parts=\[transform"):
        generator.encode_prompts(["a red circle"])
    built = WanGenerator(generator.pipeline, **SIZE)
    with pytest.raises(
        OutOfMemoryError, match=r"in encoding prompts .*; no setting is known to help"
    ):
        built.encode_prompts(["a red circle"])
