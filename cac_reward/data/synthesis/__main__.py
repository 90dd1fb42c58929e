"""The command `cac-reward synthesize`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from cac_reward.batch import PROMPT_FORMATS, find_clips, in_shard, read_prompts
from cac_reward.data.storage import read_annotations
from cac_reward.data.synthesis.faults import FAULTS
from cac_reward.data.synthesis.making import Source, SourceRecord, SynthesisSettings
from cac_reward.data.synthesis.motion import import_cv2
from cac_reward.data.synthesis.planting import PlantSettings
from cac_reward.data.synthesis.running import ANNOTATIONS, SKIPPED, finish, synthesize
from cac_reward.data.synthesis.sheet import write_sheet

LEFT_OUT = 3
"""Exit status where sources or takes were left out."""
STOPPED = 130
"""Exit status after Ctrl-C."""


def add_synthesize_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    default, planting = SynthesisSettings(), PlantSettings()
    parser.description = (
        "Plant faults with exact windows and boxes into clean clips. Each take gives three clips "
        "through the same codec: with the fault, clean, and with an edit that is no fault. The "
        "same command goes on where it stopped."
    )
    parser.epilog = f"faults: {', '.join(FAULTS)}"
    parser.add_argument("clips", type=Path, nargs="+", metavar="CLIP", help="clean clip or folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="made if missing")
    parser.add_argument("--seed", type=int, default=default.seed, help="(default: 0)")
    parser.add_argument("--takes", type=int, default=default.takes, help="of each clip (1)")
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="share of the clips, 1 to N")
    parser.add_argument(
        "--faults", default=",".join(planting.faults), metavar="A,B", help="(default: all)"
    )
    parser.add_argument("--frames", type=int, metavar="N", help="stretch of each clip (the whole)")
    parser.add_argument("--longest-side", type=int, metavar="PIXELS", help="shrink larger clips")
    parser.add_argument(
        "--window-seconds",
        type=float,
        nargs=2,
        default=planting.window_seconds,
        metavar=("SHORTEST", "LONGEST"),
        help="length of a fault",
    )
    parser.add_argument(
        "--area",
        type=float,
        nargs=2,
        default=planting.area,
        metavar=("LEAST", "MOST"),
        help="share of the frame that the moving region has",
    )
    parser.add_argument(
        "--crf", type=int, nargs=2, default=default.crf, metavar=("BEST", "WORST"), help="x264's"
    )
    parser.add_argument("--preset", default=default.preset, help=f"x264's ({default.preset})")
    parser.add_argument("--split", help="for example train")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help=f"of the clips: {', '.join(PROMPT_FORMATS)}"
    )
    parser.add_argument("--sheet", type=Path, metavar="OUT.html", help="write a contact sheet")
    parser.add_argument("--examples", type=int, default=6, help="of each fault in the sheet (6)")
    parser.set_defaults(run=run_synthesize)


def run_synthesize(options: argparse.Namespace) -> int:
    """Make, write the annotations, and say what was left out."""
    import_cv2()
    settings = SynthesisSettings(
        seed=options.seed,
        takes=options.takes,
        num_frames=options.frames,
        longest_side=options.longest_side,
        crf=tuple(options.crf),
        preset=options.preset,
        split=options.split,
        planting=PlantSettings(
            faults=tuple(one.strip() for one in options.faults.split(",")),
            window_seconds=tuple(options.window_seconds),
            area=tuple(options.area),
        ),
    )
    if options.sheet is not None and not options.sheet.resolve().parent.is_dir():
        raise FileNotFoundError(f"folder of {options.sheet} must exist; make it first")
    sources = _sources(options)
    logging.getLogger("libav").setLevel(logging.CRITICAL)
    try:
        counts = _make(sources, options, settings)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on in {options.output}", file=sys.stderr)
        return STOPPED
    clips, left_out = finish(sources, options.output)
    faults = ", ".join(f"{counts[name]} {name}" for name in FAULTS if counts[name])
    print(f"{clips} clips ({faults or 'no fault'}): {options.output / ANNOTATIONS}")
    if options.sheet is not None:
        annotated = list(read_annotations(options.output / ANNOTATIONS))
        write_sheet(options.sheet, annotated, options.output, examples=options.examples)
        print(f"sheet: {options.sheet}")
    if left_out:
        where = options.output / SKIPPED
        print(f"{left_out} left out, named above and in {where}", file=sys.stderr)
    return LEFT_OUT if left_out else 0


def _sources(options: argparse.Namespace) -> list[Source]:
    """The clips of this shard with their prompts."""
    clips = find_clips(options.clips)
    prompts = {} if options.prompts is None else read_prompts(options.prompts, clips)
    shard, _, shards = options.shard.partition("/")
    if not (shard.isdecimal() and shards.isdecimal()):
        raise ValueError(f"shard must be K/N, got {options.shard!r}")
    return [
        Source(clip.path, clip.name, prompts.get(clip.name, ""))
        for clip in clips
        if in_shard(clip.name, int(shard), int(shards))
    ]


def _make(
    sources: Sequence[Source], options: argparse.Namespace, settings: SynthesisSettings
) -> Counter[str]:
    """Make what is not made yet, and say how far it is; counts faults by name."""
    # A log gets a line of its own every half minute, not a bar that is drawn over itself.
    pause = 0.1 if sys.stderr.isatty() else 30.0
    counts: Counter[str] = Counter()
    records = synthesize(sources, options.output, settings, options.workers)
    with tqdm(total=len(sources), unit="source", mininterval=pause, maxinterval=pause) as bar:
        for record in records:
            _count(record, counts)
            for reason in record.failures:
                bar.write(f"left out: {record.name}: {reason}", file=sys.stderr)
            bar.update()
    return counts


def _count(record: SourceRecord, counts: Counter[str]) -> None:
    counts.update(clip.extra["edit"] for clip in record.clips if clip.findings)
