"""From a folder or a hub id to a transformers model and processor, or one clear error."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
)

from cac_reward.frames import JUDGE_FILE
from cac_reward.judges.attention import check_attention, prepare_attention
from cac_reward.judges.families import find_family

WHOLE_FILE_BYTES = 2**26
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("8bit", "4bit")
ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_PATH_STARTS = ("/", "./", "../", "~")
"""Of what can only be a path; ids on the hub begin with a letter or a digit."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a judge is brought into memory; checked before anything is read."""

    device: str = "cpu"
    """For example 'cpu' or 'cuda:0'."""
    dtype: str = "float32"
    """One of `DTYPES`."""
    attention: str = "sdpa"
    """One of `attention.ATTENTIONS`."""
    quantization: str | None = None
    """One of `QUANTIZATIONS`, through bitsandbytes; None loads the weights as they are."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {list(DTYPES)}, got {self.dtype!r}")
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ValueError(
                f"quantization must be None or one of {QUANTIZATIONS}, got {self.quantization!r}"
            )
        if self.quantization and importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError(
                f"quantization {self.quantization!r} needs bitsandbytes; install it with: "
                "pip install 'cac-reward[quantization]', or leave quantization out"
            )
        prepare_attention(self.attention, self.device, self.dtype)

    def arguments(self) -> dict[str, Any]:
        """What transformers' `from_pretrained` is given."""
        arguments: dict[str, Any] = {
            "dtype": DTYPES[self.dtype],
            "attn_implementation": self.attention,
        }
        if self.quantization == "8bit":
            arguments["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        if self.quantization == "4bit":
            arguments["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=DTYPES[self.dtype],
            )
        if self.quantization:
            # Quantised while it is read; such a model must not be moved afterwards.
            arguments["device_map"] = {"": self.device}
        return arguments


@dataclass(frozen=True)
class JudgeFiles:
    """Where a judge's files are: a whole checkpoint, or a LoRA adapter on its base."""

    judge_id: str
    """Folder or hub id as given; names the base, too, where there is one."""
    folder: Path
    """Of the checkpoint, or of the adapter."""
    revision: str | None
    """Commit of `folder` where it came from the hub."""
    base: Path | None = None
    """Folder of the checkpoint that an adapter goes on."""

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.folder,) if self.base is None else (self.folder, self.base)

    def folder_with(self, *names: str) -> Path:
        """The adapter's folder where it has one of these files, else the base's."""
        has = any((self.folder / name).is_file() for name in names)
        return self.folder if has or self.base is None else self.base

    @property
    def settings_folder(self) -> Path:
        return self.folder_with(JUDGE_FILE)

    def facts(self) -> tuple[tuple[str, int, int], ...]:
        """Path, size and time of change of every file, to know them again."""
        return tuple(
            (str(path), path.stat().st_size, path.stat().st_mtime_ns)
            for folder in self.folders
            for path in sorted(folder.resolve().iterdir())
            if path.is_file()
        )


