"""Prompt embeddings on disk, so that a second start does not load the text encoder at all.

An entry is a safetensors file named by a hash of all that the embedding follows from: the files of
text encoder and tokenizer by content, the pipeline's class, length, type, device, the libraries'
versions, and the prompt. One that is damaged is told by its checksum and computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 1
HASHES_FILE = "hashes.json"
SETTLED_SECONDS = 2.0
"""A file changed later than so long ago may change again within one tick of its clock."""
EMBEDDING, EXTRA = "embedding", "extra."

Entry = tuple[Tensor, dict[str, Tensor]]
"""Embedding [1 L D] of a prompt, and the further inputs [1 ...] by name."""


class PromptCache:
    """A folder of prompt embeddings; several processes and runs may share it.

    Args:
        folder: made when the first entry is written.
        identity: all but the prompt that an embedding follows from; JSON values.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.identity = {"format": FORMAT, **identity}

    def path(self, prompt: str) -> Path:
        """Where a prompt's entry lies."""
        whole = json.dumps({**self.identity, "prompt": prompt}, sort_keys=True)
        name = hashlib.sha256(whole.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, prompt: str) -> Entry | None:
        """A prompt's embedding, or None where there is none that is whole."""
        path = self.path(prompt)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                stated = (file.metadata() or {}).get("sha256")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            logger.warning("embedding %s cannot be read and is computed again: %s", path, error)
            return None
        if stated != checksum(tensors) or EMBEDDING not in tensors:
            logger.warning("embedding %s is damaged and is computed again", path)
            return None
        extras = {
            name.removeprefix(EXTRA): tensor
            for name, tensor in tensors.items()
            if name.startswith(EXTRA)
        }
        return tensors[EMBEDDING], extras

    def write(self, prompt: str, entry: Entry) -> None:
        """Keep a prompt's embedding; a reader sees all of it or nothing."""
        embedding, extras = entry
        tensors = {EMBEDDING: embedding, **{EXTRA + name: one for name, one in extras.items()}}
        tensors = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
        metadata = {"sha256": checksum(tensors), "prompt": prompt}
        _write_whole(self.path(prompt), save(tensors, metadata))


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def fingerprint(folders: list[Path], memory: Path) -> str:
    """Hash of every file in some folders, by content.

    Args:
        folders: of one pipeline; one that is not there counts as empty.
        memory: a folder in which the hashes of files are kept by place, size and time of change,
            so that gigabytes are read once and not at every start.
    """
    known = _read_hashes(memory / HASHES_FILE)
    whole, before = hashlib.sha256(), dict(known)
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            place = f"{folder.name}/{path.relative_to(folder).as_posix()}"
            whole.update(f"{place} {_hash_of(path, known)}\n".encode())
    if known != before:
        _write_whole(memory / HASHES_FILE, json.dumps(known, indent=1).encode())
    return whole.hexdigest()


def _hash_of(path: Path, known: dict[str, str]) -> str:
    # A hub's cache holds links; what they point at is what counts.
    real = path.resolve()
    status = real.stat()
    key = f"{real} {status.st_size} {status.st_mtime_ns}"
    if key not in known:
        with real.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time() - status.st_mtime < SETTLED_SECONDS:
            return found
        known[key] = found
    return known[key]


def _read_hashes(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        logger.warning("%s cannot be read, files are hashed again: %s", path, error)
        return {}
    return found if isinstance(found, dict) else {}


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, path)
