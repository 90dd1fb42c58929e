"""Everything a run needs to go on, saved so that an interruption loses nothing.

A checkpoint is a folder that appears under its name only when it is complete:

    step-000010/lora/pytorch_lora_weights.safetensors  loads in diffusers on its own (and a second
                                                       file where two transformers learn); or
    step-000010/weights.safetensors                    float32, where the weights themselves learn
    step-000010/training_state.pt                      optimiser, slow copies, random state, counts
    step-000010/checkpoint.json                        version, step, digests of the others
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_rl.finetune import FinetuneState
from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.lora import AVERAGE, OLD
from diffusion_rl.optimizers import SKIPPED
from diffusion_rl.policies import policies_of
from diffusion_rl.weight_files import set_trained_contents, trained_contents

VERSION = 2
MANIFEST, STATE_FILE = "checkpoint.json", "training_state.pt"
PARTIAL = ".partial"
COPIES = {OLD: "old_policy", AVERAGE: "average"}
"""Policies that follow the trained one, to their entry in the state file."""
LEVELS = ("reference_levels", "running_levels")
COUNTS = ("step", "videos_generated", "reward_calls", "seconds")


@dataclass(frozen=True)
class Snapshot:
    """A run between two updates, copied out of the live objects."""

    step: int
    """Updates done."""
    files: Mapping[str, bytes]
    """What a checkpoint holds, by place in its folder."""


def take_snapshot(generator: AbstractVideoGenerator, state: FinetuneState) -> Snapshot:
    """Copy what the next update would change: what learns, its optimiser, the counts."""
    policies = policies_of(generator.transformer)
    record = {name: getattr(state, name) for name in COUNTS}
    for name in LEVELS:
        record[name] = dict(getattr(state, name))
    record["history"] = {prompt: list(past) for prompt, past in state.history.items()}
    record["optimizer"] = state.optimizer.state_dict()
    for policy, name in COPIES.items():
        record[name] = policies.state(policy) if policies.has(policy) else None
    record["random"] = _random_state()
    buffer = io.BytesIO()
    torch.save(record, buffer)
    return Snapshot(state.step, {**trained_contents(generator), STATE_FILE: buffer.getvalue()})


def restore(generator: AbstractVideoGenerator, state: FinetuneState, snapshot: Snapshot) -> None:
    """Put a snapshot back; generator and state must have been set up as for a new run.

    Learning rate, weight decay and gradient limit stay those of `state`, so that a run can go on
    with gentler ones.

    Raises:
        ValueError: the snapshot is of another model, other lora settings or another algorithm.
    """
    policies = policies_of(generator.transformer)
    record = torch.load(io.BytesIO(snapshot.files[STATE_FILE]), weights_only=True)
    causes = ("the same algorithm", "the same use of optimizer.average_decay")
    for (policy, name), cause in zip(COPIES.items(), causes, strict=True):
        if policies.has(policy) != (record[name] is not None):
            raise ValueError(
                f"checkpoint must be of {cause}, got one "
                + ("without" if record[name] is None else "with")
                + f" an {name.replace('_', ' ')}; start anew in another output folder"
            )
    set_trained_contents(generator, snapshot.files, "checkpoint")
    for policy, name in COPIES.items():
        if record[name] is not None:
            policies.set_state(record[name], policy, "checkpoint")
    options = [
        {key: value for key, value in group.items() if key not in ("params", SKIPPED)}
        for group in state.optimizer.param_groups
    ]
    state.optimizer.load_state_dict(record["optimizer"])
    for group, own in zip(state.optimizer.param_groups, options, strict=True):
        group.update(own)
    for name in (*COUNTS, *LEVELS):
        setattr(state, name, record[name])
    # Checkpoints of this version were written before there was a row with a history.
    state.history = record.get("history", {})
    _set_random_state(record["random"])


def save_checkpoint(folder: str | Path, snapshot: Snapshot, *, keep: int = 2) -> Path:
    """Write a snapshot as `folder/step-NNNNNN`, whole or not at all, and drop the oldest.

    Everything goes to a temporary folder, is flushed to the disk and then renamed.

    Args:
        folder: made if missing.
        snapshot: what to save; a step saved before is left as it is.
        keep: newest checkpoints that stay, at least 1.

    Raises:
        OSError: the disk is full or not writable; the earlier checkpoints are as they were.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    folder = Path(folder)
    path = folder / f"step-{snapshot.step:06d}"
    if path.is_dir():
        return path
    partial = path.with_suffix(PARTIAL)
    manifest = {
        "version": VERSION,
        "step": snapshot.step,
        "sha256": {place: _digest(content) for place, content in snapshot.files.items()},
    }
    content = {**snapshot.files, MANIFEST: json.dumps(manifest, indent=1).encode()}
    try:
        for leftover in folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)
        for place, data in content.items():
            _write(partial / place, data)
        os.replace(partial, path)
        _flush_folder(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        earlier = latest_checkpoint(folder) or "none yet"
        size = sum(map(len, content.values())) / 1e6
        raise OSError(
            error.errno,
            f"checkpoint of step {snapshot.step} ({size:.1f} MB) could not be written to {folder}: "
            f"{error.strerror}; the last complete one is {earlier}; make room and run the same "
            "command again to go on from it",
        ) from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoint folders, oldest first; temporary ones are not among them."""
    found = (path for path in Path(folder).glob("step-*") if path.name[5:].isdigit())
    return sorted(found, key=lambda path: int(path.name[5:]))


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint folder, or None."""
    return next(reversed(checkpoints(folder)), None)


def read_checkpoint(path: str | Path) -> Snapshot:
    """Read a checkpoint folder, every byte checked.

    Raises:
        ValueError: it is half-written, damaged, or of another version.
    """
    path = Path(path)
    earlier = [str(other) for other in checkpoints(path.parent) if other != path]
    way_out = f"delete {path} to go on from " + (earlier[-1] if earlier else "the start")
    if not (path / MANIFEST).is_file():
        raise ValueError(f"checkpoint must be complete, got no {MANIFEST} in {path}; {way_out}")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except ValueError as error:
        raise ValueError(
            f"checkpoint must be complete, got a damaged {path / MANIFEST}; {way_out}"
        ) from error
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"checkpoint must be of version {VERSION}, got {manifest.get('version')} in {path}; "
            f"{way_out}"
        )
    files = {}
    for place, digest in manifest["sha256"].items():
        data = (path / place).read_bytes() if (path / place).is_file() else b""
        if _digest(data) != digest:
            raise ValueError(
                f"checkpoint must be complete, got a damaged {path / place} "
                f"({len(data)} bytes); {way_out}"
            )
        files[place] = data
    return Snapshot(manifest["step"], files)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write and wait until the disk has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Wait until the disk has the folder's new name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _random_state() -> dict[str, Any]:
    """For rewards that draw numbers; the loop's own follow from seed and step."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def _set_random_state(saved: Mapping[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.device_count() == len(saved["cuda"]):
        torch.cuda.set_rng_state_all(saved["cuda"])
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
