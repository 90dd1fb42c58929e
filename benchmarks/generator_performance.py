"""Seconds and memory of one update, rollout and learning apart, at a generator's real size.

    python -m benchmarks.generator_performance --checkpointing --output runs/performance
    python -m benchmarks.generator_performance --model tiny --device cpu --videos 5x32x32

The weights are random, which changes neither time nor memory; the reward is the videos' brightness.
Each update draws --prompts x --group videos in 20 steps and learns from 3 of them (GRPO). The first
update of a size is left out of the times. Writes performance.json and performance.md into the
folder, with what benchmarks.memory_estimate counts beside what was measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.generators import SHAPES, random_embeddings
from benchmarks.memory_estimate import build_learner, estimate, rollout_settings
from benchmarks.score import read_peak, reset_peak
from cac_reward.whole_files import whole_file
from diffusion_rl.finetune import FinetuneSettings, finetune
from diffusion_rl.generators.settings import ATTENTION_BACKENDS, ExecutionSettings
from diffusion_rl.rewards import Reward


@dataclass(frozen=True)
class Row:
    """One size."""

    videos: str
    """Frames x height x width."""
    group: int
    """Videos of an update."""
    rollout_seconds: float
    """Of an update's videos, drawn and decoded; median."""
    update_seconds: float
    """Of what is learnt from them; median."""
    rollout_peak: float
    """Most bytes while drawing; NaN where it is not known."""
    update_peak: float
    """Most bytes while learning."""
    estimated_rollout_peak: int
    """By counting."""
    estimated_update_peak: int
    """By counting."""


class Meter:
    """The reward: it is asked between rollout and update, where it also reads the peak."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.rollout_peaks: list[float] = []

    def __call__(self, videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
        self.rollout_peaks.append(read_peak(self.device))
        reset_peak(self.device)
        return videos.mean((1, 2, 3, 4))


def measure(given: argparse.Namespace, videos: str) -> Row:
    """Run the updates of one size."""
    given.frames, given.height, given.width = (int(number) for number in videos.split("x"))
    expected = estimate(given)
    execution = ExecutionSettings(
        gradient_checkpointing=given.checkpointing,
        vae_tiling=given.tiling,
        attention=given.attention,
        compile_blocks=given.compile_blocks,
    )
    generator = build_learner(given, given.device, execution)
    meter = Meter(given.device)
    settings = FinetuneSettings(rollout=rollout_settings(given), updates=given.updates + 1)
    embeddings = random_embeddings(given.model, generator, given.prompts)
    texts = [f"prompt {number}" for number in range(given.prompts)]
    reports, update_peaks = [], []
    reset_peak(given.device)
    loop = finetune(generator, [Reward("meter", meter)], texts, settings, embeddings=embeddings)
    started = time.monotonic()
    for report in loop:
        update_peaks.append(read_peak(given.device))
        reset_peak(given.device)
        reports.append(report)
        now = time.monotonic()
        print(f"{videos}: update {report.step}, {now - started:.1f} s", file=sys.stderr, flush=True)
    timed = reports[1:]
    return Row(
        videos=videos,
        group=given.prompts * given.group,
        rollout_seconds=statistics.median(report.collect_seconds for report in timed),
        update_seconds=statistics.median(report.update_seconds for report in timed),
        rollout_peak=max(meter.rollout_peaks),
        update_peak=max(update_peaks),
        estimated_rollout_peak=expected.rollout_peak,
        estimated_update_peak=expected.update_peak,
    )


def write_table(rows: Sequence[Row]) -> str:
    """Rows as Markdown; memory in units of 10^9 bytes."""
    lines = [
        "| videos | each | rollout s | update s | rollout GB | counted | update GB | counted |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        pairs = (
            (row.rollout_peak, row.estimated_rollout_peak),
            (row.update_peak, row.estimated_update_peak),
        )
        memory = " | ".join(f"{one / 1e9:.2f} | {other / 1e9:.2f}" for one, other in pairs)
        lines.append(
            f"| {row.videos} | {row.group} | {row.rollout_seconds:.2f} | {row.update_seconds:.2f} "
            f"| {memory} |"
        )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=SHAPES, default="wan2.1-1.3b")
    parser.add_argument(
        "--videos", nargs="+", default=["33x240x416", "81x480x832"], help="frames x height x width"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA")
    parser.add_argument("--prompts", type=int, default=1, help="groups in an update")
    parser.add_argument("--group", type=int, default=8, help="videos of a prompt")
    parser.add_argument("--micro-batch", type=int, default=1, help="videos in one pass")
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--updates", type=int, default=2, help="timed, after one that is not")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again")
    parser.add_argument("--tiling", action="store_true", help="decode in tiles")
    parser.add_argument("--attention", choices=ATTENTION_BACKENDS)
    parser.add_argument("--compile-blocks", metavar="BACKEND", help="of torch.compile: inductor")
    parser.add_argument("--output", type=Path, default=Path("runs/performance"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every size and write the table."""
    given = build_parser().parse_args(arguments)
    if given.updates < 1:
        raise SystemExit(f"--updates must be at least 1, got {given.updates}")
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"--device must be there, got {given.device} without a GPU; nothing measured")
        return 1
    rows = []
    for videos in given.videos:
        rows.append(measure(given, videos))
        gc.collect()
    name = torch.cuda.get_device_name() if given.device.startswith("cuda") else platform.machine()
    options = {key: value for key, value in vars(given).items() if key != "output"}
    facts = {"device_name": name, "torch": torch.__version__, **options}
    given.output.mkdir(parents=True, exist_ok=True)
    with whole_file(given.output / "performance.json") as opened:
        opened.write(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    head = ", ".join(f"{key} {value}" for key, value in facts.items())
    with whole_file(given.output / "performance.md") as opened:
        opened.write(f"{head}\n\n{write_table(rows)}\n")
    print(write_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
