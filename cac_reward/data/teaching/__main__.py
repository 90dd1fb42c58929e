"""The command `cac-reward annotate teach`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cac_reward.data.storage import SUFFIXES, read_annotations
from cac_reward.data.teaching.settings import (
    RECIPES,
    SCHEMAS,
    TASKS,
    TYPES,
    TeachLimits,
    TeachSettings,
)
from cac_reward.data.teaching.verifying import RULES
from cac_reward.judges.base import JudgeUnreachableError

if TYPE_CHECKING:
    from cac_reward.data.teaching.asking import Tally, Teacher
    from cac_reward.data.teaching.running import Outcome

LEFT_OUT = 3
"""Exit status where clips were left without an answer."""
STOPPED = 130
"""Exit status after Ctrl-C."""
INTERRUPTED = "Ctrl-C"


def add_teach_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Have a chat model behind any OpenAI-compatible server write the reasoning of annotated "
        "clips. What contradicts the annotation is refused and asked again. The same command goes "
        "on where it stopped. The key is taken from OPENAI_API_KEY."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help=f"{', '.join(SUFFIXES)}, or folder")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.jsonl")
    parser.add_argument(
        "--endpoint", required=True, metavar="URL", help="such as http://127.0.0.1:8000/v1"
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="as the server calls it")
    parser.add_argument("--recipe", required=True, choices=RECIPES)
    parser.add_argument(
        "--videos", type=Path, metavar="DIR", help="root of the clips' paths (the file's folder)"
    )
    asked = parser.add_argument_group("what is asked (as before, to go on in a file)")
    asked.add_argument("--types", choices=TYPES, default="faults", help="of findings (faults)")
    asked.add_argument("--task", choices=TASKS, default="auto", help="srvau: of a clip (auto)")
    asked.add_argument("--classes", default="", metavar="A,B", help="of --task classification")
    asked.add_argument(
        "--subclip-seconds", type=float, metavar="S", help="vanguard: longest part (8)"
    )
    asked.add_argument("--fps", type=float, metavar="N", help="frames shown per second (2)")
    asked.add_argument("--max-frames", type=int, metavar="N", help="of a question (16)")
    asked.add_argument("--pixels", type=int, metavar="N", help="most of a frame (262144)")
    asked.add_argument("--min-iou", type=float, metavar="X", help="of windows (0.5)")
    asked.add_argument("--answer-tokens", type=int, metavar="N", help="most of an answer (2048)")
    asked.add_argument("--temperature", type=float, metavar="X", help="(the server's)")
    asked.add_argument("--seed", type=int, metavar="N", help="(0)")
    asked.add_argument(
        "--body", type=_record, default={}, metavar="JSON", help="more of each request; null drops"
    )
    limits = parser.add_argument_group("how far it goes")
    limits.add_argument("--concurrency", type=int, metavar="N", help="requests at once (8)")
    limits.add_argument("--tries", type=int, metavar="N", help="answers to a question (3)")
    limits.add_argument("--retries", type=int, metavar="N", help="of a failed request (4)")
    limits.add_argument("--timeout-seconds", type=float, metavar="S", help="of a request (300)")
    limits.add_argument("--schema", choices=SCHEMAS, help="sent as response_format (auto)")
    limits.add_argument("--max-requests", type=int, metavar="N", help="of this run")
    limits.add_argument("--max-tokens", type=int, metavar="N", help="of this run, by usage")
    limits.add_argument("--max-failures", type=int, metavar="N", help="clips that may fail (100)")
    parser.set_defaults(run=run_teach)


def run_teach(options: argparse.Namespace) -> int:
    """Teach, and say what it cost and what was left out; exits with 3 where there is such."""
    settings, limits = _settings(options), TeachLimits(**_given(options, _LIMITS))
    if options.output.suffix != ".jsonl":
        raise ValueError(f"output must end in .jsonl, got {options.output}")
    if not options.output.resolve().parent.is_dir():
        raise FileNotFoundError(f"folder of {options.output} must exist; make it first")
    if options.output.resolve() == options.file.resolve():
        raise ValueError(
            f"output must be another file than the one that is read, got {options.file}"
        )
    if options.file.is_dir() and options.output.resolve().parent == options.file.resolve():
        raise ValueError(f"output must be outside the folder that is read, got {options.output}")
    if importlib.util.find_spec("openai") is None:
        raise ImportError("teach needs openai; install it with: pip install 'cac-reward[serve]'")
    from cac_reward.data.teaching.asking import Teacher

    videos = options.videos
    if videos is None:
        videos = options.file if options.file.is_dir() else options.file.parent
    # Every line is read before the first is paid for.
    total = sum(1 for _ in read_annotations(options.file))
    teacher = Teacher(options.endpoint, settings, limits)
    with _stopped_by_interrupt(teacher):
        try:
            counts, failed = _teach(options, videos, total, teacher)
        except KeyboardInterrupt:
            print(f"stopped at once; the same command goes on in {options.output}", file=sys.stderr)
            return STOPPED
    print(_summary(counts, teacher.tally))
    for outcome in failed:
        print(f"failed: {outcome.name}: {outcome.reason}", file=sys.stderr)
    if counts["unasked"]:
        print(
            f"stopped: {teacher.halted}; {counts['unasked']:,} clips were not asked about or not "
            f"to their end; the same command goes on in {options.output}",
            file=sys.stderr,
        )
        if teacher.halted == INTERRUPTED:
            return STOPPED
    return LEFT_OUT if failed or counts["unasked"] else 0


def _teach(
    options: argparse.Namespace, videos: Path, total: int, teacher: Teacher
) -> tuple[Counter[str], list[Outcome]]:
    """Ask, and say how far it is."""
    from cac_reward.data.teaching.running import FAILED, teach

    # A log gets a line of its own every half minute, not a bar that is drawn over itself.
    pause = 0.1 if sys.stderr.isatty() else 30.0
    counts: Counter[str] = Counter()
    failed = []
    clips = read_annotations(options.file)
    with tqdm(total=total, unit="clip", mininterval=pause, maxinterval=pause) as bar:
        try:
            for outcome in teach(clips, videos, options.output, teacher):
                counts[outcome.state] += 1
                if outcome.state == FAILED:
                    failed.append(outcome)
                tally = teacher.tally
                bar.set_postfix_str(
                    f"{tally.requests:,} requests, {tally.tokens:,} tokens, {tally.rejected:,} "
                    f"rejected, {len(failed):,} failed",
                    refresh=False,
                )
                bar.update()
        except JudgeUnreachableError as error:
            done = counts["taught"] + counts["there"]
            raise JudgeUnreachableError(
                f"{error}; {done:,} clips are in {options.output}"
            ) from error
    return counts, failed


def _summary(counts: Counter[str], tally: Tally) -> str:
    """What was done and what it cost, as a table."""
    rows = [
        ("clips", sum(counts.values()), ""),
        ("  taught", counts["taught"], "in this run"),
        ("  there", counts["there"], "before it"),
        ("  failed", counts["failed"], ""),
        ("  not asked", counts["unasked"], ""),
        ("requests", tally.requests, f"{tally.repeated:,} of them after a failure"),
        ("answers", tally.accepted + tally.rejected, ""),
        ("  accepted", tally.accepted, ""),
        ("  rejected", tally.rejected, "by rule, and one may break several:"),
        *(
            (f"    {rule}", tally.reasons[rule], RULES[rule])
            for rule in RULES
            if tally.reasons[rule]
        ),
        ("tokens", tally.tokens, "by the server's count"),
        ("  read", tally.read_tokens, ""),
        ("  written", tally.written_tokens, ""),
    ]
    if tally.uncounted:
        rows.append(("  not counted", tally.uncounted, "answers without usage"))
    name, number = max(len(row[0]) for row in rows), max(len(f"{row[1]:,}") for row in rows)
    return "\n".join(f"{a:{name}}  {b:>{number},}  {c}".rstrip() for a, b, c in rows)


@contextmanager
def _stopped_by_interrupt(teacher: Teacher) -> Iterator[None]:
    """The first Ctrl-C begins no more requests, the second drops those under way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signal_number: int, frame: Any) -> None:
        if teacher.halted == INTERRUPTED:
            raise KeyboardInterrupt
        teacher.halt(INTERRUPTED)
        # No print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping: requests under way may end; Ctrl-C drops them\n")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_SETTINGS = (
    *("model", "recipe", "types", "task", "subclip_seconds", "fps", "max_frames", "pixels"),
    *("min_iou", "answer_tokens", "temperature", "seed", "body"),
)
_LIMITS = (
    *("concurrency", "tries", "retries", "timeout_seconds", "schema"),
    *("max_requests", "max_tokens", "max_failures"),
)


def _settings(options: argparse.Namespace) -> TeachSettings:
    if options.recipe != "vanguard" and options.subclip_seconds is not None:
        raise ValueError(
            f"subclip_seconds must be left out unless the recipe is vanguard, got "
            f"{options.subclip_seconds}"
        )
    classes = tuple(one.strip() for one in options.classes.split(",") if one.strip())
    return TeachSettings(**_given(options, _SETTINGS), classes=classes)


def _given(options: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """What was said on the command line; the rest has its defaults."""
    return {name: one for name in names if (one := getattr(options, name)) is not None}


def _record(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value
