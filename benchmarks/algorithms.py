"""Every algorithm row on the toy world: how far the oracle's anomaly rate falls, and what it costs.

    python -m benchmarks.algorithms --seeds 0 1 2
    python -m benchmarks.algorithms --rows grpo nft --seeds 0   # One process for each few rows.
    python -m benchmarks.algorithms --rows drawn implied implied_held   # `grpo` by rollout.outcome.
    python -m benchmarks.algorithms --rows own_steps   # `grpo` with steps of each group.
    python -m benchmarks.algorithms --only-table

Every run is a config of configs/rl with another `algorithm`; rewards, guards, prompts and videos of
an update are the same for all. The oracle watches as an evaluation reward: the same held-out videos
(prompts and noise), drawn without exploration by what the run would save. What is finished is not
run again and what was stopped goes on from its last checkpoint. Writes algorithms.md (also printed)
into the folder. With --keep the curves are written to a folder, too, and read from there where a
run is gone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.runs import first_there, keep_curve, kept_curve, train_to_end
from cac_reward.whole_files import whole_file
from diffusion_rl.configuration import RunSettings, build, load_config, to_tree
from diffusion_rl.launch import prepare
from diffusion_rl.progress import StepReport
from diffusion_rl.prompts import read_prompts
from diffusion_rl.rollout import rollout
from diffusion_rl.tracking import METRICS_FILE, read_metrics
from examples.toy_world import oracle

OUTPUT = Path("runs/algorithms")
BASE_FILE = "base.txt"
RECORDED, NOISED = "configs/rl/toy_grpo.yaml", "configs/rl/toy_nft.yaml"
ORACLE = {"name": "oracle", "target": "examples.toy_world.demo_evaluation:judge_by_oracle"}
PROMPTS = "examples/toy_world/prompts/evaluation.txt"
EVERY = 10
"""Updates between two looks of the oracle."""
PER_PROMPT = 4
"""Held-out videos of each of 32 prompts."""
MEASURED = "evaluation/oracle"
Axis = Literal["videos", "seconds"]
MARKS: Mapping[Axis, Sequence[int]] = {
    "videos": (800, 1500, 2700, 4000, 5300, 7800),
    "seconds": (150, 300, 600, 900),
}
"""At which `write_progress` looks."""


@dataclass(frozen=True)
class Row:
    """How a row is run on the toy world."""

    config: str
    """A YAML; its rewards, guards and prompts are kept."""
    algorithm: Mapping[str, Any] | None = None
    """Takes the place of the YAML's; None keeps it."""
    rollout: Mapping[str, Any] | None = None
    """Beside the YAML's."""
    optimizer: Mapping[str, Any] | None = None
    """Beside the YAML's."""


# Flow-SDE and DanceGRPO's steps blur an eight-step video (docs/results/demo.md), so that rows which
# may take coefficients-preserving steps do; those that need a density explore less.
CPS = {"transition": "cps", "clip_range": 2e-3, "kl_weight": 1e-3, "inner_steps": 2}
QUIET = {"noise_level": 0.4, "eligible_steps": 5}
ROWS: Mapping[str, Row] = {
    "ddpo": Row(RECORDED, {"name": "ddpo", **CPS}),
    "grpo": Row(RECORDED),
    # As published, a group begins from the same noise.
    "dance_grpo": Row(RECORDED, {"name": "dance_grpo", **CPS}, {"shared_noise": True}),
    "mix_grpo": Row(RECORDED, {"name": "mix_grpo", **CPS, "updates_per_window": 10}),
    "grpo_guard": Row(RECORDED, {"name": "grpo_guard", "kl_weight": 1e-3, "inner_steps": 2}, QUIET),
    "dppo": Row(RECORDED, {"name": "dppo", "kl_weight": 1e-3, "inner_steps": 2}, QUIET),
    "nft": Row(NOISED),
    "awm": Row(NOISED, {"name": "awm", "kl_weight": 0.02, "old_decay_rate": 0.02}),
    # Errors of velocities, its paper's gains, taught it half as fast: 64% broken at update 50.
    "online_dpo": Row(
        NOISED,
        {
            **{"name": "online_dpo", "pairs": 2, "weighting": "ghuber", "beta": 50.0},
            **{"refresh_every": 10, "noise_levels": 6, "kl_weight": 1.0},
        },
        optimizer={"learning_rate": 1e-3},
    ),
    # Nothing holds it to the policy that drew: at nft's rate it fell apart within ten updates.
    "raft": Row(
        NOISED, {"name": "raft", "keep": 2, "kl_weight": 0.1}, optimizer={"learning_rate": 3e-4}
    ),
}
# Every step but the last learns, nearer to the plain sampler and as fast as `awm`.
ALL_STEPS = {"stochastic_steps": 7, "noise_level": 0.3}
GENTLE = {"name": "grpo", "transition": "cps", "clip_range": 2e-3, "kl_weight": 3e-3}
FAST = {"learning_rate": 2e-3, "max_grad_norm": 0.4}
HELD = {"learning_rate": 1.5e-3, "max_grad_norm": 0.4, "final_share": 0.5}
VARIANTS: Mapping[str, Row] = {
    # `grpo` with steps of its own for each group.
    "own_steps": Row(RECORDED, rollout={"steps_of": "group"}),
    "drawn": Row(RECORDED, GENTLE, {**ALL_STEPS, "outcome": "drawn"}, FAST),
    "implied": Row(RECORDED, GENTLE, {**ALL_STEPS, "outcome": "implied"}, FAST),
    # The one above fell apart after 80 updates.
    "implied_held": Row(
        RECORDED, {**GENTLE, "kl_weight": 1e-2}, {**ALL_STEPS, "outcome": "implied"}, HELD
    ),
}
"""Run when they are named: what recorded steps learn from, and which of them."""
EVERY_ROW = {**ROWS, **VARIANTS}


