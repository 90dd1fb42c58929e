"""Videos that the toy generator needs to halve its faults, with each kind of credit.

    python -m benchmarks.credit --seeds 0 1 2 3 4
    python -m benchmarks.credit --arms grounded --seeds 0   # One process for each arm.
    python -m benchmarks.credit --only-table

Every run is that of a row of `benchmarks.algorithms` with another seed and another `credit`;
the judge looks in full mode, so that its blame has boxes. The oracle only watches: a reward of
weight 0 whose score of every update's own videos stands in metrics.jsonl. A run ends when it has
halved the base's rate. What is finished is not run again and what was stopped goes on from its last
checkpoint, so that arms may run in several processes. Writes credit.json and credit.md (also
printed) into the folder. With --keep the curves are written to a folder, too, and read from there
where a run is gone.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from benchmarks.algorithms import ROWS, row_tree
from benchmarks.runs import first_there, keep_curve, kept_curve, train_to_end
from cac_reward.whole_files import whole_file
from diffusion_rl.collect import collect
from diffusion_rl.configuration import RunSettings, build, to_tree
from diffusion_rl.launch import Run, prepare
from diffusion_rl.progress import StepReport
from diffusion_rl.tracking import METRICS_FILE, read_metrics
from examples.toy_world import oracle

ROW = "awm"
"""Rows that replay recorded steps do not halve the rate in so many updates."""
OUTPUT = Path("runs/credit")
BASE_FILE = "base.json"
ORACLE = {
    "name": "oracle",
    "target": "examples.toy_world.demo_evaluation:judge_by_oracle",
    "weight": 0.0,
}
WINDOW = 320
"""Training videos that make one measurement of the rate; whole updates."""
DRAWS = 10_000
"""Of the bootstrap."""
ARMS: Mapping[str, Mapping[str, Any]] = {
    "uniform": {"name": "uniform"},
    "grounded": {"name": "grounded"},
    "random": {"name": "random"},
    "grounded_balanced": {"name": "grounded", "balanced": True},
    "random_balanced": {"name": "random", "balanced": True},
}
"""Settings of credit, without mix and clip."""


@dataclass(frozen=True)
class Curve:
    """One run, as the oracle saw its videos."""

    arm: str
    seed: int
    videos: Sequence[int]
    """Training videos drawn so far, at the end of each update."""
    rates: Sequence[float]
    """Share of each update's videos that are broken."""
    focused_share: float
    """Mean over updates of the share of negative advantage that was focused."""
    focus_area: float
    """Mean over updates of the share of the latent that it was focused on; NaN without focus."""


def run_settings(options: argparse.Namespace, arm: str, seed: int) -> RunSettings:
    """The row with the arm's credit, a judge that draws boxes, and the oracle watching."""
    tree = OmegaConf.to_container(
        OmegaConf.merge(row_tree(options.row), OmegaConf.from_dotlist(options.set))
    )
    assert isinstance(tree, dict)
    tree["rewards"][0]["options"]["mode"] = "full"
    tree["rewards"].append(ORACLE)
    mix = None if arm == "uniform" else options.mix
    tree["credit"] = {**ARMS[arm], "mix": mix, "clip": options.clip}
    output = str(options.output / f"{arm}_{seed}")
    return build({**tree, "seed": seed, "updates": options.updates, "output": output})


def said_of(report: StepReport) -> str:
    """What is printed of an update."""
    broken = 1 - report.rewards["oracle"]
    return f"broken {broken:.2f}, focused {report.focused_share:.2f}"


def base_rate(options: argparse.Namespace) -> dict[str, float]:
    """How often the base generator breaks videos under the recipe's own exploration; kept."""
    known = first_there(BASE_FILE, options.output, options.keep)
    if known is not None:
        return json.loads(known.read_text(encoding="utf-8"))
    settings = run_settings(options, "uniform", seed=options.base_seed)
    tree = {**to_tree(settings), "output": str(options.output / "base")}
    run: Run = prepare(build(tree))
    broken: list[bool] = []
    for step in range(1, options.base_updates + 1):
        batch = collect(run.generator, run.embeddings, settings.finetune_settings(), step=step)
        texts = [run.prompts[index] for index in batch.trajectory.prompt_index.tolist()]
        reports = oracle.judge_videos(batch.trajectory.videos, texts, run.generator.fps)
        broken += [report.broken for report in reports]
    rate = float(np.mean(broken))
    figures = {"rate": rate, "videos": len(broken), "half_width": half_width(rate, len(broken))}
    with whole_file(options.output / BASE_FILE) as file:
        file.write(json.dumps(figures))
    return figures


