"""How far a score moves when a clip goes through h264: P(clean) before and after, by quality.

    python -m benchmarks.codec_drift --clips 64 --output runs/codec_drift
    python -m benchmarks.codec_drift --videos FOLDER --output runs/codec_drift_real

Toy clips are rendered, so their scores before are those of pixels that no codec has touched; files
given by --videos are decoded first. crf 0 keeps brightness exactly, but 4:2:0 halves the colour.
Prints and writes a line for each quality: mean and most |difference| of P(clean), Spearman's rank
correlation, and the share of verdicts that flip. The toy judge knows toy clips only: on real ones
its drift says how steady it is, not how right.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.score import TOY_JUDGE, toy_clips
from cac_reward.batch import find_clips
from cac_reward.scorer import MODES, CaCScorer
from cac_reward.video import Video
from cac_reward.whole_files import whole_file

QUALITIES = (0, 18, 28)
LONGEST_SIDE = 832
BATCH = 4


@dataclass(frozen=True)
class Drift:
    """What one quality does to the scores."""

    crf: int
    clips: int
    """Clips with a score before and after."""
    unjudged: int
    """Clips without one of them."""
    mean: float
    """Of |P(clean) after - before|."""
    largest: float
    rank_correlation: float
    """Spearman's, ties at their mean rank; NaN where all scores are one."""
    flipped: float
    """Share of verdicts that change sides of 0.5; NaN, as all figures, where no clip counts."""


def ranks(values: Tensor) -> Tensor:
    """[N] ranks from 0, ties at the mean of theirs."""
    below = (values[None, :] < values[:, None]).sum(dim=1)
    equal = (values[None, :] == values[:, None]).sum(dim=1)
    return below + (equal - 1) / 2


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's: Pearson's correlation of the ranks of two [N]; NaN where one has no order."""
    first, second = (ranks(values).double() for values in (one, other))
    first, second = first - first.mean(), second - second.mean()
    scale = math.sqrt(first.square().sum().item() * second.square().sum().item())
    return (first * second).sum().item() / scale if scale else math.nan


def compare(crf: int, before: Tensor, after: Tensor) -> Drift:
    """Compare two [N] of P(clean), NaN where there is none."""
    known = before.isfinite() & after.isfinite()
    before, after = before[known], after[known]
    moved = (after - before).abs()
    return Drift(
        crf=crf,
        clips=len(moved),
        unjudged=int((~known).sum()),
        mean=moved.mean().item() if len(moved) else math.nan,
        largest=moved.max().item() if len(moved) else math.nan,
        rank_correlation=rank_correlation(before, after),
        # The mean of nothing is NaN.
        flipped=((before >= 0.5) != (after >= 0.5)).float().mean().item(),
    )


def score_clips(scorer: CaCScorer, clips: Sequence[Video]) -> Tensor:
    """[N] P(clean)."""
    rewards = []
    for start in range(0, len(clips), BATCH):
        rewards += [one.reward for one in scorer.inspect(clips[start : start + BATCH])]
        print(f"\r{len(rewards)} of {len(clips)} clips", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return torch.tensor(rewards, dtype=torch.double)


def through_codec(clip: Video, crf: int) -> Video:
    """The clip as it comes back from an mp4; an odd row or column is cut off before."""
    height, width = clip.height // 2 * 2, clip.width // 2 * 2
    even = Video(clip.frames[:, :, :height, :width], clip.fps, clip.source)
    return Video.decode(io.BytesIO(even.encode(crf=crf)), fps=clip.fps)


def write_table(drifts: Sequence[Drift]) -> str:
    """Markdown."""
    lines = [
        "| crf | clips | unjudged | mean | max | rank correlation | verdicts flipped |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in drifts:
        figures = ["no clip has a score"] * 4
        if one.clips:
            order = one.rank_correlation
            figures = [f"{one.mean:.4f}", f"{one.largest:.4f}"]
            figures += ["no order" if math.isnan(order) else f"{order:.4f}", f"{one.flipped:.1%}"]
        cells = [str(one.crf), str(one.clips), str(one.unjudged), *figures]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plain(one: Drift) -> dict[str, float | None]:
    """A line as JSON has it; a figure that there is none of is null."""
    return {name: None if math.isnan(value) else value for name, value in asdict(one).items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codec_drift", description=__doc__)
    parser.add_argument("--judge", default=TOY_JUDGE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mode", choices=MODES, default="fast")
    parser.add_argument("--clips", type=int, default=64, help="rendered toy clips")
    parser.add_argument("--videos", type=Path, nargs="+", help="files or folders in their place")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    scorer = CaCScorer.from_pretrained(given.judge, device=given.device, mode=given.mode)
    if given.videos:
        paths = [clip.path for clip in find_clips(given.videos)]
        clips = [Video.decode(path, longest_side=LONGEST_SIDE) for path in paths]
    else:
        clips = toy_clips(given.clips, seed=2_000_000)
    before = score_clips(scorer, clips)
    drifts = []
    for crf in QUALITIES:
        after = score_clips(scorer, [through_codec(clip, crf) for clip in clips])
        drifts.append(compare(crf, before, after))
    table = f"{scorer.judge.name}, mode {given.mode}\n\n{write_table(drifts)}\n"
    given.output.mkdir(parents=True, exist_ok=True)
    with whole_file(given.output / "codec_drift.json") as opened:
        opened.write(json.dumps([plain(one) for one in drifts], indent=1, allow_nan=False) + "\n")
    with whole_file(given.output / "codec_drift.md") as opened:
        opened.write(table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
