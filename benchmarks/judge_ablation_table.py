"""The table of benchmarks/judge_ablation.py from what it has left in its folders.

    python -m benchmarks.judge_ablation_table > table.md
    python -m benchmarks.judge_ablation_table --folders runs/judge_ablation docs/results/ablation

Intervals are 95% bootstrap over seeds and clips together: each draw takes seeds with replacement,
and, since all judges saw the same clips, the same clips with replacement for all of them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.judge_verdicts import Verdicts, read_verdicts

OUTPUT = Path("runs/judge_ablation")
DRAWS = 2000
ORDER = (
    "yes_no",
    "yes_no_captions",
    "classifier",
    "one_turn",
    "two_turns",
    "no_single_frame",
    "no_frame_head",
    "thinking_free",
    "grounding",
    "reflection",
    "grpo",
    "grpo_no_temporal",
    "grpo_no_spatial",
    "grpo_accuracy",
    "grpo_at_one",
)
"""Of the rows; what is not in it comes last."""


def check_paired(judged: Mapping[str, Mapping[int, Verdicts]], name: str) -> None:
    """Refuse judges that were not asked about the same clips, by what is true of those.

    Raises:
        ValueError: of two variants whose clips differ.
    """
    truths = {
        f"{variant} seed {seed}": one["anomalous"]
        for variant, judges in judged.items()
        for seed, one in judges.items()
    }
    (first, truth), *others = truths.items()
    for other, own in others:
        if not np.array_equal(truth, own):
            raise ValueError(
                f"{name}: {first} and {other} were asked about other clips; "
                "compare runs of one set of clips (--clips, --scale), in folders of their own"
            )


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


COMPARED = ("accuracy", "window IoU", "box IoU")
"""Of the measures, those whose difference to another variant is shown."""


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


def table(judged: Mapping[str, Mapping[int, Verdicts]], name: str, against: str) -> list[str]:
    """Rows of a set: every measure of every variant, and some of them against one variant."""
    check_paired(judged, name)
    base = judged.get(against, {})
    places = [one for one in COMPARED if "IoU" not in one or _locates(base)]
    compared = [f"{one} against {against}" for one in places]
    head = ["variant", "seeds", *MEASURES, *compared, "unjudged", "training s"]
    lines = [f"### {name}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for variant, judges in judged.items():
        located = _locates(judges)
        cells = [variant, str(len(judges))]
        for measure, function in MEASURES.items():
            shown = located or "IoU" not in measure
            cells.append(show(estimate(judges, function)) if shown else "-")
        paired = variant != against and judges.keys() & base.keys()
        for one in places:
            shown = paired and (located or "IoU" not in one)
            gain = estimate(judges, MEASURES[one], base) if shown else None
            cells.append("" if gain is None else show(gain, signed=True))
        lost = np.mean([np.isnan(one["p_clean"]).mean() for one in judges.values()])
        seconds = np.mean([one["seconds"][0] for one in judges.values()])
        cells += [f"{100 * lost:.1f}%", f"{seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _locates(judges: Mapping[int, Verdicts]) -> bool:
    """Whether any of them said where."""
    return any(np.nansum(one["time_iou"]) > 0 for one in judges.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for every set that was judged."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", default="yes_no", help="variant to compare with (yes_no)")
    parser.add_argument(
        "--folders",
        type=Path,
        nargs="+",
        default=[OUTPUT],
        help="of runs, or of what was kept of them; a seed that is in two is that of the first",
    )
    options = parser.parse_args(arguments)
    files = [file for one in options.folders for file in one.glob("*/seed_*/held_out*.json")]
    if not files:
        parser.error(f"--folders: no verdicts in {', '.join(map(str, options.folders))}")
    variants = {file.parent.parent.name for file in files}
    known = [*(one for one in ORDER if one in variants), *sorted(variants.difference(ORDER))]
    for name in sorted({file.stem for file in files}):
        judged = {one: read_verdicts(options.folders, one, name) for one in known}
        judged = {one: judges for one, judges in judged.items() if judges}
        print("\n".join(table(judged, name, options.against)))


if __name__ == "__main__":
    main()
