"""The command `cac-reward score`: one clip with everything said, or many into a file of reports."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from cac_reward.batch import Clip, find_clips, in_shard, judge_clips, read_prompts
from cac_reward.judge_options import add_judge_arguments, judge_options
from cac_reward.page import VIDEOS, write_page
from cac_reward.records import ClipRecord, RecordWriter, read_records
from cac_reward.report import NOT_RECORDED, AnomalyReport
from cac_reward.scorer import CaCScorer
from cac_reward.tables import write_overlays, write_table
from cac_reward.video import Video

NO_SCORE = 3
"""Exit status where a clip could not be read or judged; the others were."""
STOPPED = 130
"""Exit status after Ctrl-C."""


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Judge video files. With --output, or for a folder or several files, every "
        "report is a line of that file, and the same command goes on where it stopped."
    )
    parser.add_argument("clips", type=Path, nargs="+", metavar="CLIP", help="video file or folder")
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--prompt", default="", help="what the clips were generated from")
    words.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one for each clip: .txt in the order of the clips; .json, .jsonl or .csv by path",
    )
    parser.add_argument("--judge", required=True, metavar="FOLDER_OR_ID", help="folder, or hub id")
    parser.add_argument("--fps", type=float, help="believe this rate instead of the files'")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="keep and find reports here")
    add_judge_arguments(parser)
    many = parser.add_argument_group("many clips")
    many.add_argument("--output", type=Path, metavar="OUT.jsonl", help="a report per line")
    many.add_argument("--shard", type=_shard, default=(1, 1), metavar="K/N", help="share 1 to N")
    many.add_argument("--batch", type=int, default=4, help="clips judged together (default: 4)")
    look = parser.add_argument_group("to look at")
    look.add_argument("--html", type=Path, metavar="OUT.html", help="write the page to look at")
    look.add_argument(
        "--videos", choices=VIDEOS, help="in the page (default: embed one, link many)"
    )
    look.add_argument("--overlays", type=Path, metavar="DIR", help="write mp4s with the findings")
    look.add_argument(
        "--csv",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="OUT.csv",
        help="write a table, a row per clip (default: beside --output)",
    )
    look.add_argument("--json", type=Path, metavar="OUT.json", help="one clip: the whole report")
    parser.set_defaults(run=run_score)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"shard must be K/N with 1 <= K <= N, got {text!r}")
    return int(match[1]), int(match[2])


def run_score(options: argparse.Namespace) -> int:
    """Judge one clip and say everything, or many and say how far it is."""
    if options.csv == Path():
        if options.output is None:
            raise ValueError("csv must name a file where --output does not, got --csv alone")
        options.csv = options.output.with_suffix(".csv")
    for path in (options.html, options.json, options.csv, options.output):
        if path is not None and not path.resolve().parent.is_dir():
            raise FileNotFoundError(f"folder of {path} must exist; make it first")
    if options.videos == "link" and options.fps is not None:
        raise ValueError("videos must be 'embed' with --fps, got 'link': files keep their own rate")
    single = len(options.clips) == 1 and not options.clips[0].is_dir()
    if single and options.output is None and options.prompts is None and options.shard == (1, 1):
        return _score_one(options)
    return _score_many(options)


def _score_one(options: argparse.Namespace) -> int:
    """Judge one file; exits with 3 where the judge gave no usable answer."""
    video = Video.decode(options.clips[0], fps=options.fps)
    report = judge_options(options).load(cache=options.cache).inspect([video], [options.prompt])[0]
    print(_summary(video, report))
    if options.json is not None:
        options.json.write_text(report.to_json() + "\n", encoding="utf-8")
        print(f"report: {options.json}")
    path = str(options.clips[0])
    record = ClipRecord(path=path, width=video.width, height=video.height, report=report)
    _write_views(options, [record], "embed")
    return 0 if report.error is None else NO_SCORE


def _score_many(options: argparse.Namespace) -> int:
    """Judge what is not in the output yet; exits with 3 where a clip has no score in the end."""
    if options.output is None:
        raise ValueError("output must be given for a folder or several clips; add --output FILE")
    if options.json is not None:
        raise ValueError("json must be left out for many clips; --output has the whole reports")
    clips = find_clips(options.clips)
    prompts = None if options.prompts is None else read_prompts(options.prompts, clips)
    clips = [
        replace(clip, prompt=options.prompt if prompts is None else prompts[clip.name])
        for clip in clips
        if in_shard(clip.name, *options.shard)
    ]
    found = score_clips(clips, options)
    if found is None:
        return STOPPED
    _write_views(options, found, "link")
    return NO_SCORE if any(record.failure is not None for record in found) else 0


def score_clips(clips: Sequence[Clip], options: argparse.Namespace) -> list[ClipRecord] | None:
    """Judge what is not in the output yet, and say how much has a score; None where stopped."""
    # The reason of each clip without a score is printed with its path.
    logging.getLogger("cac_reward.scorer").setLevel(logging.ERROR)
    logging.getLogger("libav").setLevel(logging.CRITICAL)
    with RecordWriter(options.output) as writer:
        records = read_records(options.output)
        scorer = judge_options(options).load(cache=options.cache)
        for clip in clips:
            _check_same(records.get(clip.path), clip, scorer, options)
        waiting = [c for c in clips if c.path not in records or records[c.path].report is None]
        try:
            _judge_with_progress(waiting, len(clips), scorer, writer, records, options)
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on from {options.output}", file=sys.stderr)
            return None
    found = [records[clip.path] for clip in clips]
    failed = [record for record in found if record.failure is not None]
    print(f"{len(found) - len(failed)} of {len(found)} clips have a score: {options.output}")
    if failed:
        print(
            f"{len(failed)} without a score, first {failed[0].path}: {failed[0].failure}",
            file=sys.stderr,
        )
    return found


def _judge_with_progress(
    waiting: Sequence[Clip],
    total: int,
    scorer: CaCScorer,
    writer: RecordWriter,
    records: dict[str, ClipRecord],
    options: argparse.Namespace,
) -> None:
    """Judge, write and take note; rate and remaining time go to the terminal or into a log."""
    # A log gets a line of its own every half minute, not a bar that is drawn over itself.
    pause = 0.1 if sys.stderr.isatty() else 30.0
    done = total - len(waiting)
    with tqdm(total=total, initial=done, unit="clip", mininterval=pause, maxinterval=pause) as bar:
        for record in judge_clips(waiting, scorer, fps=options.fps, batch=options.batch):
            writer.write(record)
            records[record.path] = record
            if record.failure is not None:
                bar.write(f"no score: {record.path}: {record.failure}", file=sys.stderr)
            bar.update()


def _check_same(
    record: ClipRecord | None, clip: Clip, scorer: CaCScorer, options: argparse.Namespace
) -> None:
    """Refuse to go on in a file that holds answers to other questions."""
    if record is None or record.report is None:
        return
    report = record.report
    asked: list[tuple[str, object, object]] = [
        ("judge", report.judge_id, scorer.judge.name),
        ("mode", report.mode, scorer.mode),
        ("prompt", report.prompt, clip.prompt),
        ("fps", report.fps, report.fps if options.fps is None else options.fps),
    ]
    # Reports of an older schema do not say how the judge was asked.
    if report.decoder != NOT_RECORDED:
        asked.append(("decoder", report.decoder, scorer.judge.decoder))
    if report.settings is not None:
        asked += [(name, report.settings.get(name), now) for name, now in scorer.settings.items()]
    for name, was, now in asked:
        if was != now:
            raise ValueError(
                f"{name} must be as in {options.output}, where it is {was!r} for {clip.path}, "
                f"got {now!r}; name another --output"
            )


def _write_views(options: argparse.Namespace, records: Sequence[ClipRecord], videos: str) -> None:
    """Everything that was asked for to look at."""
    if options.html is not None:
        by_default = "embed" if options.fps is not None else videos
        write_page(options.html, records, videos=options.videos or by_default)
        print(f"page:   {options.html}")
    if options.csv is not None:
        write_table(options.csv, records)
        print(f"table:  {options.csv}")
    if options.overlays is not None:
        write_overlays(options.overlays, records)
        print(f"clips:  {options.overlays}")


def _summary(video: Video, report: AnomalyReport) -> str:
    lines = [
        f"{video.source}: {video.num_frames} frames of {video.width}x{video.height} "
        f"at {video.fps:g} fps ({video.duration_seconds:.2f} s)",
        f"judge:   {report.judge_id} ({report.mode})",
    ]
    if report.score is None:
        lines.append(f"verdict: none; the judge's answer could not be used: {report.error}")
    else:
        lines.append(f"verdict: {report.verdict}, P(clean) = {report.score:.4f}")
    if report.note is not None:
        lines.append(f"note:    {report.note}")
    looked = ", ".join(
        f"{window.start_seconds:.2f}-{window.end_seconds:.2f} s" for window in report.windows
    )
    lines.append(f"looked:  {looked or 'at the whole clip only'}")
    for finding in report.findings:
        window = finding.window
        lines.append(
            f"finding: {finding.type} {window.start_seconds:.2f}-{window.end_seconds:.2f} s, "
            f"severity {finding.severity}, {len(finding.boxes)} boxes. {finding.why}".rstrip()
        )
    seconds = ", ".join(f"{stage} {spent:.2f} s" for stage, spent in report.timings.items())
    return "\n".join([*lines, f"took:    {seconds}"])
