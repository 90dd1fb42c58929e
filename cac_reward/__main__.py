"""The command line: `python -m cac_reward score DIR --judge FOLDER --output reports.jsonl`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cac_reward.calibration import FILE as CALIBRATION_FILE
from cac_reward.calibration import fit_calibration, read_labels
from cac_reward.exporting import SOURCES, TARGETS, export_clips, export_records, read_clips
from cac_reward.judges.base import JudgeUnreachableError
from cac_reward.page import VIDEOS
from cac_reward.records import read_records
from cac_reward.score_command import add_score_arguments, score_clips


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Args:
        arguments: What follows the program's name; None for this process's own.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser(wanted=next(iter(arguments), "")).parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return int(options.run(options))
    except (ValueError, OSError, ImportError, JudgeUnreachableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser(wanted: str) -> argparse.ArgumentParser:
    """All commands; those with many modules behind them declare their arguments when wanted."""
    parser = argparse.ArgumentParser(prog="cac_reward", description="Judge generated videos.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_score_arguments(commands.add_parser("score", help="judge video files"))
    _add_export(commands)
    _add_calibrate(commands)
    _add_annotate(commands, wanted == "annotate")
    _add_synthesize(commands, wanted == "synthesize")
    _add_train(commands, wanted == "train")
    _add_answer(commands, wanted == "answer")
    _add_evaluate(commands, wanted == "evaluate")
    _add_serve(commands, wanted == "serve")
    return parser


def _add_annotate(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], wanted: bool
) -> None:
    annotate = commands.add_parser("annotate", help="import, check and convert annotated clips")
    if wanted:
        from cac_reward.data.__main__ import add_annotate_arguments

        add_annotate_arguments(annotate)


def _add_synthesize(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], wanted: bool
) -> None:
    synthesize = commands.add_parser("synthesize", help="plant faults into clean clips")
    if wanted:
        from cac_reward.data.synthesis.__main__ import add_synthesize_arguments

        add_synthesize_arguments(synthesize)


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser], wanted: bool) -> None:
    train = commands.add_parser("train", help="train a judge, by a stage or a curriculum of stages")
    if wanted:
        from cac_reward.training.command import add_train_arguments

        add_train_arguments(train)


def _add_answer(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], wanted: bool
) -> None:
    answer = commands.add_parser("answer", help="ask a judge the tasks of one turn")
    if wanted:
        from cac_reward.training.answer_command import add_answer_arguments

        add_answer_arguments(answer)


def _add_evaluate(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], wanted: bool
) -> None:
    evaluate = commands.add_parser("evaluate", help="measure a judge on annotated clips")
    if wanted:
        from cac_reward.evaluation.command import add_evaluate_arguments

        add_evaluate_arguments(evaluate, score=score_clips)


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = commands.add_parser(
        "export",
        help="turn reports into pages, tables, mp4s and the files of annotation tools, and back",
    )
    export.add_argument("inputs", type=Path, nargs="+", metavar="FILE", help="what to read")
    export.add_argument("--from", dest="source", choices=SOURCES, default=SOURCES[0])
    export.add_argument("--to", choices=TARGETS, required=True)
    export.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="file; a folder for overlays, cvat",
    )
    export.add_argument("--videos", choices=VIDEOS, default="embed", help="in the page")
    export.add_argument("--fps", type=float, help="rate of the clip, for a file that CVAT wrote")
    export.add_argument("--path", help="video of the clip, for a file that CVAT wrote")
    export.set_defaults(run=_export)


def _add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    calibrate = commands.add_parser(
        "calibrate", help="fit the temperature of a judge's verdicts on labelled clips"
    )
    calibrate.add_argument("reports", type=Path, metavar="REPORTS.jsonl", help="written by score")
    calibrate.add_argument(
        "--labels", type=Path, required=True, metavar="FILE.csv", help="columns path, clean (0, 1)"
    )
    calibrate.add_argument(
        "--judge", type=Path, required=True, metavar="FOLDER", help="where it is stored"
    )
    calibrate.set_defaults(run=_calibrate)


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser], wanted: bool) -> None:
    """The server declares its own arguments; it is imported only when it is wanted."""
    serve = commands.add_parser("serve", help="answer over HTTP")
    if wanted:
        from cac_reward.server import add_serve_arguments, run_server

        add_serve_arguments(serve)
        serve.set_defaults(run=run_server)


def _calibrate(options: argparse.Namespace) -> int:
    """Fit, store beside the checkpoint, and say what it changes."""
    if not (options.judge / "config.json").is_file():
        raise ValueError(f"judge must be a checkpoint folder, got {options.judge}")
    if (options.judge / CALIBRATION_FILE).is_file():
        raise ValueError(
            f"judge must have no calibration yet, got {options.judge / CALIBRATION_FILE}; delete "
            "it and score the clips again: these reports may have been read through it"
        )
    labels = read_labels(options.labels)
    records = read_records(options.reports)
    known = {path: one.report.reward for path, one in records.items() if one.report}
    missing = [path for path in labels if path not in known]
    if missing:
        raise ValueError(
            f"reports must hold every labelled clip, got none of {missing[0]!r} "
            f"({len(missing)} in all) in {options.reports}"
        )
    p_clean = torch.tensor([known[path] for path in labels])
    fitted = fit_calibration(p_clean, torch.tensor(list(labels.values())))
    print(
        f"temperature {fitted.temperature:.3f} from {fitted.num_clips} clips; expected calibration "
        f"error {fitted.error_before:.3f} before, {fitted.error_after:.3f} after; "
        f"written to {fitted.save(options.judge)}"
    )
    return 0


def _export(options: argparse.Namespace) -> int:
    """Convert; needs no judge."""
    if not options.output.resolve().parent.is_dir():
        raise FileNotFoundError(f"folder of {options.output} must exist; make it first")
    from_cvat = options.source == "cvat"
    if not from_cvat and (options.fps, options.path) != (None, None):
        raise ValueError(f"fps and path must be left out unless --from cvat, got {options.source}")
    if options.source == "reports":
        records = {key: one for path in options.inputs for key, one in read_records(path).items()}
        if not records:
            raise ValueError(
                f"reports must hold at least one clip, got none in {options.inputs[0]}"
            )
        export_records(list(records.values()), options.to, options.output, options.videos)
    else:
        clips = read_clips(options.inputs, options.source, options.path, options.fps)
        export_clips(clips, options.to, options.output)
    print(f"{options.to}: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
