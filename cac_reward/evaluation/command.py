"""The command `cac-reward evaluate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cac_reward.batch import Clip
from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.storage import read_annotations
from cac_reward.evaluation.measuring import evaluate
from cac_reward.evaluation.pairing import pair_up, read_answers
from cac_reward.evaluation.writing import table, write_html, write_json, write_markdown
from cac_reward.judge_options import add_judge_arguments, given_judge_options
from cac_reward.records import ClipRecord, read_records

INCOMPLETE = 3
"""Exit status where an annotated clip has no score."""
STOPPED = 130
"""Exit status after Ctrl-C."""

Score = Callable[[Sequence[Clip], argparse.Namespace], Sequence[ClipRecord] | None]
"""Judges clips into `options.output` and goes on where it stopped; None after Ctrl-C."""


def add_evaluate_arguments(parser: argparse.ArgumentParser, score: Score) -> None:
    """Declare the command's arguments.

    Args:
        parser: Of the command.
        score: What judges clips where a judge is given.
    """
    parser.description = (
        "Measure answers against annotated clips: verdicts, windows, boxes, types, with bootstrap "
        "intervals over recordings. What was not judged is counted, not guessed."
    )
    parser.add_argument(
        "--annotations", type=Path, required=True, metavar="FILE", help=".jsonl, .parquet, .tar"
    )
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument(
        "--judge", metavar="FOLDER_OR_ID", help="score the clips first: folder, hub id"
    )
    who.add_argument(
        "--predictions",
        type=Path,
        nargs="+",
        metavar="REPORTS.jsonl",
        help="answers made before: what score --output writes",
    )
    parser.add_argument(
        "--videos", type=Path, metavar="DIR", help="root of the clips (the annotations' folder)"
    )
    parser.add_argument("--split", help="only clips of this split, for example test")
    parser.add_argument(
        "--answers",
        type=Path,
        metavar="FILE.jsonl",
        help='answers to the questions, {"path": ..., "answer": ...} in each line',
    )
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap (1000; 0: none)")
    parser.add_argument("--level", type=float, default=0.95, help="of the intervals (0.95)")
    parser.add_argument("--bootstrap-seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="everything, for programs")
    parser.add_argument("--markdown", type=Path, metavar="OUT.md", help="tables, for documents")
    parser.add_argument("--html", type=Path, metavar="OUT.html", help="a page to look at")
    scoring = parser.add_argument_group("with --judge")
    scoring.add_argument("--output", type=Path, metavar="OUT.jsonl", help="its reports; goes on")
    scoring.add_argument("--fps", type=float, help="believe this rate instead of the files'")
    scoring.add_argument("--batch", type=int, default=4, help="clips judged together (default: 4)")
    scoring.add_argument("--cache", type=Path, metavar="FILE", help="keep and find reports here")
    add_judge_arguments(parser)
    parser.set_defaults(run=partial(run_evaluate, score=score))


def run_evaluate(options: argparse.Namespace, score: Score) -> int:
    """Judge if asked to, measure, print, write; exits with 3 where a clip has no score."""
    for path in (options.json, options.markdown, options.html, options.output):
        if path is not None and not path.resolve().parent.is_dir():
            raise FileNotFoundError(f"folder of {path} must exist; make it first")
    clips = [
        clip
        for clip in read_annotations(options.annotations)
        if options.split is None or clip.split == options.split
    ]
    if not clips:
        which = "" if options.split is None else f" of split {options.split!r}"
        raise ValueError(f"annotations must hold clips{which}, got none in {options.annotations}")
    root = options.videos or _folder(options.annotations)
    records = _records(clips, root, options, score)
    if records is None:
        return STOPPED
    pairing = pair_up(clips, records, root)
    answers = None if options.answers is None else read_answers(options.answers)
    evaluation = evaluate(
        pairing,
        answers=answers,
        draws=options.draws,
        level=options.level,
        seed=options.bootstrap_seed,
    )
    _say(table(evaluation))
    if options.json is not None:
        write_json(options.json, evaluation)
        _say(f"json:     {options.json}")
    if options.markdown is not None:
        write_markdown(options.markdown, evaluation)
        _say(f"markdown: {options.markdown}")
    if options.html is not None:
        write_html(options.html, evaluation)
        _say(f"page:     {options.html}")
    failed = [pair.record.failure for pair in pairing.pairs if pair.record.failure is not None]
    return INCOMPLETE if failed or pairing.unanswered else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def _folder(annotations: Path) -> Path:
    return annotations if annotations.is_dir() else annotations.parent


def _records(
    clips: Sequence[AnnotatedClip], root: Path, options: argparse.Namespace, score: Score
) -> dict[str, ClipRecord] | None:
    """The predictions that were given, or the judge's own; None after Ctrl-C."""
    if options.judge is None:
        given = [name for name in ("output", "fps", "cache") if getattr(options, name) is not None]
        given += given_judge_options(options)
        if given:
            raise ValueError(f"{given[0]} must be left out with predictions; it is for --judge")
        records: dict[str, ClipRecord] = {}
        for path in options.predictions:
            records |= read_records(path)
        return records
    if options.output is None:
        raise ValueError("output must be given with judge; add --output FILE for its reports")
    packed = [clip.name for clip in clips if clip.key is not None]
    if packed:
        raise ValueError(
            f"clips must be files for a judge, got {packed[0]} in a shard; score them elsewhere "
            "and give --predictions"
        )
    files = [Clip((root / clip.path).as_posix(), clip.path, clip.prompt) for clip in clips]
    scored = score(files, options)
    return None if scored is None else {record.path: record for record in scored}
