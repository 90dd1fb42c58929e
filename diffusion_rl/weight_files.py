"""What learnt as files: a LoRA, or whole transformers as stock diffusers folders; and what of
either a checkpoint holds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from diffusion_rl.full_policies import FullSettings
from diffusion_rl.generators.base import LORA_FILE, SECOND_LORA_FILE, AbstractVideoGenerator
from diffusion_rl.lora import TRAINED, check_same_model
from diffusion_rl.lora_files import load_lora, lora_contents, save_lora, set_lora_contents
from diffusion_rl.policies import (
    attach_full,
    full_policies,
    policies_of,
    saved_policy,
)
from diffusion_rl.sharding import gathered

# Parts of a pipeline by diffusers' names, which are also the names of their folders.
COMPONENTS = {LORA_FILE: "transformer", SECOND_LORA_FILE: "transformer_2"}
LORA, TUNED = "lora", "tuned"
"""Folders of a run's result, as a LoRA or as whole transformers."""
LORA_PLACE, WEIGHTS_PLACE = "lora/", "weights.safetensors"
"""Places of what learns in a checkpoint."""
CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
INDEX_FILE = WEIGHTS_FILE + ".index.json"
PIPELINE_FILE = "model_index.json"


def components(generator: AbstractVideoGenerator) -> dict[str, nn.Module]:
    """The transformers that learn, by their names in the pipeline."""
    return {
        COMPONENTS[file]: generator.transformer.get_submodule(place)
        for file, place in generator.lora_files.items()
    }


def save_result(generator: AbstractVideoGenerator, output: str | Path) -> Path:
    """Write what was learnt (its average, where kept) as `lora` or `tuned` in a run's folder."""
    if full_policies(generator.transformer) is None:
        return save_lora(generator, Path(output) / LORA)
    return save_transformers(generator, Path(output) / TUNED)


def has_result(generator: AbstractVideoGenerator, output: str | Path) -> bool:
    """Whether a run's folder holds what `save_result` writes there, of whatever update."""
    if full_policies(generator.transformer) is None:
        return all((Path(output) / LORA / file).is_file() for file in generator.lora_files)
    return all((Path(output) / TUNED / name).is_dir() for name in components(generator))


def save_transformers(generator: AbstractVideoGenerator, folder: str | Path) -> Path:
    """Write each transformer that learnt as stock diffusers wants it, in the type it runs in.

    `folder/transformer` (and `transformer_2`) are what `from_pretrained` of the transformer's
    class reads, and what `load_transformers` and `evaluate` read.

    Returns:
        The folder.
    """
    folder = Path(folder)
    for name, part in components(generator).items():
        partial, earlier = folder / f"{name}.partial", folder / f"{name}.earlier"
        with saved_policy(generator.transformer):
            model: Any = gathered(part)
            if model is None:
                continue
            for leftover in (partial, earlier):
                shutil.rmtree(leftover, ignore_errors=True)
            model.save_pretrained(partial)
        forget_source(partial)
        if (folder / name).exists():
            os.replace(folder / name, earlier)
        os.replace(partial, folder / name)
        shutil.rmtree(earlier, ignore_errors=True)
    return folder


def forget_source(folder: Path) -> None:
    """Take out of what diffusers has written where on this computer the weights were read from."""
    for path in (*folder.rglob(CONFIG_FILE), *folder.rglob(PIPELINE_FILE)):
        tree = json.loads(path.read_bytes())
        if tree.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def load_transformers(generator: AbstractVideoGenerator, folder: str | Path) -> None:
    """Run with the transformers of a folder from `save_transformers`; the base is kept beside.

    The base stays as the reference policy, on the CPU. Nothing is touched unless everything fits.

    Raises:
        FileNotFoundError: a transformer that learns has no folder there.
        ValueError: the weights are damaged, or of another model.
    """
    folder, state = Path(folder), dict[str, Tensor]()
    for (file, place), part in zip(
        generator.lora_files.items(), components(generator).values(), strict=True
    ):
        name = COMPONENTS[file]
        if not (folder / name / CONFIG_FILE).is_file():
            raise FileNotFoundError(
                f"--transformer must be a folder with {' and '.join(components(generator))} in it, "
                f"each a diffusers model, got no {folder / name / CONFIG_FILE}" + _way_out(folder)
            )
        own = read_transformer(folder / name)
        shapes = {key: value.shape for key, value in part.state_dict().items()}
        check_same_model(shapes, own, f"transformer {folder / name}", "settings")
        prefix = f"{place}." if place else ""
        state |= {prefix + key: value for key, value in own.items()}
    policies = attach_full(generator.transformer, FullSettings(copies="cpu"), learns=False)
    policies.set_state({name: state[name] for name in policies.places}, TRAINED, str(folder))


