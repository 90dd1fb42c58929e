"""The video of an annotated clip, wherever it is: a file, a folder of frames, a sample of a shard.

Axes: F frames, H height, W width.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.shards import is_compressed, read_shard, shard_places
from cac_reward.video import Video, VideoLimits

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Suffixes of frames in a folder."""


def open_video(clip: AnnotatedClip, root: str | os.PathLike[str]) -> Video:
    """Decode a clip's video.

    Args:
        clip: its `path` is a file, a folder of frames in the order of the numbers in their names
            (then `fps` must be known), or with `key` a shard.
        root: of relative paths.

    Raises:
        FileNotFoundError: If the video, or the sample of its shard, is missing.
        ValueError: If it is no readable video, or a folder's clip has no rate.
    """
    place = Path(root) / clip.path
    if clip.key is not None:
        return Video.decode(io.BytesIO(read_packed(place, clip.key)), fps=clip.fps)
    if place.is_dir():
        return _join(place, clip.fps)
    return Video.decode(place, fps=clip.fps)


def read_packed(shard: Path, key: str) -> bytes:
    """The video's bytes of one sample.

    Where samples begin is read once for each shard, so that drawing at random from a large one
    costs a seek; a compressed shard can only be read from the front.

    Raises:
        FileNotFoundError: If the shard or the sample is missing.
        ValueError: If it is no whole tar file, or the sample holds not one video.
    """
    if not shard.is_file():
        raise FileNotFoundError(f"shard must be an existing file, got {shard}")
    state = shard.stat()
    state = shard.stat()
    places = _places(shard, state.st_size, state.st_mtime_ns)
    members: Mapping[str, object] | None
    if places is None:
        members = next((one.members for one in read_shard(shard) if one.key == key), None)
        packed = [data for suffix, data in (members or {}).items() if suffix != "json"]
    else:
        members = places.get(key)
        with shard.open("rb") as opened:
            packed = [
                _read(opened, *where)
                for suffix, where in places.get(key, {}).items()
                if suffix != "json"
            ]
    if members is None:
        raise FileNotFoundError(f"shard must hold the sample {key!r}, got none in {shard}")
    if len(packed) != 1:
        raise ValueError(f"sample {key!r} must hold one video, got {len(packed)} in {shard}")
    return packed[0]


@lru_cache(maxsize=64)
def _places(shard: Path, size: int, changed: int) -> dict[str, dict[str, tuple[int, int]]] | None:
    """As `shard_places`, once for each state of a file; None for a compressed shard."""
    return None if is_compressed(shard) else shard_places(shard)


def _read(opened: io.BufferedReader, begin: int, length: int) -> bytes:
    opened.seek(begin)
    return opened.read(length)


def frame_files(folder: Path) -> list[Path]:
    """Frames of a folder in the order of a clip."""
    found = (one for one in folder.iterdir() if one.suffix.lower() in PICTURES and one.is_file())
    return sorted(found, key=lambda one: frame_order(one.name))


def frame_order(name: str) -> list[int | str]:
    """What frames are sorted by: the numbers in their names, and what is between them."""
    return [int(part) if part.isdigit() else part for part in _parts(name)]


def _join(folder: Path, fps: float | None) -> Video:
    """Frames of a folder as a clip."""
    if fps is None:
        raise ValueError(f"fps must be given for a folder of frames, got none for {folder}")
    files = frame_files(folder)
    if len(files) < 2:
        raise ValueError(
            f"folder must hold at least 2 frames ({', '.join(PICTURES)}), got {len(files)} in "
            f"{folder}"
        )
    frames = None
    for number, file in enumerate(files):
        with Image.open(file) as picture:
            if frames is None:
                VideoLimits().check(str(folder), len(files), picture.height, picture.width)
                frames = torch.empty(
                    (len(files), 3, picture.height, picture.width), dtype=torch.uint8
                )
            if picture.size != (frames.shape[3], frames.shape[2]):
                raise ValueError(
                    f"frames must be of one size, got {frames.shape[3]}x{frames.shape[2]} and "
                    f"{picture.width}x{picture.height} in {file}"
                )
            pixels = torch.from_numpy(np.array(picture.convert("RGB")))
        frames[number] = pixels.permute(2, 0, 1)
    assert frames is not None
    return Video(frames, fps, str(folder))


def _parts(name: str) -> list[str]:
    """Digits and what is between them, beginning with what is no digit, maybe nothing."""
    return re.split(r"(\d+)", name)