@dataclass(frozen=True)
class Curve:
    """What the oracle saw of one run."""

    row: str
    seed: int
    updates: Sequence[int]
    """At which it looked."""
    rates: Sequence[float]
    """Share of the held-out videos that are broken."""
    videos: Sequence[int]
    """Drawn for training up to then."""
    seconds: Sequence[float]
    """Spent in updates up to then."""

    def halved(self, base: float) -> int | None:
        """Place of the first look at half the base's rate or less; None if there is none."""
        return next((at for at, rate in enumerate(self.rates) if rate <= base / 2), None)


def row_tree(name: str) -> dict[str, Any]:
    """A row's settings on the toy world."""
    row = EVERY_ROW[name]
    tree = to_tree(load_config(row.config))
    if row.algorithm is not None:
        tree["algorithm"] = dict(row.algorithm)
    tree["rollout"].update(row.rollout or {})
    tree["optimizer"].update(row.optimizer or {})
    return tree


def run_settings(options: argparse.Namespace, name: str, seed: int) -> RunSettings:
    """A row's run, watched by the oracle."""
    tree = row_tree(name)
    tree["evaluation"] = {
        **{"rewards": [ORACLE], "prompts": PROMPTS},
        **{"every": EVERY, "videos_per_prompt": PER_PROMPT},
    }
    output = str(options.output / f"{name}_{seed}")
    return build({**tree, "seed": seed, "updates": options.updates, "output": output})


def said_of(report: StepReport) -> str | None:
    """What is printed of an update that the oracle looked at."""
    if not report.evaluation:
        return None
    return f"broken {1 - report.evaluation['oracle']:.3f}, {report.seconds:.0f} s"


def base_rate(options: argparse.Namespace) -> float:
    """How often the untrained generator breaks the held-out videos; kept."""
    known = first_there(BASE_FILE, options.output, options.keep)
    if known is not None:
        return float(known.read_text(encoding="utf-8"))
    tree = to_tree(run_settings(options, "nft", seed=0))
    run = prepare(build({**tree, "output": str(options.output / "base")}))
    assert run.held_out is not None
    prompts, embeddings = run.held_out.prompts, run.held_out.embeddings
    assert embeddings is not None
    index = torch.arange(len(prompts)).repeat_interleave(PER_PROMPT)
    own = run.settings.rollout
    drawn = rollout(run.generator, embeddings, index, range(len(index)), own)
    texts = [prompts[one] for one in index.tolist()]
    reports = oracle.judge_videos(drawn.videos, texts, run.generator.fps)
    rate = float(np.mean([report.broken for report in reports]))
    with whole_file(options.output / BASE_FILE) as file:
        file.write(repr(rate))
    return rate


