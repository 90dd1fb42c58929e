"""How many clips with planted faults one core makes in a second, with and without the codec.

    python -m benchmarks.synthesize --clips 24

The sources are clips of textured shapes that move over a textured ground (or files given by
--videos), 256x256 and 49 frames, so nothing is downloaded. Three rates, in processor time and on
the clock (a busy machine shows in their difference):

    plant     measure the motion and plant a fault: frames in, frames and a finding out
    edit      the edit without fault of the same clip, its motion known
    files     everything: decode a source, three clips written (faulty, clean, harmless) per take
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from cac_reward.batch import find_clips
from cac_reward.data.synthesis.faults import FAULTS
from cac_reward.data.synthesis.making import Source, SynthesisSettings, make_source
from cac_reward.data.synthesis.motion import Pixels, import_cv2, one_thread
from cac_reward.data.synthesis.planting import (
    PlantSettings,
    make_scene,
    plant_fault,
    plant_harmless,
)
from cac_reward.video import Video

FPS = 16.0


def moving_shapes(seed: int, frames: int, side: int) -> Pixels:
    """[F side side 3] three textured discs on their ways over a textured ground."""
    cv2 = import_cv2()
    random = np.random.default_rng(seed)
    ground = cv2.GaussianBlur(random.uniform(0, 255, (side, side, 3)).astype(np.float32), (0, 0), 3)
    ground = 110 + 4 * (ground - ground.mean())
    clip = np.repeat(ground[None], frames, axis=0)
    rows, columns = np.mgrid[:side, :side]
    for _ in range(3):
        radius = float(random.uniform(0.06, 0.13)) * side
        start, step = random.uniform(0.2, 0.8, 2) * side, random.uniform(-1.6, 1.6, 2)
        colour = random.uniform(30, 220, 3)
        size = 2 * side
        face = cv2.GaussianBlur(random.uniform(0, 255, (size, size)).astype(np.float32), (0, 0), 2)
        face = 5 * (face - face.mean())
        for frame in range(frames):
            x, y = start + step * frame
            inside = (columns - x) ** 2 + (rows - y) ** 2 < radius**2
            across = (columns[inside] - round(x)) % size, (rows[inside] - round(y)) % size
            clip[frame][inside] = colour + face[across[1], across[0]][:, None]
    return clip.clip(0, 255).astype(np.uint8)


def measured(action: Callable[[], int]) -> dict[str, float]:
    """Clips per second of what returns their number."""
    processor, clock = time.process_time(), time.perf_counter()
    count = action()
    processor, clock = time.process_time() - processor, time.perf_counter() - clock
    return {
        "clips": count,
        "clips_per_cpu_second": round(count / processor, 2),
        "clips_per_second": round(count / clock, 2),
    }


def sources_of(options: argparse.Namespace, folder: Path) -> Iterator[Source]:
    """Files to read: given ones, or moving shapes."""
    if options.videos is not None:
        for clip in find_clips([options.videos])[: options.clips]:
            yield Source(clip.path, clip.name)
        return
    for number in range(options.clips):
        path = folder / f"{number}.mp4"
        frames = torch.from_numpy(moving_shapes(number, options.frames, options.side))
        Video(frames.permute(0, 3, 1, 2), FPS).save(path)
        yield Source(str(path), path.name)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """All rates."""
    settings = SynthesisSettings(
        num_frames=options.frames, longest_side=options.side, preset=options.preset
    )
    sources = list(sources_of(options, folder))
    clips = []
    for source in sources:
        video = Video.decode(source.path, longest_side=options.side)
        frames = video.frames[: options.frames].permute(0, 2, 3, 1)
        clips.append(np.ascontiguousarray(frames[:, : video.height // 2 * 2].numpy()))
    scene = make_scene(clips[0], FPS)
    # OpenCV makes its colour tables on first use.
    for name in FAULTS:
        with suppress(ValueError):
            plant_fault(scene, PlantSettings(faults=(name,)), np.random.default_rng(0))

    def plant() -> int:
        for number, clip in enumerate(clips):
            plant_fault(make_scene(clip, FPS), PlantSettings(), np.random.default_rng(number))
        return len(clips)

    def edit() -> int:
        for number in range(len(clips)):
            plant_harmless(scene, PlantSettings(), np.random.default_rng(number))
        return len(clips)

    def files() -> int:
        (folder / "out" / "clips").mkdir(parents=True)
        return sum(len(make_source(one, folder / "out", settings).clips) for one in sources)

    with one_thread():
        return {one.__name__: measured(one) for one in (plant, edit, files)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synthesize", description=__doc__)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--preset", default=SynthesisSettings().preset, help="x264's")
    parser.add_argument("--videos", type=Path, metavar="DIR", help="instead of moving shapes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
