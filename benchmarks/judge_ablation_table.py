"""The table of benchmarks/judge_ablation.py from what it has left in its folder.

    python benchmarks/judge_ablation_table.py [--folder runs/judge_ablation_large] > table.md

Intervals are 95% bootstrap over seeds and clips together: each draw takes seeds with replacement,
and, since all judges saw the same clips, the same clips with replacement for all of them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

OUTPUT = Path("runs/judge_ablation")
DRAWS = 2000
Verdicts = Mapping[str, np.ndarray]
"""Of one judge on one set: `anomalous`, `p_clean`, `time_iou`, `box_iou`, each [clips]."""


def read(folder: Path, name: str) -> dict[int, Verdicts]:
    """By seed, what a variant made of a set."""
    found = {}
    for file in sorted(folder.glob(f"seed_*/{name}.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        keys = ("anomalous", "p_clean", "time_iou", "box_iou")
        columns = {key: np.array([one[key] for one in record["verdicts"]], float) for key in keys}
        columns["seconds"] = np.array([record["train_seconds"], record["judge_seconds"]])
        found[int(file.parent.name.removeprefix("seed_"))] = columns
    return found


def accuracy(one: Verdicts, rows: np.ndarray) -> float:
    """Share of right verdicts; a clip without a verdict is wrong."""
    said = one["p_clean"][rows] < 0.5
    judged = ~np.isnan(one["p_clean"][rows])
    return float(np.mean(judged & (said == (one["anomalous"][rows] > 0.5))))


def auc(one: Verdicts, rows: np.ndarray) -> float:
    """Area under the ROC curve of P(anomalous), over clips that were judged."""
    score, truth = 1 - one["p_clean"][rows], one["anomalous"][rows] > 0.5
    bad, good = score[truth & ~np.isnan(score)], score[~truth & ~np.isnan(score)]
    if not len(bad) or not len(good):
        return math.nan
    order = np.sort(good)
    below = np.searchsorted(order, bad, side="left")
    ties = np.searchsorted(order, bad, side="right") - below
    return float(np.mean(below + 0.5 * ties) / len(good))


def overlap(key: str) -> Callable[[Verdicts, np.ndarray], float]:
    """Mean overlap over anomalous clips; one that was not judged has none."""

    def measure(one: Verdicts, rows: np.ndarray) -> float:
        broken = one["anomalous"][rows] > 0.5
        return float(np.mean(np.nan_to_num(one[key][rows])[broken]))

    return measure


MEASURES: dict[str, Callable[[Verdicts, np.ndarray], float]] = {
    "accuracy": accuracy,
    "AUC": auc,
    "window IoU": overlap("time_iou"),
    "box IoU": overlap("box_iou"),
}


def estimate(
    judges: Mapping[int, Verdicts],
    measure: Callable[[Verdicts, np.ndarray], float],
    other: Mapping[int, Verdicts] | None = None,
) -> tuple[float, float, float]:
    """Mean over seeds, and the interval; of the difference to another variant if one is given."""
    seeds = sorted(judges if other is None else judges.keys() & other.keys())
    count = len(judges[seeds[0]]["anomalous"])

    def value(chosen: Sequence[int], rows: np.ndarray) -> float:
        means = [measure(judges[seed], rows) for seed in chosen]
        if other is not None:
            means = [a - measure(other[seed], rows) for a, seed in zip(means, chosen, strict=True)]
        return float(np.mean(means))

    random = np.random.default_rng(0)
    draws = [
        value(random.choice(seeds, len(seeds)), random.integers(count, size=count))
        for _ in range(DRAWS)
    ]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return value(seeds, np.arange(count)), float(low), float(high)


def show(numbers: tuple[float, float, float], signed: bool = False) -> str:
    """A value with its interval, as shares of 100 where it is a share."""
    if any(math.isnan(one) for one in numbers):
        return "-"
    form = "{:+.1f} ({:+.1f}..{:+.1f})" if signed else "{:.1f} ({:.1f}..{:.1f})"
    return form.format(*(100 * one for one in numbers))


def table(folder: Path, name: str, variants: Sequence[str], against: str) -> list[str]:
    """Rows of a set: every measure of every variant, and accuracy against one of them."""
    base = read(folder / against, name)
    head = ["variant", "seeds", *MEASURES, f"accuracy against {against}", "unjudged", "training s"]
    lines = [f"### {name}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for variant in variants:
        judges = read(folder / variant, name)
        if not judges:
            continue
        located = any(np.nansum(one["time_iou"]) > 0 for one in judges.values())
        cells = [variant, str(len(judges))]
        for measure, function in MEASURES.items():
            shown = located or "IoU" not in measure
            cells.append(show(estimate(judges, function)) if shown else "-")
        gain = estimate(judges, accuracy, base) if base and variant != against else None
        cells.append("" if gain is None else show(gain, signed=True))
        lost = np.mean([np.isnan(one["p_clean"]).mean() for one in judges.values()])
        seconds = np.mean([one["seconds"][0] for one in judges.values()])
        cells += [f"{100 * lost:.1f}%", f"{seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for every set that was judged."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", default="yes_no", help="variant to compare with (yes_no)")
    parser.add_argument("--folder", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    folder = options.folder
    variants = [one.name for one in sorted(folder.iterdir()) if one.is_dir()]
    order = [
        "yes_no",
        "yes_no_captions",
        "classifier",
        "one_turn",
        "two_turns",
        "grpo",
        "grpo_at_one",
    ]
    variants.sort(key=lambda one: (order.index(one) if one in order else len(order), one))
    names = sorted({file.stem for file in folder.glob("*/seed_*/held_out*.json")})
    for name in names:
        print("\n".join(table(folder, name, variants, options.against)))


if __name__ == "__main__":
    main()
