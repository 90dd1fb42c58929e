"""The command `cac-reward evaluate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cac_reward.batch import Clip
from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.storage import read_annotations
from cac_reward.evaluation.measuring import evaluate
from cac_reward.evaluation.pairing import Pairing, pair_up, read_answers
from cac_reward.evaluation.predictions import Prediction
from cac_reward.evaluation.protocols import Protocol, known_protocols
from cac_reward.evaluation.published import FORMATS
from cac_reward.evaluation.writing import table, write_html, write_json, write_markdown
from cac_reward.judge_options import add_judge_arguments, given_judge_options
from cac_reward.records import ClipRecord

INCOMPLETE = 3
"""Exit status where an annotated clip has no score."""
STOPPED = 130
"""Exit status after Ctrl-C."""
UNRATED = "VAU-Eval: no usable answer"

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
        metavar="FILE",
        help="answers made before, here or elsewhere; see --predictions-format",
    )
    parser.add_argument(
        "--predictions-format",
        choices=FORMATS,
        help="what score --output writes (reports, the default) or answer --output (answers), "
        "VAU-R1's CSVs, Skyra's JSON",
    )
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        help=f"measure as a benchmark does: {', '.join(known_protocols())}, or a .yaml file",
    )
    parser.add_argument(
        "--videos", type=Path, metavar="DIR", help="root of the clips (the annotations' folder)"
    )
    parser.add_argument("--split", help="only clips of this split (the protocol's)")
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
    _add_vau_eval_arguments(parser)
    parser.set_defaults(run=partial(run_evaluate, score=score))


def _add_vau_eval_arguments(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group(
        "VAU-Eval", "a language model rates what was said of each clip, from 0 to 10"
    )
    text.add_argument("--vau-eval", metavar="URL", help="of a server with the chat API")
    text.add_argument("--vau-eval-model", metavar="NAME", help="the server's name of the model")
    text.add_argument(
        "--vau-eval-output", type=Path, metavar="OUT.jsonl", help="its ratings; goes on"
    )
    text.add_argument("--vau-eval-concurrency", type=int, metavar="N", help="clips at once (8)")
    text.add_argument("--vau-eval-tries", type=int, metavar="N", help="answers for a clip (3)")
    text.add_argument("--vau-eval-max-tokens", type=int, metavar="N", help="of an answer (512)")
    text.add_argument(
        "--vau-eval-schema",
        choices=("always", "never"),
        help="whether the form goes along as response_format (always)",
    )


def run_evaluate(options: argparse.Namespace, score: Score) -> int:
    """Judge if asked to, measure, print, write; exits with 3 where a clip has no score."""
    written = (options.json, options.markdown, options.html, options.output)
    for path in (*written, options.vau_eval_output):
        if path is not None and not path.resolve().parent.is_dir():
            raise FileNotFoundError(f"folder of {path} must exist; make it first")
    rater = _rater_settings(options)
    protocol = None if options.protocol is None else Protocol.load(options.protocol)
    clips = _clips(options, protocol)
    root = options.videos or _folder(options.annotations)
    predictions = _predictions(clips, root, options, score)
    if predictions is None:
        return STOPPED
    pairing = pair_up(clips, predictions, root)
    answers = None if options.answers is None else read_answers(options.answers)
    scores: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    if rater is not None:
        try:
            scores, counts = _rate(pairing, options.vau_eval_output, rater)
        except KeyboardInterrupt:
            sys.stderr.write(f"stopped; the same command goes on from {options.vau_eval_output}\n")
            return STOPPED
    evaluation = evaluate(
        pairing,
        answers=answers,
        scores=scores,
        protocol=protocol,
        draws=options.draws,
        level=options.level,
        seed=options.bootstrap_seed,
    )
    evaluation = replace(evaluation, counts={**evaluation.counts, **counts})
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
    failed = [pair for pair in pairing.pairs if pair.prediction.failure is not None]
    return INCOMPLETE if failed or pairing.unanswered or counts.get(UNRATED) else 0


def _clips(options: argparse.Namespace, protocol: Protocol | None) -> list[AnnotatedClip]:
    """The clips of the split that was asked for, or that the protocol measures."""
    split = options.split or (None if protocol is None else protocol.split)
    clips = [clip for clip in read_annotations(options.annotations) if split in (None, clip.split)]
    if not clips:
        which = "" if split is None else f" of split {split!r}"
        raise ValueError(f"annotations must hold clips{which}, got none in {options.annotations}")
    if protocol is not None:
        protocol.check(clips)
    return clips


def _rater_settings(options: argparse.Namespace) -> dict[str, Any] | None:
    """What was given of VAU-Eval, by the names of `RaterOptions`; None without a server."""
    names = ("model", "concurrency", "tries", "max_tokens", "schema")
    given = {
        name: value for name in names if (value := getattr(options, f"vau_eval_{name}")) is not None
    }
    if options.vau_eval is None:
        unused = [*given, *(["output"] if options.vau_eval_output is not None else [])]
        if unused:
            raise ValueError(f"vau_eval_{unused[0]} must be left out without --vau-eval URL")
        return None
    if "model" not in given or options.vau_eval_output is None:
        raise ValueError("vau_eval must come with --vau-eval-model and --vau-eval-output")
    return {"base_url": options.vau_eval, **given}


def _rate(
    pairing: Pairing, output: Path, settings: Mapping[str, Any]
) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Measures by clip, and what was rated and what was not."""
    try:
        from cac_reward.evaluation.vau_eval import RaterOptions, can_be_rated, measures, rate
    except ModuleNotFoundError as error:
        raise ImportError(
            '--vau-eval needs openai; install it with: pip install ".[serve]"'
        ) from error
    wanted = [pair for pair in pairing.pairs if can_be_rated(pair)]
    ratings = list(
        tqdm(rate(wanted, RaterOptions(**settings), output), total=len(wanted), unit="rating")
    )
    failed = [one for one in ratings if one.scores is None]
    if failed:
        sys.stderr.write(
            f"{len(failed)} of {len(ratings)} ratings failed, first {failed[0].clip}: "
            f"{failed[0].error}\n"
        )
    spent = [one.tokens for one in ratings if one.tokens is not None]
    return measures(ratings), {
        "VAU-Eval: rated": len(ratings) - len(failed),
        UNRATED: len(failed),
        "VAU-Eval: no text, or no description with reasoning": len(pairing.pairs) - len(wanted),
        "VAU-Eval: tokens read": sum(read for read, _ in spent),
        "VAU-Eval: tokens written": sum(written for _, written in spent),
        "VAU-Eval: ratings without a count of tokens": len(ratings) - len(spent),
    }


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def _folder(annotations: Path) -> Path:
    return annotations if annotations.is_dir() else annotations.parent


def _predictions(
    clips: Sequence[AnnotatedClip], root: Path, options: argparse.Namespace, score: Score
) -> dict[str, Prediction] | None:
    """The predictions that were given, or the judge's own; None after Ctrl-C."""
    if options.judge is None:
        given = [name for name in ("output", "fps", "cache") if getattr(options, name) is not None]
        given += given_judge_options(options)
        if given:
            raise ValueError(f"{given[0]} must be left out with predictions; it is for --judge")
        for path in options.predictions:
            if not path.is_file():
                raise FileNotFoundError(f"predictions must be existing files, got {path}")
        return FORMATS[options.predictions_format or "reports"](options.predictions)
    if options.predictions_format is not None:
        raise ValueError("predictions_format must be left out with judge; it is for --predictions")
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
    if scored is None:
        return None
    return {record.path: Prediction.from_record(record) for record in scored}
