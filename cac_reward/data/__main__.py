"""The commands below `cac-reward annotate`; also `python -m cac_reward.data`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.checking import check_annotations, format_report
from cac_reward.data.importers.base import ImportSettings, Problem, VideoFolder
from cac_reward.data.importing import IMPORTERS, import_annotations
from cac_reward.data.shards import ShardLimits
from cac_reward.data.storage import (
    SUFFIXES,
    annotation_writer,
    iterate_records,
    upgraded_annotations,
)
from cac_reward.data.teaching.__main__ import add_teach_arguments
from cac_reward.judges.base import JudgeUnreachableError

FAULTS = 3
"""Exit status where entries were left out, or a check has found faults."""

Item = TypeVar("Item")


def add_annotate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands below `annotate`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_import(commands)
    check = commands.add_parser("check", help="say what a file of annotations holds and lacks")
    check.add_argument("file", type=Path, metavar="FILE", help=f"{', '.join(SUFFIXES)} or a folder")
    where = check.add_mutually_exclusive_group()
    where.add_argument(
        "--videos",
        type=Path,
        metavar="DIR",
        help="root of the clips' paths (default: the file's folder; none for shards)",
    )
    where.add_argument("--no-files", action="store_true", help="do not look for the videos")
    check.add_argument("--show", type=int, default=20, metavar="N", help="faults to list (20)")
    check.add_argument("--json", action="store_true", help="print JSON instead of a table")
    check.set_defaults(run=_check)
    convert = commands.add_parser(
        "convert",
        help="write annotations anew: from an older schema version, or as another kind of file",
    )
    convert.add_argument("file", type=Path, metavar="FILE", help="what to read")
    convert.add_argument("--output", type=Path, required=True, metavar="OUT", help="what to write")
    convert.add_argument("--videos", type=Path, metavar="DIR", help="pack the videos into shards")
    convert.add_argument("--max-clips", type=int, metavar="N", help="of a shard (1000)")
    convert.set_defaults(run=_convert)
    teach = commands.add_parser("teach", help="have a chat model write the reasoning of clips")
    add_teach_arguments(teach)


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    reads = "\n".join(f"  {name:17} {one.reads}" for name, one in IMPORTERS.items())
    command = commands.add_parser(
        "import",
        help="read the annotations of other projects and tools",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"formats:\n{reads}",
    )
    command.add_argument("format", choices=IMPORTERS, metavar="FORMAT", help="see below")
    command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="as published")
    command.add_argument("--output", type=Path, required=True, metavar="OUT.jsonl")
    command.add_argument("--videos", type=Path, metavar="DIR", help="fill in rate, length and size")
    command.add_argument("--fps", type=float, help="rate, where frames are counted")
    command.add_argument("--split", help="instead of what the file says")
    command.add_argument(
        "--sentences", type=Path, nargs="+", default=(), metavar="FILE", help="UCA's, for ucf_crime"
    )
    command.add_argument("--path", help="video of the clip, for a file that CVAT wrote")
    command.add_argument(
        "--empty-is-clean", action="store_true", help="cvat, coco: nothing marked means clean"
    )
    command.set_defaults(run=_import)


def _import(options: argparse.Namespace) -> int:
    """Write what can be imported and name the rest; exits with 3 where there is a rest."""
    settings = ImportSettings(
        fps=options.fps,
        videos=None if options.videos is None else VideoFolder(options.videos),
        split=options.split,
        sentences=tuple(options.sentences),
        path=options.path,
        empty_is_clean=options.empty_is_clean,
    )
    outcomes = import_annotations(options.format, options.files, settings)
    counts: Counter[str] = Counter()
    with annotation_writer(_output(options.output)) as write:
        for outcome in _progress(outcomes):
            if isinstance(outcome, Problem):
                counts["left out"] += 1
                _say(f"left out: {outcome}")
                continue
            write(outcome)
            counts.update(_features(outcome))
    words = ", ".join(f"{counts[name]:,} {name}" for name in _FEATURES if counts[name])
    print(f"{counts['clips']:,} clips{f' ({words})' if words else ''}: {options.output}")
    if counts["left out"]:
        print(f"{counts['left out']:,} left out, named above", file=sys.stderr)
    return FAULTS if counts["left out"] else 0


_FEATURES = (
    *("clean", "anomalous", "without verdict", "with windows", "anomalous without windows"),
    *("with boxes", "with question", "with captions", "of known length"),
)


def _features(clip: AnnotatedClip) -> Iterator[str]:
    yield "clips"
    yield clip.verdict or "without verdict"
    for name, holds in (
        ("with windows", clip.findings),
        ("anomalous without windows", clip.verdict == "anomalous" and not clip.findings),
        ("with boxes", any(finding.boxes for finding in clip.findings)),
        ("with question", clip.question is not None),
        ("with captions", clip.captions),
        ("of known length", clip.duration_seconds is not None),
    ):
        if holds:
            yield name


def _check(options: argparse.Namespace) -> int:
    """Print the report; exits with 3 where there are faults."""
    videos = options.videos
    in_shards = any(one.suffix == ".tar" for one in (options.file, *_inside(options.file)))
    if videos is None and not options.no_files and not in_shards:
        videos = options.file if options.file.is_dir() else options.file.parent
    if options.show < 0:
        raise ValueError(f"show must be at least 0, got {options.show}")
    records = _progress(iterate_records(options.file))
    report = check_annotations(options.file, records, videos=videos, keep=options.show)
    print(json.dumps(report.to_dict(), indent=1) if options.json else format_report(report))
    return FAULTS if report.has_faults else 0


def _convert(options: argparse.Namespace) -> int:
    limits = (
        ShardLimits() if options.max_clips is None else ShardLimits(max_clips=options.max_clips)
    )
    if options.max_clips is not None and options.output.suffix != ".tar":
        raise ValueError(
            f"max_clips must be left out unless shards are written, got {options.output}"
        )
    if options.output.resolve() == options.file.resolve():
        raise ValueError(
            f"output must be another file than the one that is read, got {options.file}"
        )
    count = 0
    with annotation_writer(_output(options.output), videos=options.videos, limits=limits) as write:
        for clip in _progress(upgraded_annotations(options.file)):
            write(clip)
            count += 1
    print(f"{count:,} clips: {options.output}")
    return 0


def _say(line: str) -> None:
    """A line above the progress, or in the log."""
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr)


def _output(path: Path) -> Path:
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"folder of {path} must exist; make it first")
    return path


def _inside(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []


def _progress(items: Iterable[Item]) -> Iterator[Item]:
    """Count and rate on a terminal, or a line every half minute in a log."""
    pause = 0.1 if sys.stderr.isatty() else 30.0
    # Short work in a log stays silent.
    delay = 0.0 if sys.stderr.isatty() else 30.0
    return iter(tqdm(items, unit="clip", mininterval=pause, maxinterval=pause, delay=delay))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cac_reward.data")
    add_annotate_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, OSError, ImportError, JudgeUnreachableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
