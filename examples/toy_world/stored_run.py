"""Runs made beforehand, shown beside the demo's own: curves, numbers and a few tiny videos.

`make toy-checkpoints` writes them to `stored_runs/*.json`. Legend: F frames, H height, W width.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion_rl.tracking import read_metrics

SCHEMA_VERSION = 2
FOLDER = Path(__file__).with_name("stored_runs")
CURVES = ("step", "seconds", "videos_generated", "reward", "penalty", "kl")
CURVE_PREFIXES = ("rewards/", "guards/")
"""What is kept of a metrics.jsonl: these names, and every name that begins so."""


@dataclass(frozen=True)
class StoredPair:
    """The same prompt and noise before and after."""

    prompt: str
    base: Tensor
    """[F 3 H W] uint8."""
    tuned: Tensor
    """[F 3 H W] uint8."""


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """What the report shows of a run it did not make."""

    name: str
    """File name without its ending."""
    algorithm: str
    """Row of the table."""
    config: str
    """The YAML that made it."""
    machine: str
    """Where it was made."""
    made_with: str
    """Digest of the weights of generator and judge, and of the YAML."""
    updates: int
    training_seconds: float
    videos_generated: int
    curves: Mapping[str, Sequence[float | None]]
    """Metric's name to one value for each update."""
    base: Mapping[str, float]
    """Numbers as in summary.json."""
    tuned: Mapping[str, float]
    base_faults: Mapping[str, float]
    """Share of videos with each type of fault."""
    tuned_faults: Mapping[str, float]
    fps: float
    """Of the videos."""
    pairs: Sequence[StoredPair] = ()


def read_curves(metrics: Path) -> dict[str, list[float | None]]:
    """The curves worth keeping of a metrics.jsonl, four significant digits each."""
    lines = read_metrics(metrics)
    names = [
        name
        for name in (lines[0] if lines else {})
        if name in CURVES or name.startswith(CURVE_PREFIXES)
    ]
    return {name: [_short(line.get(name)) for line in lines] for name in names}


def save_stored_run(run: StoredRun, folder: Path = FOLDER) -> Path:
    """Write `<name>.json`, whole or not at all."""
    record = {entry.name: getattr(run, entry.name) for entry in dataclasses.fields(run)}
    record["pairs"] = [
        {"prompt": pair.prompt, "base": pack_video(pair.base), "tuned": pack_video(pair.tuned)}
        for pair in run.pairs
    ]
    path = folder / f"{run.name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    text = json.dumps(_finite({"schema_version": SCHEMA_VERSION, **record}), allow_nan=False)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def load_stored_run(name: str, folder: Path = FOLDER) -> StoredRun | None:
    """Read a stored run, or None where there is none.

    Raises:
        ValueError: The file is not what `save_stored_run` writes.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError("it is of another version")
        pairs = [
            StoredPair(one["prompt"], unpack_video(one["base"]), unpack_video(one["tuned"]))
            for one in record.pop("pairs")
        ]
        return StoredRun(**record, pairs=pairs)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(
            f"stored run must be as make toy-checkpoints writes it, got {path}: {error}; "
            "delete it or restore it with git"
        ) from error


def pack_video(video: Tensor) -> dict[str, Any]:
    """A video [F 3 H W] uint8 as text: its frames one below the other in a lossless picture."""
    frames, _, height, width = video.shape
    tower = video.permute(0, 2, 3, 1).reshape(frames * height, width, 3).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(tower).save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return {"frames": frames, "webp": base64.b64encode(buffer.getvalue()).decode("ascii")}


def unpack_video(packed: Mapping[str, Any]) -> Tensor:
    """What `pack_video` packed."""
    with Image.open(io.BytesIO(base64.b64decode(packed["webp"]))) as picture:
        pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        width, height = picture.size
    frames = int(packed["frames"])
    video = pixels.reshape(frames, height // frames, width, 3)
    return video.permute(0, 3, 1, 2).contiguous()


def digest(*places: Path) -> str:
    """Short fingerprint of weights in checkpoint folders, and of YAML files without comments."""
    fingerprint = hashlib.sha256()
    for place in places:
        if place.is_file():
            lines = place.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if not line.startswith("#")]
            fingerprint.update("\n".join(kept).encode())
        for path in sorted(place.rglob("*.safetensors")):
            fingerprint.update(f"{path.relative_to(place)}\0".encode() + path.read_bytes())
    return fingerprint.hexdigest()[:12]


def _short(value: Any) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _finite(value: Any) -> Any:
    """JSON without NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