def _way_out(folder: Path) -> str:
    """The end of an error: what the folder seems to be instead."""
    if any((folder / file).is_file() for file in COMPONENTS):
        return "; it holds a LoRA, give it with --lora"
    if (folder / CONFIG_FILE).is_file():
        return f"; did you mean the folder it is in, {folder.parent}?"
    return ""


def read_transformer(folder: Path) -> dict[str, Tensor]:
    """Weights of a stock diffusers folder, in one file or in several.

    Raises:
        ValueError: none there, or damaged.
    """
    index, files = folder / INDEX_FILE, [WEIGHTS_FILE]
    try:
        if index.is_file():
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        state: dict[str, Tensor] = {}
        for file in files:
            # Only names of files beside the index: it must not point anywhere else.
            state |= load_file(folder / Path(file).name)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"transformer must be a diffusers folder of safetensors, got {folder}: {error}"
        ) from error
    return state


def load_result(
    generator: AbstractVideoGenerator,
    *,
    lora: str | Path | None = None,
    transformer: str | Path | None = None,
) -> None:
    """Put what an earlier run learnt on a generator: a LoRA, whole transformers, or neither.

    Raises:
        FileNotFoundError: there is none in the folder; says what it is instead.
        ValueError: both are given, or one is damaged or of another model.
    """
    if lora is not None and transformer is not None:
        raise ValueError(f"--transformer must be left out with --lora, got {transformer}")
    if transformer is not None:
        load_transformers(generator, transformer)
    elif lora is not None:
        names = (*COMPONENTS.values(), CONFIG_FILE)
        if any((Path(lora) / name).exists() for name in names) and not any(
            (Path(lora) / file).is_file() for file in COMPONENTS
        ):
            raise FileNotFoundError(
                f"lora must be a folder with a {' or '.join(COMPONENTS)}, got {lora}; it holds "
                "whole transformers, give it with --transformer"
            )
        load_lora(generator, lora)


def trained_contents(generator: AbstractVideoGenerator) -> dict[str, bytes]:
    """What learns as files of a checkpoint, by place: a LoRA's, or one of float32 weights."""
    if full_policies(generator.transformer) is None:
        return {LORA_PLACE + name: data for name, data in lora_contents(generator).items()}
    return {WEIGHTS_PLACE: save(policies_of(generator.transformer).state(everywhere=False))}


def set_trained_contents(
    generator: AbstractVideoGenerator, contents: Mapping[str, bytes], source: str
) -> None:
    """Put the files of `trained_contents` back; further files are passed over.

    Raises:
        ValueError: they are of another model, of other settings, or of the other way to learn.
    """
    policies = full_policies(generator.transformer)
    if (policies is not None) != (WEIGHTS_PLACE in contents):
        kinds = ("a LoRA", "full weights")
        found = kinds[WEIGHTS_PLACE in contents]
        raise ValueError(
            f"{source} must hold {kinds[policies is not None]}, got {found}; let what learns be "
            "the same as when it was made (lora, or full)"
        )
    if policies is not None:
        policies.set_state(load(contents[WEIGHTS_PLACE]), TRAINED, source)
        return
    files = {
        place.removeprefix(LORA_PLACE): data
        for place, data in contents.items()
        if place.startswith(LORA_PLACE)
    }
    set_lora_contents(generator, files, source)