def find_files(
    path_or_hub_id: str | Path, *, revision: str | None = None, base: str | Path | None = None
) -> JudgeFiles:
    """Find a judge, and the base that it names where it is a LoRA adapter.

    Args:
        path_or_hub_id: of a checkpoint, or of an adapter saved by peft.
        revision: branch, tag or commit of it on the hub.
        base: folder or hub id of an adapter's base; None takes the one that the adapter names.

    Raises:
        FileNotFoundError: If one of them is not here and cannot be fetched.
        ValueError: If an adapter names no base, or a base is given for a whole checkpoint.
    """
    folder, commit = locate(path_or_hub_id, revision)
    adapter = folder / ADAPTER_FILE
    if (folder / "config.json").is_file() or not adapter.is_file():
        if base is not None:
            raise ValueError(
                f"base must be None for a whole checkpoint, got {str(base)!r} for {folder}"
            )
        return JudgeFiles(str(path_or_hub_id), folder, commit)
    try:
        record = json.loads(adapter.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{adapter} must be JSON in UTF-8, got: {error}") from error
    named = record.get("base_model_name_or_path")
    if base is None and not named:
        raise ValueError(f"base must be given, since {adapter} names none")
    at = None if base is not None or Path(str(named)).is_dir() else record.get("revision")
    base_folder, _ = locate(base or named, at)
    if not (base_folder / "config.json").is_file():
        raise FileNotFoundError(f"base must be a folder with a config.json, got {base_folder}")
    return JudgeFiles(f"{path_or_hub_id} on {base or named}", folder, commit, base_folder)


def locate(path_or_hub_id: str | Path, revision: str | None) -> tuple[Path, str | None]:
    """Find the folder of a judge's files, and the commit where they come from the hub.

    Raises:
        FileNotFoundError: If they are not here and cannot be fetched.
    """
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision must be None for a folder, got {revision!r} for {folder}")
        if not any((folder / name).is_file() for name in ("config.json", ADAPTER_FILE)):
            raise FileNotFoundError(
                f"judge must be a folder with a config.json, or with a LoRA adapter's "
                f"{ADAPTER_FILE}, got {folder}"
            )
        return folder, None
    if str(path_or_hub_id).startswith(_PATH_STARTS):
        raise FileNotFoundError(
            f"judge must be an existing folder where a path is given, got {str(path_or_hub_id)!r}; "
            "correct the path, or give the id of a judge on the hub"
        )
    try:
        snapshot = Path(snapshot_download(str(path_or_hub_id), revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"judge {str(path_or_hub_id)!r} is no folder here, is not in the cache "
            f"{constants.HF_HUB_CACHE} and could not be fetched from the hub; on a machine with "
            f"network run: hf download {path_or_hub_id} --local-dir FOLDER, then give FOLDER in "
            f"place of the id (--judge FOLDER). Reason: {error}"
        ) from error
    return snapshot, snapshot.name


def fingerprint(files: JudgeFiles, options: LoadOptions) -> str:
    """SHA-256 of a judge's files by name and content, and of what else moves its numbers.

    Of files above WHOLE_FILE_BYTES, size and time of change stand for the content.
    """
    moved = [options.dtype, options.attention, options.quantization]
    digest = hashlib.sha256(json.dumps(moved).encode())
    for folder in files.folders:
        for path in sorted(one for one in folder.iterdir() if one.is_file()):
            facts = path.stat()
            digest.update(json.dumps([path.name, facts.st_size]).encode())
            if facts.st_size <= WHOLE_FILE_BYTES:
                digest.update(path.read_bytes())
            else:
                digest.update(str(facts.st_mtime_ns).encode())
    return digest.hexdigest()


def load(
    files: JudgeFiles, options: LoadOptions, *, trainable_adapter: bool = False
) -> tuple[Any, Any]:
    """Load model and processor of a known family, in evaluation mode and without gradient.

    Args:
        files: where they are.
        options: how they are brought into memory.
        trainable_adapter: return an adapter as peft's model around its base, to train it further.

    Raises:
        ValueError: If the family is unknown, or files are damaged, missing or do not fit.
        RuntimeError: If the model does not run on the attention that was asked for.
    """
    whole = files.folders[-1]
    try:
        find_family(AutoConfig.from_pretrained(whole).model_type)
        processor = AutoProcessor.from_pretrained(files.folder_with(*PROCESSOR_FILES))
        model, loading = AutoModelForImageTextToText.from_pretrained(
            whole, output_loading_info=True, **options.arguments()
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"judge must be a complete checkpoint, got {whole}: {error}") from error
    if loading["missing_keys"]:
        raise ValueError(
            f"judge must be a complete checkpoint, got {whole} without "
            f"{sorted(loading['missing_keys'])[0]!r}; copy or save it again"
        )
    if options.quantization is None:
        model = model.to(options.device)
    if files.base is not None:
        model = _with_adapter(model, files.folder, trainable_adapter)
    check_attention(model, options.attention)
    return model.eval().requires_grad_(False), processor


def _with_adapter(model: Any, folder: Path, trainable: bool) -> Any:
    """A model with a LoRA adapter in place, not merged: half precision would round it away.

    Raises:
        ValueError: If the adapter's weights are missing, damaged or do not fit the model.
    """
    from peft import PeftModel, get_peft_model_state_dict

    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ValueError(
            f"judge must be an adapter with {ADAPTER_WEIGHTS}, got {folder}; save it again with "
            "safe_serialization=True, since pickled weights are not read"
        )
    try:
        with safe_open(weights, framework="pt") as opened:
            stored = set(opened.keys())
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"adapter must fit its base, got {folder}: {error}") from error
    different = stored ^ set(get_peft_model_state_dict(adapted))
    if different:
        raise ValueError(
            f"adapter must fit its base, got {folder} with {len(different)} weights that only one "
            f"of them has, such as {sorted(different)[0]!r}; name its true base as base="
        )
    return adapted if trainable else adapted.get_base_model()
