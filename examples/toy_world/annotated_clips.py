"""Toy clips as files with annotations: what `cac-reward train` learns the toy judge from.

`python -m examples.toy_world.annotated_clips --output runs/toy_clips` writes lossless videos and
annotation files. For training: `rendered.jsonl` straight from the renderer, `redrawn.jsonl` through
the autoencoder and partly redrawn by the toy generator (from a bank of such clips), `mixed.jsonl`
with small objects and short faults, `reflected.jsonl` the same with first answers that are looked
back at. `held_out*.jsonl` are of prompts and seeds never trained on.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from tqdm import tqdm

from cac_reward.data.annotations import AnnotatedClip, Caption
from cac_reward.data.storage import annotation_writer, read_annotations
from cac_reward.report import Box, Finding, TimeWindow
from cac_reward.training.lesson_kinds import SHOWS_PROMPT
from cac_reward.training.task_answers import write_glue
from cac_reward.whole_files import whole_file
from examples.toy_world import judge_bank
from examples.toy_world.scales import SCALES, Scale
from examples.toy_world.training_state import EVALUATION_SEED, render_batch
from examples.toy_world.world import (
    COLOURS,
    MOTIONS,
    SHAPES,
    Clip,
    PlantedFault,
    render_clip,
    sample_prompts,
    write_prompt,
)

STAGE = 3
MIXED_STAGE = 5
REFLECTED_SALT = 5
HELD_OUT_SEED = EVALUATION_SEED + 500_000_000
WHY = {
    "vanish": "vanishes",
    "teleport": "jumps",
    "recolour": "changes colour",
    "deform": "changes shape",
    "duplicate": "is there twice",
    "freeze": "stops",
    "flicker": "flickers",
}


@dataclass(frozen=True, eq=False)
class Rendition:
    """One clip as one file: what is true of it, and how it looks."""

    clip: Clip
    frames: np.ndarray
    """[F H W 3] uint8."""
    path: str
    prompt: str
    shows_prompt: bool


def snap(box: Sequence[float], grid: int) -> tuple[float, float, float, float]:
    """A relative box on a grid of pixels, at least one pixel wide and high."""
    low = [min(round(value * grid), grid - 1) for value in box[:2]]
    high = [max(round(value * grid), least + 1) for value, least in zip(box[2:], low, strict=True)]
    return (low[0] / grid, low[1] / grid, high[0] / grid, high[1] / grid)


def finding(fault: PlantedFault, grid: int) -> Finding:
    """A planted fault as annotations state it, with a box on each of its frames."""
    return Finding(
        fault.type,
        TimeWindow(*fault.window),
        tuple(Box(time, *snap(box, grid)) for time, box in fault.boxes),
        fault.severity,
        f"{fault.target} {WHY[fault.type]}",
    )


def captions(clip: Clip) -> tuple[Caption, ...]:
    """What is to be seen in each frame: colours, shapes and boxes, in the order of colours."""
    table = np.array(list(COLOURS.values()), float)
    names, grid = list(COLOURS), clip.frames.shape[1]
    found = []
    for frame in range(len(clip.frames)):
        seen = {}
        for track in reversed(clip.tracks):
            if track.alpha[frame] > 0.5:
                colour = int(np.abs(track.rgb[frame] - table).sum(1).argmin())
                box = [round(value * 1000) for value in snap(track.box(frame), grid)]
                seen[colour] = f"{names[colour]} {track.shape} {box}"
        text = "; ".join(seen[colour] for colour in sorted(seen)) or "nothing"
        window = TimeWindow(frame / clip.fps, (frame + 1) / clip.fps)
        found.append(Caption(window, text))
    return tuple(found)


def annotation(rendition: Rendition, split: str) -> AnnotatedClip:
    """Everything the renderer knows of a clip."""
    clip = rendition.clip
    return AnnotatedClip(
        path=rendition.path,
        source="toy_world",
        source_video=f"seed {clip.seed}",
        split=split,
        prompt=rendition.prompt,
        fps=clip.fps,
        duration_seconds=len(clip.frames) / clip.fps,
        width=clip.frames.shape[2],
        height=clip.frames.shape[1],
        verdict="anomalous" if clip.faults else "clean",
        findings=tuple(finding(one, clip.frames.shape[1]) for one in clip.faults),
        captions=captions(clip),
        extra={SHOWS_PROMPT: "yes" if rendition.shows_prompt else "no"},
    )


def wrong_prompt(clip: Clip, random: np.random.Generator) -> str:
    """A prompt that is not true of the clip: another clip's, or its own with one thing changed.

    The first kind is easy and gets the question learnt, the second makes the answer careful.
    """
    if random.random() < 0.35:
        other = clip.prompt
        while other == clip.prompt:
            other = sample_prompts(1, int(random.integers(2**31)), "train")[0]
        return other
    objects = []
    for part in clip.prompt.split(" and a "):
        colour, shape, _, *motion = part.removeprefix("a ").split()
        objects.append((colour, shape, " ".join(motion)))
    at = int(random.integers(len(objects)))
    colour, shape, motion = objects[at]
    unused = [name for name in COLOURS if name not in {one for one, _, _ in objects}]
    change = random.random()
    if change < 0.3:
        colour = str(random.choice(unused))
    elif change < 0.6:
        shape = str(random.choice([name for name in SHAPES if name != shape]))
    elif change < 0.9 or len(objects) == 3:
        motion = str(random.choice([name for name in MOTIONS if name != motion]))
    else:
        new = (str(random.choice(unused)), str(random.choice(SHAPES)), str(random.choice(MOTIONS)))
        return write_prompt([*objects, new])
    objects[at] = (colour, shape, motion)
    return write_prompt(objects)


def rendition(clip: Clip, frames: np.ndarray, path: str, salt: int) -> Rendition:
    """A clip with its own prompt or a wrong one, as its seed decides."""
    random = np.random.default_rng([clip.seed, salt])
    shown = bool(random.random() < 0.5)
    prompt = clip.prompt if shown else wrong_prompt(clip, random)
    return Rendition(clip, frames, path, prompt, shown)


def rendered(count: int, scale: Scale) -> Iterator[Rendition]:
    """Training clips straight from the renderer."""
    for number in range(count):
        clip = render_batch(STAGE, number, 1, scale.world)[0]
        yield rendition(clip, clip.frames, f"rendered/{number:06}.mkv", 0)


def redrawn(bank_file: Path) -> Iterator[Rendition]:
    """Training clips through the autoencoder, and through the generator where truth survived."""
    bank = torch.load(bank_file, weights_only=True, mmap=True)
    for number in range(len(bank["kept"])):
        clip = render_batch(judge_bank.STAGE, number, 1)[0]
        yield rendition(clip, bank["decoded"][number].numpy(), f"decoded/{number:06}.mkv", 1)
        if bank["kept"][number]:
            yield rendition(clip, bank["redrawn"][number].numpy(), f"redrawn/{number:06}.mkv", 2)


@dataclass(frozen=True)
class HeldOutSet:
    """Clips that training never sees, and what is unusual about them."""

    world: Mapping[str, Any] = field(default_factory=dict)
    """Settings that differ from the usual."""
    fault: str | None = None
    """The only type of fault; None for all that training knows."""


SMALL: Mapping[str, Any] = {"object_scale": 0.58, "fault_frames": 1}
"""Objects that cover under 5% of the area (their boxes 4% on average, at most 6%); faults of one
frame, but for stops (two) and jumps (the frames on both sides)."""
UNSEEN_FAULT = "deform"
"""The type that `mixed.jsonl` leaves out."""
HELD_OUT: dict[str, HeldOutSet] = {
    "held_out": HeldOutSet(),
    "held_out_small": HeldOutSet(SMALL),
    "held_out_colours": HeldOutSet({"hue_shift": 25.0}),
    "held_out_sizes": HeldOutSet({"object_scale": 0.75}),
    "held_out_speeds": HeldOutSet({"speed_scale": 1.6}),
    "held_out_faults": HeldOutSet(fault=UNSEEN_FAULT),
}


def mixed(count: int, scale: Scale) -> Iterator[Rendition]:
    """Training clips of which every other is of small objects with short faults.

    One type of fault never occurs, so that it can be asked of a judge that has not met it.
    """
    made = number = 0
    while made < count:
        settings = replace(scale.world, **(SMALL if made % 2 else {}))
        clip = render_batch(MIXED_STAGE, number, 1, settings)[0]
        number += 1
        if all(fault.type != UNSEEN_FAULT for fault in clip.faults):
            yield rendition(clip, clip.frames, f"mixed/{made:06}.mkv", 4)
            made += 1


def with_first_answer(clip: AnnotatedClip, random: np.random.Generator) -> AnnotatedClip:
    """A clip with a first answer as a judge in doubt gives it, and what is to be said of it.

    Half of them are right. Of clean clips the others name a fault; of broken ones half name none,
    and half have every window early or late.
    """
    true = tuple(sorted({one.window for one in clip.findings}))
    frames, fps = clip.num_frames, clip.fps
    assert frames is not None
    assert fps is not None
    first, said = true, "right"
    if random.random() < 0.5:
        shift = int(random.integers(1, 4))
        early = bool(random.random() < 0.5)
        if not true:
            start = int(random.integers(0, frames - shift + 1))
            first, said = (TimeWindow(start / fps, (start + shift) / fps),), "nothing is broken"
        elif random.random() < 0.5:
            first, said = (), "something is broken"
        else:
            moved = [shifted(one, -shift if early else shift, frames, fps) for one in true]
            first, said = tuple(sorted(set(moved))), "too early" if early else "too late"
            if first == true:  # At the end of the clip there is no room.
                said = "right"
    return replace(clip, first_answer=write_glue(first), reflection=said)


def shifted(window: TimeWindow, by: int, frames: int, fps: float) -> TimeWindow:
    """A window so many frames later, cut at the ends of the clip."""
    first = min(max(round(window.start_seconds * fps) + by, 0), frames - 1)
    last = min(max(round(window.end_seconds * fps) + by, first + 1), frames)
    return TimeWindow(first / fps, last / fps)


def write_reflected(output: Path) -> Path:
    """`reflected.jsonl`: the clips of `mixed.jsonl` with first answers that are looked back at."""
    file = output / "reflected.jsonl"
    with annotation_writer(file) as write:
        for number, clip in enumerate(read_annotations(output / "mixed.jsonl")):
            write(with_first_answer(clip, np.random.default_rng([REFLECTED_SALT, number])))
    return file


def held_out(name: str, count: int, scale: Scale) -> Iterator[Rendition]:
    """Clips of held-out prompts, from seeds of their own."""
    wanted = HELD_OUT[name]
    world = replace(scale.world, **wanted.world)
    made = number = 0
    while made < count:
        fault = wanted.fault if made % 2 else "none"
        clip = render_clip(
            HELD_OUT_SEED + number,
            world,
            split="evaluation",
            fault=None if wanted.fault is None else fault,
        )
        number += 1
        unmet = wanted.fault is None and name != "held_out"
        if unmet and any(one.type == UNSEEN_FAULT for one in clip.faults):
            continue
        yield rendition(clip, clip.frames, f"{name}/{made:06}.mkv", 3)
        made += 1


def encode(frames: np.ndarray, fps: float) -> bytes:
    """[F H W 3] uint8 as a lossless video (ffv1 in Matroska)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "bgr0"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def write_clips(output: Path, name: str, clips: Iterable[Rendition], total: int) -> Path:
    """Videos below `output` and `NAME.jsonl` beside them; videos that are there stay."""
    file = output / f"{name}.jsonl"
    split = "val" if name in HELD_OUT else "train"
    with annotation_writer(file) as write:
        for one in tqdm(clips, desc=name, total=total, unit="clip"):
            place = output / one.path
            if not place.is_file():
                place.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(place, "wb") as opened:
                    opened.write(encode(one.frames, one.clip.fps))
            write(annotation(one, split))
    return file


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the clips that toy judges learn from and are measured on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/toy_clips"))
    parser.add_argument(
        "--scale", choices=list(SCALES), default="small", help="size of the clips (small)"
    )
    parser.add_argument(
        "--sets",
        nargs="+",
        default=["rendered", "held_out"],
        choices=["rendered", "mixed", "reflected", "redrawn", *HELD_OUT],
        metavar="NAME",
        help=f"some of rendered, mixed, reflected (after mixed), redrawn, {', '.join(HELD_OUT)} "
        "(rendered, held_out)",
    )
    parser.add_argument("--count", type=int, default=24_000, help="of each training set (24,000)")
    parser.add_argument("--held-out", type=int, default=512, help="of each held-out set (512)")
    parser.add_argument("--bank", type=Path, help="of judge_bank, which redrawn needs")
    options = parser.parse_args(arguments)
    if "redrawn" in options.sets and options.scale != "small":
        parser.error(
            "--scale must be small for the set 'redrawn': the toy generator draws no other"
        )
    if "redrawn" in options.sets and options.bank is None:
        parser.error("--bank must name the bank of judge_bank for the set 'redrawn'")
    options.output.mkdir(parents=True, exist_ok=True)
    scale = SCALES[options.scale]
    for name in options.sets:
        if name == "redrawn":
            write_clips(options.output, name, redrawn(options.bank), judge_bank.BANK * 2)
        elif name == "reflected":
            write_reflected(options.output)
        elif name in HELD_OUT:
            clips = held_out(name, options.held_out, scale)
            write_clips(options.output, name, clips, options.held_out)
        else:
            draw = rendered if name == "rendered" else mixed
            write_clips(options.output, name, draw(options.count, scale), options.count)


if __name__ == "__main__":
    main()
