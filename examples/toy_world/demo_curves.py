"""The demo's curves: its training, and what the same training does without guards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_rl.charts import BarChart, Line, LineChart
from diffusion_rl.clips import Clip
from diffusion_rl.page import Section, Table, VideoPair
from examples.toy_world.demo_evaluation import JUDGE, SUMMARY_MEASURES
from examples.toy_world.stored_run import StoredRun

SMOOTH = 8
Curves = Mapping[str, Sequence[float | None]]


def training_section(name: str, curves: Curves, other: StoredRun | None) -> Section:
    """The curves of training, and the other row's beside them."""
    charts = [
        LineChart(
            title="What the rewards said",
            lines=[
                _line("P(clean), CaC judge", curves, f"rewards/{JUDGE}"),
                _line("P(yes), prompt alignment", curves, "rewards/alignment"),
            ],
            x_label="updates",
            y_range=(0.0, 1.0),
            smooth=SMOOTH,
        ),
        LineChart(
            title="What the guards saw, as a share of the base generator",
            lines=[
                _line(key.removeprefix("guards/"), curves, key)
                for key in curves
                if key.startswith("guards/")
            ],
            x_label="updates",
            percent=True,
            smooth=SMOOTH,
        ),
    ]
    if other is not None:
        charts.append(
            LineChart(
                title="Two rows of the table of algorithms",
                lines=[
                    _line(f"{name} (this run)", curves, f"rewards/{JUDGE}", "seconds"),
                    _line(
                        f"{other.algorithm} (stored)", other.curves, f"rewards/{JUDGE}", "seconds"
                    ),
                ],
                x_label="seconds of training",
                y_label="P(clean)",
                y_range=(0.0, 1.0),
                smooth=SMOOTH,
                caption=f"{other.algorithm} was run beforehand with {other.config} on "
                f"{other.machine}: broken videos {other.base['anomaly_rate_oracle']:.0%} before, "
                f"{other.tuned['anomaly_rate_oracle']:.0%} after.",
            )
        )
    charts.append(
        LineChart(
            title="Distance from the base generator (KL term)",
            lines=[_line("kl", curves, "kl")],
            x_label="updates",
            smooth=SMOOTH,
        )
    )
    return Section(title="Training", charts=charts)


PROMPT_POINTS, KEPT_SHARE = 3.0, 0.9
"""What a run may lose of prompts followed, in points, and keep of motion and diversity."""


def hack_section(stored: StoredRun, curves: Curves, summary: Mapping[str, Any]) -> Section:
    """The stored run without guards."""
    rows: list[list[str | float | int]] = []
    for name in SUMMARY_MEASURES:
        share = "rate" in name or "match" in name
        numbers = (stored.base[name], stored.tuned[name], summary["tuned"][name])
        shown = [f"{100 * number:.1f}%" if share else f"{number:.3g}" for number in numbers]
        rows.append([name.replace("_", " "), *shown])
    return Section(
        title="What happens without guards",
        paragraphs=[
            "The same judge as the only reward, with no prompt alignment, no guards and no KL "
            f"term ({stored.config}, {stored.updates} updates, run beforehand on "
            f"{stored.machine}). {hack_verdict(stored)}"
        ],
        tables=[
            Table(
                title="Without guards against this run",
                columns=["measure", "base", "without guards", "this run"],
                rows=rows,
            )
        ],
        charts=_hack_charts(stored, curves),
        video_pairs=[
            VideoPair(
                prompt=pair.prompt,
                base=Clip(pair.base.float() / 255, stored.fps),
                tuned=Clip(pair.tuned.float() / 255, stored.fps),
            )
            for pair in stored.pairs
        ],
    )


def hack_verdict(stored: StoredRun) -> str:
    """Whether a run without guards paid for its reward with something else, by the oracle."""
    lost = []
    fallen = 100 * (stored.base["prompt_match"] - stored.tuned["prompt_match"])
    if fallen > PROMPT_POINTS:
        lost.append(f"prompts followed fell by {fallen:.1f} points")
    for name in ("motion", "diversity"):
        share = stored.tuned[name] / stored.base[name]
        if share < KEPT_SHARE:
            lost.append(f"{name} fell to {share:.0%} of the base")
    if lost:
        return f"The judge was pleased, and something else paid for it: {' and '.join(lost)}."
    return (
        "In so few updates nothing was hacked: prompts followed, motion and diversity between "
        "seeds held by the oracle, so that here the guards cost little and had little to prevent. "
        "A longer or faster run without them has no such promise."
    )


def _hack_charts(stored: StoredRun, curves: Curves) -> list[LineChart | BarChart]:
    """The judge's opinion, what the guards would have watched, and the faults by the oracle."""
    kinds = stored.tuned_faults
    return [
        LineChart(
            title="The judge's opinion without guards",
            lines=[
                _line("without guards", stored.curves, f"rewards/{JUDGE}"),
                _line("this run", curves, f"rewards/{JUDGE}"),
            ],
            x_label="updates",
            y_label="P(clean)",
            y_range=(0.0, 1.0),
            smooth=SMOOTH,
        ),
        LineChart(
            title="What nobody guarded, as a share of the base generator",
            lines=[
                _line(key.removeprefix("guards/"), stored.curves, key)
                for key in stored.curves
                if key.startswith("guards/")
            ],
            x_label="updates",
            percent=True,
            smooth=SMOOTH,
        ),
        BarChart(
            title="Faults by the oracle, before and after the unguarded run",
            labels=list(kinds),
            series={
                "base": [stored.base_faults[kind] for kind in kinds],
                "without guards": list(kinds.values()),
            },
            percent=True,
        ),
    ]


def _line(name: str, curves: Curves, key: str, along: str = "step") -> Line:
    values = curves.get(key, ())
    places = curves.get(along, ())[: len(values)]
    numbers = [math.nan if value is None else value for value in values]
    return Line(name, [0.0 if place is None else place for place in places], numbers)
