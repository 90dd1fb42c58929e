"""The command `cac-reward evaluate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cac_reward.data.storage import read_annotations
from cac_reward.evaluation.measuring import evaluate
from cac_reward.evaluation.pairing import pair_up, read_answers
from cac_reward.evaluation.writing import table, write_json, write_markdown
from cac_reward.records import ClipRecord, read_records

INCOMPLETE = 3
"""Exit status where an annotated clip has no score."""


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Measure answers against annotated clips: verdicts, windows, boxes, types, with bootstrap "
        "intervals over recordings. What was not judged is counted, not guessed."
    )
    parser.add_argument(
        "--annotations", type=Path, required=True, metavar="FILE", help=".jsonl, .parquet, .tar"
    )
    parser.add_argument(
        "--predictions",
        type=Path,
        nargs="+",
        required=True,
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
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="everything, for programs")
    parser.add_argument("--markdown", type=Path, metavar="OUT.md", help="tables, for documents")
    parser.set_defaults(run=run_evaluate)


def run_evaluate(options: argparse.Namespace) -> int:
    """Measure, print, write; exits with 3 where an annotated clip has no score."""
    for path in (options.json, options.markdown):
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
    records: dict[str, ClipRecord] = {}
    for path in options.predictions:
        records |= read_records(path)
    root = options.videos or _folder(options.annotations)
    pairing = pair_up(clips, records, root)
    answers = None if options.answers is None else read_answers(options.answers)
    evaluation = evaluate(
        pairing, answers=answers, draws=options.draws, level=options.level, seed=options.seed
    )
    print(table(evaluation))
    if options.json is not None:
        write_json(options.json, evaluation)
        print(f"json:     {options.json}")
    if options.markdown is not None:
        write_markdown(options.markdown, evaluation)
        print(f"markdown: {options.markdown}")
    failed = [pair.record.failure for pair in pairing.pairs if pair.record.failure is not None]
    return INCOMPLETE if failed or pairing.unanswered else 0


def _folder(annotations: Path) -> Path:
    return annotations if annotations.is_dir() else annotations.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m cac_reward.evaluation`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="cac_reward evaluate")
    add_evaluate_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
