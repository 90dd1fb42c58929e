"""One source clip becomes files: with faults, without, and with edits that are none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.synthesis.motion import Pixels, one_thread
from cac_reward.data.synthesis.planting import (
    PlantSettings,
    make_scene,
    plant_fault,
    plant_harmless,
)
from cac_reward.report import Finding
from cac_reward.video import Video
from cac_reward.whole_files import whole_file

CLIPS_FOLDER = "clips"
FAULTY, CLEAN, HARMLESS = "faulty", "clean", "harmless"
"""What a written clip is; the last two have no fault."""

_PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow")


@dataclass(frozen=True, kw_only=True)
class SynthesisSettings:
    """What decides the output, together with the sources."""

    seed: int = 0
    """The same seed, settings and sources make the same files."""
    takes: int = 1
    """Faults for each source, each with a clean and a harmlessly edited counterpart."""
    num_frames: int | None = None
    """Most frames of a clip: a stretch drawn at random from each source; None takes the whole."""
    longest_side: int | None = None
    """Pixels to which larger sources are shrunk; None keeps their size."""
    crf: tuple[int, int] = (18, 28)
    """Range of x264's quality; all clips of a take have the same, drawn at random."""
    preset: str = "veryfast"
    """x264's effort."""
    split: str | None = None
    """Of every clip, for example 'train'."""
    planting: PlantSettings = field(default_factory=PlantSettings)

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("takes", 1), ("num_frames", 8), ("longest_side", 32)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= self.crf[0] <= self.crf[1] <= 51:
            raise ValueError(f"crf must be 0 <= best <= worst <= 51, got {self.crf}")
        if self.preset not in _PRESETS:
            raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {self.preset}")

    def to_json(self) -> str:
        """What a folder of output remembers, to go on with the same."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)


@dataclass(frozen=True)
class Source:
    """A clean clip."""

    path: str
    """Where it is."""
    name: str
    """What the random choices and the files' names depend on."""
    prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """What became of one source."""

    name: str
    num_bytes: int
    """Of the source file; 0 where there is none."""
    clips: tuple[AnnotatedClip, ...] = ()
    failures: tuple[str, ...] = ()
    """Why the source, or some of its takes, gave no clips."""

    def to_json(self) -> str:
        """One line that `from_json` reads back."""
        plain = {
            "name": self.name,
            "num_bytes": self.num_bytes,
            "clips": [clip.to_dict() for clip in self.clips],
            "failures": list(self.failures),
        }
        return json.dumps(plain, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> SourceRecord:
        """Read what `to_json` wrote.

        Raises:
            ValueError: If it is no such line.
        """
        plain = json.loads(line)
        if not isinstance(plain, Mapping) or set(plain) != set(cls.__dataclass_fields__):
            raise ValueError(f"line must be what became of a source, got {line[:80]!r}")
        return cls(
            name=str(plain["name"]),
            num_bytes=int(plain["num_bytes"]),
            clips=tuple(AnnotatedClip.from_dict(clip) for clip in plain["clips"]),
            failures=tuple(map(str, plain["failures"])),
        )


def make_source(source: Source, output: Path, settings: SynthesisSettings) -> SourceRecord:
    """Decode a source and write the clips of all its takes, each whole or not at all.

    A source that cannot be read, or a take for which no fault can be planted, is a failure in the
    record, not an error.

    Args:
        source: The clean clip.
        output: Folder; the clips go into its folder `clips`.
        settings: What to make.
    """
    path = Path(source.path)
    size = path.stat().st_size if path.is_file() else 0
    try:
        video = Video.decode(path, longest_side=settings.longest_side)
    except (ValueError, OSError) as error:
        return SourceRecord(name=source.name, num_bytes=size, failures=(str(error),))
    frames = np.ascontiguousarray(video.frames.permute(0, 2, 3, 1).numpy())
    # 4:2:0 halves the colour, so sides must be even.
    frames = frames[:, : video.height // 2 * 2, : video.width // 2 * 2]
    clips: list[AnnotatedClip] = []
    failures: list[str] = []
    with one_thread():
        for take in range(settings.takes):
            try:
                clips += _make_take(source, frames, video.fps, take, output, settings)
            except ValueError as error:
                where = f"take {take}: " if settings.takes > 1 else ""
                failures.append(f"{where}{error}")
    return SourceRecord(
        name=source.name, num_bytes=size, clips=tuple(clips), failures=tuple(failures)
    )


def random_for(seed: int, name: str, take: int) -> np.random.Generator:
    """The random numbers of one take: other sources and workers have no say in them."""
    digest = hashlib.sha256(f"{seed}/{take}/{name}".encode("utf-8", "surrogateescape")).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _make_take(
    source: Source,
    frames: Pixels,
    fps: float,
    take: int,
    output: Path,
    settings: SynthesisSettings,
) -> list[AnnotatedClip]:
    """Plant, edit, write and describe."""
    random = random_for(settings.seed, source.name, take)
    wanted = min(len(frames), settings.num_frames or len(frames))
    first = int(random.integers(0, len(frames) - wanted + 1))
    crf = int(random.integers(settings.crf[0], settings.crf[1] + 1))
    scene = make_scene(np.ascontiguousarray(frames[first : first + wanted]), fps)
    planted = plant_fault(scene, settings.planting, random)
    edit, edited = plant_harmless(scene, settings.planting, random)
    stem = f"{Path(source.name).stem[:80]}-{_digest(source.name)}-{take:03d}"
    made: list[tuple[str, Pixels, str, Sequence[Finding]]] = [
        (FAULTY, planted.frames, planted.name, [planted.finding]),
        (CLEAN, planted.clean, "none", []),
        (HARMLESS, edited, edit, []),
    ]
    clips = []
    for kind, pixels, what, findings in made:
        name = f"{CLIPS_FOLDER}/{stem}-{kind}.mp4"
        video = Video(torch.from_numpy(pixels).permute(0, 3, 1, 2), fps, name)
        with whole_file(output / name, "wb") as opened:
            opened.write(video.encode(crf=crf, preset=settings.preset, threads=1))
        clips.append(
            AnnotatedClip(
                path=name,
                source="synthesis",
                source_video=source.name,
                split=settings.split,
                prompt=source.prompt,
                fps=fps,
                duration_seconds=len(pixels) / fps,
                width=video.width,
                height=video.height,
                verdict="anomalous" if findings else "clean",
                category=kind,
                findings=tuple(findings),
                extra={
                    "edit": what,
                    "take": f"{stem}",
                    "first_frame": str(first),
                    "crf": str(crf),
                },
            )
        )
    return clips


def _digest(name: str) -> str:
    """Tells sources apart whose files are called alike."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
