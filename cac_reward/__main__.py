"""The command line: `python -m cac_reward score CLIP.mp4 --prompt "..." --judge FOLDER_OR_ID`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cac_reward.drawing import write_page
from cac_reward.report import AnomalyReport
from cac_reward.scorer import MODES, CaCScorer
from cac_reward.video import Video


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Args:
        arguments: What follows the program's name; None for this process's own.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return int(options.run(options))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cac_reward", description="Judge generated videos.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    score = commands.add_parser("score", help="judge one video file")
    score.add_argument("clip", type=Path, metavar="CLIP.mp4", help="any video file")
    score.add_argument("--prompt", default="", help="what the clip was generated from")
    score.add_argument("--judge", required=True, metavar="FOLDER_OR_ID", help="folder, or hub id")
    score.add_argument("--revision", help="branch, tag or commit of the hub id")
    score.add_argument("--mode", choices=MODES, default=MODES[0], help="full writes its findings")
    score.add_argument("--fps", type=float, help="believe this rate instead of the file's")
    score.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    score.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    score.add_argument("--html", type=Path, metavar="OUT.html", help="write the page to look at")
    score.add_argument("--json", type=Path, metavar="OUT.json", help="write the whole report")
    score.set_defaults(run=_score)
    return parser


def _score(options: argparse.Namespace) -> int:
    """Judge one file; exits with 3 where the judge gave no usable answer."""
    for path in (options.html, options.json):
        if path is not None and not path.resolve().parent.is_dir():
            raise FileNotFoundError(f"folder of {path} must exist; make it first")
    video = Video.decode(options.clip, fps=options.fps)
    scorer = CaCScorer.from_pretrained(
        options.judge,
        device=options.device,
        dtype=options.dtype,
        revision=options.revision,
        mode=options.mode,
    )
    report = scorer.inspect([video], [options.prompt])[0]
    print(_summary(video, report))
    if options.json is not None:
        options.json.write_text(report.to_json() + "\n", encoding="utf-8")
        print(f"report: {options.json}")
    if options.html is not None:
        write_page(options.html, [report], [video])
        print(f"page:   {options.html}")
    return 0 if report.error is None else 3


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


if __name__ == "__main__":
    sys.exit(main())