def half_width(rate: float, count: int) -> float:
    """Half of a 95% normal interval of a share."""
    return 1.96 * math.sqrt(max(rate * (1 - rate), 0.0) / count)


def read_curve(options: argparse.Namespace, arm: str, seed: int) -> Curve | None:
    """What a run has written so far, or what was kept of it; None before its second update."""
    lines = read_metrics(options.output / f"{arm}_{seed}" / METRICS_FILE)
    if len(lines) < 2:
        kept = kept_curve(options.keep, f"{arm}_{seed}")
        return None if kept is None else Curve(**kept)
    first = lines[0]["videos_generated"]
    each = lines[1]["videos_generated"] - first
    areas = [line["focus_area"] for line in lines if line["focus_area"] is not None]
    return Curve(
        arm,
        seed,
        # Not those of the self-check and of the guards' reference: they are the same in every arm.
        [line["videos_generated"] - first + each for line in lines],
        [1 - line["rewards/oracle"] for line in lines],
        float(np.mean([line["focused_share"] for line in lines])),
        float(np.mean(areas)) if areas else math.nan,
    )


def videos_to_halve(curve: Curve, base: float) -> float:
    """Videos up to the end of the first WINDOW videos with a mean rate of half the base's.

    Infinity where the run ended before.

    Example:
        >>> videos_to_halve(Curve("uniform", 0, [320, 640, 960], [0.6, 0.4, 0.2], 0, 0), 0.5)
        960.0
    """
    window = updates_of_window(curve)
    for last in range(window, len(curve.rates) + 1):
        if np.mean(curve.rates[last - window : last]) <= base / 2:
            return float(curve.videos[last - 1])
    return math.inf


def updates_of_window(curve: Curve) -> int:
    """Updates that draw WINDOW videos, at least."""
    return math.ceil(WINDOW / curve.videos[0])


def has_halved(options: argparse.Namespace, arm: str, seed: int) -> bool:
    """Whether a run has come to what is asked of it."""
    curve = read_curve(options, arm, seed)
    return curve is not None and math.isfinite(videos_to_halve(curve, base_rate(options)["rate"]))


def mean_over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 95% bootstrap; NaN in place of that where there is one seed only."""
    numbers, random = np.array(values), np.random.default_rng(0)
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return mean, math.nan, math.nan
    draws = numbers[random.integers(len(numbers), size=(DRAWS, len(numbers)))].mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return mean, float(low), float(high)


def compare(
    needed: Mapping[str, Mapping[int, float]], arm: str, other: str = "uniform"
) -> dict[str, float] | None:
    """Geometric mean over seeds of the videos of `arm` against `other`, with its 95% bootstrap.

    None without seeds of which both arms came to their end.
    """
    seeds = [
        seed
        for seed, videos in needed[arm].items()
        if math.isfinite(videos) and math.isfinite(needed[other].get(seed, math.inf))
    ]
    if not seeds:
        return None
    logarithms = [math.log(needed[arm][seed] / needed[other][seed]) for seed in seeds]
    ratio, low, high = map(math.exp, mean_over_seeds(logarithms))
    return {"seeds": len(seeds), "ratio": ratio, "low": low, "high": high}


def subtract(
    means: Mapping[str, Mapping[int, float]], arm: str, other: str = "uniform"
) -> dict[str, float] | None:
    """Mean over seeds of how much more breaks with `arm` than with `other`, with its 95% bootstrap.

    Knows of runs that never halved the rate, of which `compare` knows nothing. None without seeds
    of which there are both.
    """
    seeds = [seed for seed in means[arm] if seed in means[other]]
    if not seeds:
        return None
    more, low, high = mean_over_seeds([means[arm][seed] - means[other][seed] for seed in seeds])
    return {"seeds": len(seeds), "more": more, "low": low, "high": high}


def summarise(curves: Sequence[Curve], base: Mapping[str, float]) -> dict[str, Any]:
    """What the runs say, as plain numbers."""
    needed: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
    rows = []
    # Runs of different lengths are compared up to where the shortest one has come.
    shared = min((len(curve.rates) for curve in curves), default=0)
    for curve in curves:
        videos = needed[curve.arm][curve.seed] = videos_to_halve(curve, base["rate"])
        each, window = curve.videos[0], updates_of_window(curve)
        parts = {
            "first": curve.rates[:window],
            "last": curve.rates[max(0, shared - window) : shared],
            "all": curve.rates[:shared],
        }
        rates = {
            name: [float(np.mean(part)), half_width(float(np.mean(part)), each * len(part))]
            for name, part in parts.items()
        }
        rows.append(
            {
                "arm": curve.arm,
                "seed": curve.seed,
                "updates": len(curve.rates),
                "videos": curve.videos[-1],
                "videos_to_halve": videos if math.isfinite(videos) else None,
                "rates": rates,
                "focused_share": curve.focused_share,
                "focus_area": curve.focus_area if math.isfinite(curve.focus_area) else None,
            }
        )
    others = [arm for arm in ARMS if arm != "uniform"]
    means = {arm: {} for arm in ARMS}
    for row in rows:
        means[row["arm"]][row["seed"]] = row["rates"]["all"][0]
    return {
        **{"base": base, "window": WINDOW, "compared": shared, "runs": rows},
        "ratios": {arm: compare(needed, arm) for arm in others},
        "differences": {arm: subtract(means, arm) for arm in others},
    }


def keep_all(folder: Path, curves: Sequence[Curve], base: Mapping[str, float]) -> None:
    """Write the curves and the base's rate to where they outlast the runs."""
    for curve in curves:
        keep_curve(folder, f"{curve.arm}_{curve.seed}", curve)
    with whole_file(folder / BASE_FILE) as file:
        file.write(json.dumps(base) + "\n")