def read_curve(options: argparse.Namespace, row: str, seed: int) -> Curve | None:
    """What a run has written so far, or what was kept of it; None if the oracle has not looked."""
    lines = read_metrics(options.output / f"{row}_{seed}" / METRICS_FILE)
    seen = [line for line in lines if line.get(MEASURED) is not None]
    if not seen:
        kept = kept_curve(options.keep, f"{row}_{seed}")
        return None if kept is None else Curve(**kept)
    each = PER_PROMPT * len(read_prompts(PROMPTS))
    return Curve(
        row,
        seed,
        [line["step"] for line in seen],
        [1 - line[MEASURED] for line in seen],
        [line["videos_generated"] - look * each for look, line in enumerate(seen, start=1)],
        [line["seconds"] for line in seen],
    )


def mean_and_spread(values: Sequence[float], form: str) -> str:
    """A mean, and the least and the most where there are several."""
    if len(values) == 1:
        return form.format(values[0])
    low, high = form.format(min(values)), form.format(max(values))
    return f"{form.format(float(np.mean(values)))} ({low} to {high})"


def write_table(base: float, curves: Sequence[Curve]) -> str:
    """One line for each row, over its seeds."""
    lines = [
        f"Base generator: {100 * base:.1f}% broken. In brackets least and most of the seeds.",
        "",
        "| row | seeds | updates | broken at the end | fewer | lowest | videos to halve "
        "| seconds to halve | seconds an update |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in EVERY_ROW:
        own = [curve for curve in curves if curve.row == row]
        if not own:
            continue
        last = [curve.rates[-1] for curve in own]
        halves = [(curve, curve.halved(base)) for curve in own]
        reached = [(curve, at) for curve, at in halves if at is not None]
        videos, seconds = "not reached", ""
        if reached:
            of_all = "" if len(reached) == len(own) else f", {len(reached)} of {len(own)} seeds"
            videos = mean_and_spread([one.videos[at] for one, at in reached], "{:,.0f}") + of_all
            seconds = mean_and_spread([one.seconds[at] for one, at in reached], "{:.0f}")
        each = [curve.seconds[-1] / curve.updates[-1] for curve in own]
        cells = [
            *(row, str(len(own)), str(min(curve.updates[-1] for curve in own))),
            mean_and_spread([100 * rate for rate in last], "{:.1f}%"),
            mean_and_spread([100 * (1 - rate / base) for rate in last], "{:.0f}%"),
            mean_and_spread([100 * min(curve.rates) for curve in own], "{:.1f}%"),
            *(videos, seconds, mean_and_spread(each, "{:.1f}")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_progress(curves: Sequence[Curve], axis: Axis) -> str:
    """How many are broken after so many videos or seconds: means over a row's seeds.

    Of each run the last look at or before a mark counts; where one of the seeds had ended before
    it, or not been looked at, there is nothing.
    """
    marks = MARKS[axis]
    lines = [
        f"| row | seeds | {' | '.join(f'{mark:,} {axis}' for mark in marks)} |",
        f"|---|---|{'---|' * len(marks)}",
    ]
    for row in EVERY_ROW:
        own = [curve for curve in curves if curve.row == row]
        if not own:
            continue
        cells = []
        for mark in marks:
            spent = [getattr(curve, axis) for curve in own]
            places = [np.searchsorted(one, mark, side="right") for one in spent]
            ended = [mark > one[-1] * (1 + 1 / len(one)) for one in spent]
            seen = [curve.rates[place - 1] for curve, place in zip(own, places, strict=True)]
            whole = all(places) and not any(ended)
            cells.append(f"{100 * float(np.mean(seen)):.1f}%" if whole else "")
        lines.append(f"| {row} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then write the table of what there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--rows", nargs="+", choices=list(EVERY_ROW), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of curves beside the runs")
    parser.add_argument("--only-table", action="store_true")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in [] if options.only_table else options.seeds:
        for row in options.rows:
            train_to_end(run_settings(options, row, seed), said_of)
    curves = [
        curve
        for row in EVERY_ROW
        for seed in options.seeds
        if (curve := read_curve(options, row, seed)) is not None
    ]
    base = base_rate(options)
    if options.keep is not None:
        for curve in curves:
            keep_curve(options.keep, f"{curve.row}_{curve.seed}", curve)
        with whole_file(options.keep / BASE_FILE) as file:
            file.write(f"{base!r}\n")
    table = "\n".join(
        [write_table(base, curves), *(write_progress(curves, axis) for axis in MARKS)]
    )
    with whole_file(options.output / "algorithms.md") as file:
        file.write(table)
    print(table)


if __name__ == "__main__":
    main()
