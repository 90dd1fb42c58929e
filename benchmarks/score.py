"""How fast clips are judged, and at what cost: by mode, by batch, and against two naive calls.

    python -m benchmarks.score --output runs/score
    python -m benchmarks.score --random-weights qwen3-vl-4b --device cuda --output runs/score_4b

Without --random-weights the toy judge looks at rendered toy clips of 32x32. With it, a model of the
published size with random weights looks at 81 frames of 480x832; its answers are scripted, so that
every clip takes both turns, and writes as many tokens as --call-tokens and --findings-tokens say.
"From scratch" forgets between the turns what was read, as two separate calls would. Writes a
Markdown table (also printed) and JSON into the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.judges import SHAPES, Count, MeasuredJudge, random_judge
from cac_reward.scorer import MODES, CaCScorer
from cac_reward.video import Video
from cac_reward.whole_files import whole_file
from examples.toy_world.world import render_clip

TOY_JUDGE = "examples/toy_world/checkpoints/judge"
TURNS = ("continued", "from scratch")


@dataclass(frozen=True)
class Row:
    """One measurement."""

    mode: str
    batch: int
    turns: str
    clips: int
    seconds: float
    """Of the fastest repetition."""
    clips_per_second: float
    second_looks: float
    """Share of the clips that took turn 2."""
    tokens_read: int
    tokens_written: int
    encoder_calls: int
    frames_encoded: int
    peak_bytes: float
    """Most memory of the process (CPU) or allocated on the device; NaN where it is not known."""


def toy_clips(count: int, seed: int) -> list[Video]:
    """Rendered clips of the toy world, half of them faulty."""
    clips = [render_clip(seed + index, split="evaluation") for index in range(count)]
    return [
        Video(torch.from_numpy(clip.frames).permute(0, 3, 1, 2).contiguous(), clip.fps)
        for clip in clips
    ]


def noise_clips(count: int, seed: int) -> list[Video]:
    """81 frames of 480x832 at 16 frames a second; what they show does not change the work."""
    chance = torch.Generator().manual_seed(seed)
    still = torch.randint(0, 256, (count, 1, 3, 480, 832), generator=chance, dtype=torch.uint8)
    return [Video(one.expand(81, -1, -1, -1).contiguous(), 16.0) for one in still]


def reset_peak(device: str) -> None:
    """Forget the most memory that was used so far."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def read_peak(device: str) -> float:
    """Most memory in bytes since `reset_peak`."""
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated(device))
    if not Path("/proc/self/status").exists():
        return math.nan
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure(
    scorer: CaCScorer, count: Count, clips: Sequence[Video], turns: str, repeats: int
) -> Row:
    """Judge the clips a few times over; time is the least, counts are those of one time."""
    judge = scorer.judge
    assert isinstance(judge, MeasuredJudge)
    judge.forgetful = turns == TURNS[1]
    device = str(judge._reader.model.device)
    scorer.inspect(clips[: scorer.clips_at_once])  # Kernels are chosen and memory is had once.
    reset_peak(device)
    times = []
    for _ in range(repeats):
        for name in asdict(count):
            setattr(count, name, 0)
        wait(device)
        began = time.perf_counter()
        reports = scorer.inspect(clips)
        wait(device)
        times.append(time.perf_counter() - began)
    return Row(
        mode=scorer.mode,
        batch=scorer.clips_at_once,
        turns=turns,
        clips=len(clips),
        seconds=min(times),
        clips_per_second=len(clips) / min(times),
        second_looks=sum(bool(one.windows) for one in reports) / len(reports),
        peak_bytes=read_peak(device),
        **asdict(count),
    )


def write_table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each mode and batch, and what from scratch takes as a multiple."""
    lines = [
        "| mode | batch | clips/s | second looks | tokens read | written | encoder calls | frames "
        "encoded | peak MB | from scratch: time | tokens | frames |",
        "| --- " + "| ---: " * 11 + "|",
    ]
    for row in rows:
        if row.turns != TURNS[0]:
            continue
        naive = next(
            one
            for one in rows
            if (one.mode, one.batch, one.turns) == (row.mode, row.batch, TURNS[1])
        )
        lines.append(
            f"| {row.mode} | {row.batch} | {row.clips_per_second:.2f} | {row.second_looks:.0%} | "
            f"{row.tokens_read} | {row.tokens_written} | {row.encoder_calls} | "
            f"{row.frames_encoded} | {row.peak_bytes / 1e6:.0f} | "
            f"{naive.seconds / row.seconds:.2f}x | {naive.tokens_read / row.tokens_read:.2f}x | "
            f"{naive.frames_encoded / row.frames_encoded:.2f}x |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 0 also where the device that was asked for is not there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.score", description=__doc__)
    parser.add_argument("--judge", default=TOY_JUDGE, help="folder of the toy judge")
    parser.add_argument("--random-weights", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--call-tokens", type=int, default=40)
    parser.add_argument("--findings-tokens", type=int, default=160)
    parser.add_argument("--max-batch-tokens", type=int, default=65536, help="random weights only")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"skipped: --device {given.device} was asked for and this machine has no CUDA device")
        return 0
    limits = {}
    if given.random_weights:
        judge = random_judge(
            given.random_weights, given.judge, given.device, given.max_batch_tokens
        )
        clips = noise_clips(given.clips, seed=0)
        limits = {
            "max_call_tokens": given.call_tokens,
            "max_findings_tokens": given.findings_tokens,
        }
    else:
        judge = MeasuredJudge.from_pretrained(given.judge, device=given.device)
        clips = toy_clips(given.clips, seed=1_000_000)
    count = judge.watch()
    rows = []
    for mode in given.modes:
        for batch in given.batches:
            scorer = CaCScorer(judge, mode=mode, clips_at_once=batch, **limits)
            rows += [measure(scorer, count, clips, turns, given.repeats) for turns in TURNS]
            print(f"{mode}, batch {batch}: {rows[-2].seconds:.2f} s", file=sys.stderr, flush=True)
    device = torch.cuda.get_device_name() if given.device.startswith("cuda") else platform.machine()
    facts = {
        "judge": judge.name,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    table = ", ".join(f"{name} {value}" for name, value in facts.items()) + "\n\n"
    table += write_table(rows) + "\n"
    given.output.mkdir(parents=True, exist_ok=True)
    with whole_file(given.output / "score.json") as opened:
        opened.write(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    with whole_file(given.output / "score.md") as opened:
        opened.write(table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
