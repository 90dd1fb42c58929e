"""The command `cac-reward answer`: a judge's answers to tasks of one turn, a line for each clip."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cac_reward.evaluation.answered import AnsweredClip, read_answered_clips
from cac_reward.evaluation.predictions import Prediction
from cac_reward.judge_options import add_judge_arguments, judge_options
from cac_reward.judges.base import AbstractJudge
from cac_reward.records import RecordWriter
from cac_reward.training.asking import Asking, ask, has_question, to_prediction
from cac_reward.training.clips import ClipStore
from cac_reward.training.lessons import LessonOptions
from cac_reward.training.task_answers import KINDS
from cac_reward.video import Video

INCOMPLETE = 3
"""Exit status where a clip could not be read, or an answer breaks its form."""
STOPPED = 130
"""Exit status after Ctrl-C."""


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Ask a judge VAU-R1's tasks of one turn, with or without SRVAU-R1's reflection, and write "
        "its answers, a line for each clip; the same command goes on where it stopped. Measure "
        "them with: cac-reward evaluate --predictions OUT.jsonl --predictions-format answers"
    )
    parser.add_argument("--judge", required=True, metavar="FOLDER_OR_ID", help="folder, or hub id")
    parser.add_argument(
        "--annotations", type=Path, required=True, metavar="FILE", help=".jsonl, .parquet, .tar"
    )
    parser.add_argument(
        "--videos", type=Path, metavar="DIR", help="root of the clips (the annotations' folder)"
    )
    parser.add_argument("--split", help="only clips of this split")
    parser.add_argument("--tasks", nargs="+", choices=KINDS, required=True, help="what is asked")
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="NAME", help="that classification chooses from"
    )
    parser.add_argument(
        "--no-thinking", dest="thinking", action="store_false", help="ask for the answer alone"
    )
    parser.add_argument(
        "--reflection", action="store_true", help="ask for a first answer and a revised one"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="of an answer (1024)"
    )
    parser.add_argument("--batch", type=int, default=4, help="clips asked together (4)")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.jsonl")
    add_judge_arguments(parser)
    parser.set_defaults(run=run_answer)


def run_answer(options: argparse.Namespace) -> int:
    """Ask about what is not in the output yet; exits with 3 where an answer is not usable."""
    if options.batch < 1:
        raise ValueError(f"batch must be at least 1, got {options.batch}")
    if not options.output.resolve().parent.is_dir():
        raise FileNotFoundError(f"folder of {options.output} must exist; make it first")
    asking = Asking(
        kinds=tuple(options.tasks),
        options=LessonOptions(
            thinking=float(options.thinking), reflection=float(options.reflection), written=False
        ),
        classes=tuple(options.classes),
        max_new_tokens=options.max_tokens,
    )
    logging.getLogger("libav").setLevel(logging.CRITICAL)
    store = ClipStore([options.annotations], videos=options.videos, split=options.split)
    judge = judge_options(options).load().judge
    asked = asked_of(judge, asking)
    try:
        with RecordWriter(options.output) as writer:
            done = read_answered_clips([options.output])
            check_same(done, asked, options.output)
            numbers = [n for n in range(len(store)) if _is_asked(store, n, asking, done)]
            lines = answer(judge, asking, store, numbers, options.batch)
            for line in tqdm(lines, total=len(numbers), unit="clip"):
                done[line.path] = replace(line, asked=asked)
                writer.write(done[line.path])
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped; the same command goes on from {options.output}\n")
        return STOPPED
    failed = [line for line in done.values() if line.prediction.failure is not None]
    sys.stdout.write(
        f"{len(done)} clips, {len(failed)} without a usable answer: {options.output}\n"
    )
    for line in failed[:5]:
        sys.stderr.write(f"  {line.path}: {line.prediction.failure}\n")
    return INCOMPLETE if failed else 0


def answer(
    judge: AbstractJudge, asking: Asking, store: ClipStore, numbers: Sequence[int], batch: int
) -> Iterator[AnsweredClip]:
    """A line for each clip; one that cannot be read has a failure and no answers."""
    for first in range(0, len(numbers), batch):
        some = numbers[first : first + batch]
        clips = [store.annotation(number) for number in some]
        videos: list[Video] = []
        readable = []
        for number, clip in zip(some, clips, strict=True):
            try:
                videos.append(store.video(number, clip))
                readable.append(clip)
            except (ValueError, OSError) as error:
                yield AnsweredClip(clip.name, {}, {}, Prediction(failure=str(error)))
        answers = ask(judge, asking, readable, videos)
        for clip, video, said in zip(readable, videos, answers, strict=True):
            found = to_prediction(said, judge.name, video)
            yield AnsweredClip(clip.name, {}, said.texts, found)


def asked_of(judge: AbstractJudge, asking: Asking) -> dict[str, Any]:
    """What answers depend on besides the clip, as JSON has it."""
    asked = {
        "judge": judge.name,
        "fingerprint": judge.fingerprint,
        "settings": judge.plain_settings,
        "tasks": sorted(asking.kinds),
        "thinking": bool(asking.fixed.thinking),
        "reflection": bool(asking.fixed.reflection),
        "classes": list(asking.classes),
        "max_tokens": asking.max_new_tokens,
    }
    plain: dict[str, Any] = json.loads(json.dumps(asked, default=str))
    return plain


def check_same(done: Mapping[str, AnsweredClip], asked: Mapping[str, Any], path: Path) -> None:
    """Refuse to add to answers that were asked for in another way.

    Raises:
        ValueError: Names what differs.
    """
    for one in done.values():
        for key in asked:
            if one.asked.get(key) != asked[key]:
                raise ValueError(
                    f"output must be a new file or hold answers of the same {key}, got {path} with "
                    f"{one.asked.get(key)!r}, now {asked[key]!r}; choose another output"
                )


def _is_asked(
    store: ClipStore, number: int, asking: Asking, done: Mapping[str, AnsweredClip]
) -> bool:
    """Whether a clip is still to be asked about; one without a question is not asked it alone."""
    clip = store.annotation(number)
    return clip.name not in done and (asking.kinds != ("qa",) or has_question(clip))
