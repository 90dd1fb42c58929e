"""From a folder or a hub id to a transformers model and processor, or one clear error."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from cac_reward.judges.families import find_family

WHOLE_FILE_BYTES = 2**26
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def locate(path_or_hub_id: str | Path, revision: str | None) -> tuple[Path, str | None]:
    """Find the folder of a judge's files, and the commit where they come from the hub.

    Raises:
        FileNotFoundError: If they are not here and cannot be fetched.
    """
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision must be None for a folder, got {revision!r} for {folder}")
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"judge must be a folder with a config.json, got {folder}")
        return folder, None
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


def fingerprint(folder: Path, dtype: str, attention: str) -> str:
    """SHA-256 of a judge's files by name and content, and of what else moves its numbers.

    Of files above WHOLE_FILE_BYTES, size and time of change stand for the content.
    """
    digest = hashlib.sha256(json.dumps([dtype, attention]).encode())
    for path in sorted(one for one in folder.iterdir() if one.is_file()):
        facts = path.stat()
        digest.update(json.dumps([path.name, facts.st_size]).encode())
        if facts.st_size <= WHOLE_FILE_BYTES:
            digest.update(path.read_bytes())
        else:
            digest.update(str(facts.st_mtime_ns).encode())
    return digest.hexdigest()


def load(folder: Path, device: str, dtype: str, attention: str) -> tuple[Any, Any]:
    """Load model and processor of a known family, in evaluation mode and without gradient.

    Args:
        folder: where `save_pretrained` put both.
        device: where the model goes, for example 'cpu' or 'cuda:0'.
        dtype: one of `DTYPES`.
        attention: transformers' name of the attention kernel.

    Raises:
        ValueError: If the dtype or family is unknown, or files are damaged or missing.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}")
    try:
        find_family(AutoConfig.from_pretrained(folder).model_type)
        processor = AutoProcessor.from_pretrained(folder)
        model, loading = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"judge must be a complete checkpoint, got {folder}: {error}") from error
    if loading["missing_keys"]:
        raise ValueError(
            f"judge must be a complete checkpoint, got {folder} without "
            f"{sorted(loading['missing_keys'])[0]!r}; copy or save it again"
        )
    return model.to(device).eval().requires_grad_(False), processor
