"""Everything a run needs to go on, saved so that an interruption loses nothing.

A checkpoint is a folder that appears under its name only when it is complete:

    step-000010/lora/pytorch_lora_weights.safetensors  loads in diffusers on its own (and a second
                                                       file where two transformers learn); or
    step-000010/weights.safetensors                    float32, where the weights themselves learn
    step-000010/training_state.safetensors             optimiser, slow copies, random state
    step-000010/training_state.json                    counts, levels, and where those tensors go
    step-000010/checkpoint.json                        version, step, metrics, digests of the others

None of them can hold code. It does not matter how many processes wrote it or go on from it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion_rl import processes
from diffusion_rl.finetune import FinetuneState
from diffusion_rl.generators.base import AbstractVideoGenerator
from diffusion_rl.lora import AVERAGE, OLD
from diffusion_rl.optimizers import SKIPPED
from diffusion_rl.packing import pack, unpack
from diffusion_rl.policies import policies_of
from diffusion_rl.weight_files import set_trained_contents, trained_contents

VERSION = 3
MANIFEST = "checkpoint.json"
STATE_TENSORS, STATE_FILE = "training_state.safetensors", "training_state.json"
PARTIAL = ".partial"
COPIES = {OLD: "old_policy", AVERAGE: "average"}
"""Policies that follow the trained one, to their entry in the state file."""
LEVELS = ("reference_levels", "running_levels")
MEMORIES = ("prompts", "series", "warned", "ahead")
COUNTS = ("step", "videos_generated", "reward_calls", "seconds")


@dataclass(frozen=True)
class Snapshot:
    """A run between two updates, copied out of the live objects."""

    step: int
    """Updates done."""
    files: Mapping[str, bytes]
    """What a checkpoint holds, by place in its folder."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the last update, by name; for choosing the best."""


def take_snapshot(
    generator: AbstractVideoGenerator,
    state: FinetuneState,
    metrics: Mapping[str, float] | None = None,
    dice: Sequence[Any] = (),
) -> Snapshot:
    """Copy what the next update would change: what learns, its optimiser, the counts.

    Where weights that learn are split over processes all of them call this, and what the first of
    them gets is whole.

    Args:
        generator: carries what learns.
        state: of the run.
        metrics: of the last update; those that are not finite are left out.
        dice: `random_state` of every process, by rank; none is this one's alone.
    """
    policies = policies_of(generator.transformer)
    record = {name: getattr(state, name) for name in COUNTS}
    for name in LEVELS:
        record[name] = dict(getattr(state, name))
    record["history"] = {prompt: list(past) for prompt, past in state.history.items()}
    for name in MEMORIES:
        record[name] = getattr(state, name)
    record["optimizer"] = policies.optimizer_state(state.optimizer)
    for policy, name in COPIES.items():
        kept = policies.has(policy)
        record[name] = policies.state(policy, everywhere=False) if kept else None
    record["random"] = list(dice) or [random_state()]
    tensors, text = pack(record)
    finite = {name: value for name, value in (metrics or {}).items() if math.isfinite(value)}
    files = {**trained_contents(generator), STATE_TENSORS: tensors, STATE_FILE: text}
    return Snapshot(state.step, files, finite)


def restore(generator: AbstractVideoGenerator, state: FinetuneState, snapshot: Snapshot) -> None:
    """Put a snapshot back; generator and state must have been set up as for a new run.

    Learning rate, weight decay and gradient limit stay those of `state`, so that a run can go on
    with gentler ones.

    Raises:
        ValueError: the snapshot is of another model, other lora settings or another algorithm.
    """
    policies = policies_of(generator.transformer)
    record = unpack(snapshot.files[STATE_TENSORS], snapshot.files[STATE_FILE])
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
    state.optimizer.load_state_dict(policies.own_optimizer_state(record["optimizer"]))
    for group, own in zip(state.optimizer.param_groups, options, strict=True):
        group.update(own)
    for name in (*COUNTS, *LEVELS, "history"):
        setattr(state, name, record[name])
    for name in MEMORIES:  # Checkpoints of this version were written before there were any.
        setattr(state, name, record.get(name, {}))
    dice = record["random"]
    if processes.rank() < len(dice):
        set_random_state(dice[processes.rank()])
    else:  # There were fewer processes.
        processes.part_ways(state.step)


def save_checkpoint(
    folder: str | Path, snapshot: Snapshot, *, keep: int = 2, best_by: str | None = None
) -> Path:
    """Write a snapshot as `folder/step-NNNNNN`, whole or not at all, and drop the oldest.

    Everything goes to a temporary folder, is flushed to the disk and then renamed.

    Args:
        folder: made if missing.
        snapshot: what to save; a step saved before is left as it is.
        keep: newest checkpoints that stay, at least 1.
        best_by: a metric; the checkpoint where it is highest stays besides them.

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
        "metrics": dict(snapshot.metrics),
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
    best = best_checkpoint(folder, best_by) if best_by else None
    for old in checkpoints(folder)[:-keep]:
        if old != best:
            # Renamed first: a checkpoint is never to be seen with a part of it gone.
            os.replace(old, old.with_suffix(PARTIAL))
            shutil.rmtree(old.with_suffix(PARTIAL))
    return path


def best_checkpoint(folder: str | Path, metric: str) -> Path | None:
    """The checkpoint where a metric is highest, the newest of several; None where none has it."""
    best, highest = None, -math.inf
    for path in checkpoints(folder):
        try:
            value = read_manifest(path).get("metrics", {}).get(metric, -math.inf)
        except ValueError:  # Damaged: nothing to go on from, however good it was.
            continue
        if value > -math.inf and value >= highest:
            best, highest = path, value
    return best


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
    way_out, manifest = _way_out(path), read_manifest(path)
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"checkpoint must be of version {VERSION}, got {manifest.get('version')} in {path}; "
            "end that run with the release of diffusion_rl that began it, or --restart to set it "
            "aside"
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
    return Snapshot(manifest["step"], files, manifest["metrics"])


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        ValueError: it is half-written or damaged.
    """
    if not (path / MANIFEST).is_file():
        raise ValueError(
            f"checkpoint must be complete, got no {MANIFEST} in {path}; {_way_out(path)}"
        )
    try:
        return dict(json.loads((path / MANIFEST).read_bytes()))
    except ValueError as error:
        raise ValueError(
            f"checkpoint must be complete, got a damaged {path / MANIFEST}; {_way_out(path)}"
        ) from error


def _way_out(path: Path) -> str:
    """The end of an error: what to go on from."""
    earlier = [str(other) for other in checkpoints(path.parent) if other != path]
    return f"delete {path} to go on from " + (earlier[-1] if earlier else "the start")


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
    """Wait until the disk has the folder's new name, where its file system can say so."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems flush files alone; the checkpoint is whole all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def random_state() -> dict[str, Any]:
    """This process's global dice, for rewards that draw; what the loop draws needs none."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    name, keys, *more = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *more],
    }


def set_random_state(saved: Mapping[str, Any]) -> None:
    """Put the dice of `random_state` back."""
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.device_count() == len(saved["cuda"]):
        torch.cuda.set_rng_state_all(saved["cuda"])
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *more = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *more))
