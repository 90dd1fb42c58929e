"""ShanghaiTech Campus: a mask per frame (test_frame_mask) or per pixel (test_pixel_mask), as .npy.

A frame mask is [F] of 0 and 1; a pixel mask is [F H W], whose connected areas become the boxes of
their frame. The data set names no kinds of anomaly.

Axes: F frames, H height, W width.

Source: https://svip-lab.github.io/dataset/campus_dataset.html (arXiv:1712.09867), 24 frames a
second.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.importers.base import ImportSettings, Outcome, in_column, read_entries
from cac_reward.report import UNSPECIFIED, Box, Finding, TimeWindow


def read_shanghaitech(path: Path, settings: ImportSettings) -> Iterator[Outcome]:
    """One mask, or every mask of a folder in the order of their names.

    Raises:
        ValueError: If a folder holds none.
    """
    masks = sorted(path.glob("*.npy")) if path.is_dir() else [path]
    if not masks:
        raise ValueError(f"folder must hold masks (.npy), got none in {path}")
    for mask in masks:
        yield from read_entries(mask, [(None, mask)], partial(_clip, settings=settings))


def _clip(path: Path, settings: ImportSettings) -> AnnotatedClip:
    mask = _mask(path)
    fields = settings.clip(path.stem)
    fps = fields["fps"]
    if fps is None:
        raise ValueError(
            "fps must be known to turn frames into seconds, got none; give it or videos"
        )
    fields["duration_seconds"] = len(mask) / fps
    if mask.ndim == 3:
        fields["height"], fields["width"] = mask.shape[1:]
    findings = []
    for first, stop in _runs(mask):
        # Frame f is on screen from f / fps on; a box stands at that moment.
        boxes = [
            Box(frame / fps, *corners)
            for frame in range(first, stop)
            if mask.ndim == 3
            for corners in _areas(mask[frame])
        ]
        findings.append(Finding(UNSPECIFIED, TimeWindow(first / fps, stop / fps), tuple(boxes)))
    return AnnotatedClip(
        **fields,
        source="shanghaitech",
        source_video=f"shanghaitech/{path.stem}",
        split="test" if settings.split is None else settings.split,
        verdict="anomalous" if findings else "clean",
        findings=tuple(findings),
    )


def _mask(path: Path) -> np.ndarray[Any, Any]:
    """[F] or [F H W] of 0 and 1; mapped, so that only what is looked at is read."""
    try:
        mask = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"mask must be a .npy of numbers, without pickles, got: {error}"
        ) from error
    if not isinstance(mask, np.ndarray) or mask.ndim not in (1, 3) or 0 in mask.shape:
        shape = mask.shape if isinstance(mask, np.ndarray) else type(mask).__name__
        raise ValueError(f"mask must be [frames] or [frames, height, width], got {shape}")
    if mask.dtype.kind not in "biuf":
        raise ValueError(f"mask must hold numbers, got {mask.dtype}")
    for frame in range(len(mask)):
        row = mask[frame]
        if not np.isin(row, (0, 1)).all():
            with in_column(f"frame {frame}"):
                odd = np.asarray(row)[~np.isin(row, (0, 1))].flat[0]
                raise ValueError(f"mask must be of 0 and 1, got {odd}")
    return mask


def _runs(mask: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """First frame and frame behind the last of each stretch with a mark."""
    marked = [bool(np.any(mask[frame])) for frame in range(len(mask))]
    edges = np.flatnonzero(np.diff([False, *marked, False]))
    return [(int(first), int(stop)) for first, stop in edges.reshape(-1, 2)]


def _areas(frame: np.ndarray[Any, Any]) -> Iterator[tuple[float, float, float, float]]:
    """Corners of each connected area, relative to the frame."""
    height, width = frame.shape
    labels, _ = ndimage.label(frame, structure=np.ones((3, 3)))
    for rows, columns in ndimage.find_objects(labels):
        yield (
            columns.start / width,
            rows.start / height,
            columns.stop / width,
            rows.stop / height,
        )