def write_table(figures: Mapping[str, Any]) -> str:
    """The figures in Markdown."""
    base, window, shared = figures["base"], figures["window"], figures["compared"]
    lines = [
        f"Base generator: {base['rate']:.3f} +- {base['half_width']:.3f} broken "
        f"({base['videos']} videos, exploring). Rates are means over {window} videos; all runs "
        f"are compared up to update {shared}.",
        "",
        "| credit | seed | updates | videos to halve | broken, first | broken, last | broken, mean "
        "| focused | area |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["runs"]:
        rates = [f"{mean:.3f} +- {half:.3f}" for mean, half in row["rates"].values()]
        needed = row["videos_to_halve"]
        area = "" if row["focus_area"] is None else f"{row['focus_area']:.2f}"
        cells = [row["arm"], row["seed"], row["updates"]]
        cells += [f"not in {row['videos']}" if needed is None else f"{needed:.0f}", *rates]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['focused_share']:.2f} | {area} |")
    lines.append("")
    for arm, ratio in figures["ratios"].items():
        said = f"{arm} against uniform: no seed in which both halved the rate"
        if ratio is not None:
            interval = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio["seeds"] > 1 else ""
            said = f"{arm} against uniform: {ratio['ratio']:.2f} times the videos{interval}"
            said += f", {ratio['seeds']} seed(s)"
        more = figures["differences"][arm]
        if more is not None:
            interval = f" ({more['low']:+.3f} to {more['high']:+.3f})" if more["seeds"] > 1 else ""
            said += f"; up to update {shared} {more['more']:+.3f} broken{interval}"
            said += f", {more['seeds']} seed(s)"
        lines.append(f"- {said}")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then write the table of what there is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--row", choices=ROWS, default=ROW)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--mix", type=float, default=1.0)
    parser.add_argument("--clip", choices=("video", "position"), default="video")
    parser.add_argument("--base-updates", type=int, default=8)
    parser.add_argument("--base-seed", type=int, default=1000)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the row's config"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of curves beside the runs")
    parser.add_argument("--only-table", action="store_true")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in [] if options.only_table else options.seeds:
        for arm in options.arms:
            enough = partial(has_halved, options, arm, seed)
            train_to_end(run_settings(options, arm, seed), said_of, enough)
    base = base_rate(options)
    curves = [
        curve
        for arm in ARMS
        for seed in options.seeds
        if (curve := read_curve(options, arm, seed)) is not None
    ]
    if options.keep is not None:
        keep_all(options.keep, curves, base)
    figures = summarise(curves, base)
    with whole_file(options.output / "credit.json") as file:
        file.write(json.dumps(figures, indent=1))
    table = write_table(figures)
    with whole_file(options.output / "credit.md") as file:
        file.write(table)
    print(table)


if __name__ == "__main__":
    main()
