"""Which prompts an update draws, and what is known of each: how it scores and how often it ties.

A group whose scores tie teaches nothing, but costs as much as any other. Axes: B videos.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_rl.loading import near_names
from diffusion_rl.whole_files import write_whole

SAMPLINGS = ("uniform", "informative")
Statistics = dict[int, dict[str, float]]
"""Of each prompt that was drawn, by its number: COUNTS, SUMS and RECENT."""
COUNTS = ("groups", "tied_groups", "videos", "unjudged_videos")
"""Since the run began."""
SUMS = ("mean", "squares")
"""Of the judged scores: their mean, and the sum of squared distances from it (Welford)."""
RECENT = ("recent_groups", "recent_ties")
"""The same as groups and tied_groups, each earlier group counting `memory` times the next."""


@dataclass(frozen=True, kw_only=True)
class PromptSamplingSettings:
    """How the prompts of an update are chosen."""

    name: str = "uniform"
    """`uniform` goes through all prompts in shuffled passes; `informative` draws those whose groups
    tie less often."""
    floor: float = 0.1
    """Chance of a prompt whose groups always tie, as a share of one whose groups never do; in
    (0, 1], so that none is forgotten."""
    memory: float = 0.8
    """How much a group counts, by its prompt's next; in [0, 1]. A prompt that tied while the policy
    was worse may teach by now."""

    def __post_init__(self) -> None:
        if self.name not in SAMPLINGS:
            near = near_names(self.name, SAMPLINGS)
            raise ValueError(f"name must be one of {', '.join(SAMPLINGS)}, got {self.name}{near}")
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor must be in (0, 1], got {self.floor}")
        if not 0 <= self.memory <= 1:
            raise ValueError(f"memory must be in [0, 1], got {self.memory}")
        if self.name == "uniform" and self.floor != PromptSamplingSettings.floor:
            raise ValueError(
                f"floor must be left out with name 'uniform', got {self.floor}; it would be ignored"
            )


def update_source(seed: int, step: int, purpose: int = 0) -> torch.Generator:
    """Random numbers of one update, the same whether or not the run was interrupted before."""
    words = np.random.SeedSequence((seed, step, purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


def choose_prompts(count: int, wanted: int, seed: int, step: int) -> Tensor:
    """Which of `count` prompts update `step` uses: shuffled passes over all of them."""
    first = max(step - 1, 0) * wanted
    places = range(first, first + wanted)
    orders = {
        turn: torch.randperm(count, generator=update_source(seed, turn, purpose=2))
        for turn in {place // count for place in places}
    }
    return torch.stack([orders[place // count][place % count] for place in places])


def choose_informative(
    count: int, wanted: int, seed: int, step: int, statistics: Statistics, floor: float
) -> Tensor:
    """Which of `count` prompts update `step` uses, drawn without repeats by what they teach.

    chance of a prompt ~ floor + (1 - floor) * its teaching share, one draw after another

    Where more are wanted than there are, all of them come first.

    Args:
        count: Prompts there are.
        wanted: Prompts of the update.
        seed: Of the run.
        step: The update; the same one always draws alike from the same statistics.
        statistics: Of the updates before.
        floor: In (0, 1].

    Returns:
        [wanted] long.

    Source:
        Weighted draws without replacement by exponential keys: Efraimidis and Spirakis (2006).
    """
    source = update_source(seed, step, purpose=4)
    whole, rest = divmod(wanted, count)
    chances = floor + (1 - floor) * teaching_shares(count, statistics)
    waits = torch.rand(count, generator=source, dtype=torch.float64).clamp_min(1e-300).log().neg()
    drawn = (waits / chances).argsort()[:rest]
    every = [torch.randperm(count, generator=source) for _ in range(whole)]
    return torch.cat([*every, drawn])


def teaching_shares(count: int, statistics: Statistics) -> Tensor:
    """Share of each prompt's recent groups that did not tie.

    share = 1 - recent_ties / (recent_groups + 1),  the 1 is a group that did not: 1 when unknown

    Returns:
        [count] float64 in (0, 1].
    """
    shares = torch.ones(count, dtype=torch.float64)
    for prompt, found in statistics.items():
        shares[prompt] = 1 - found["recent_ties"] / (found["recent_groups"] + 1)
    return shares


def add_groups(
    statistics: Statistics, scores: Tensor, group: Tensor, prompt: Tensor, memory: float
) -> Statistics:
    """The statistics with one update's groups.

    Args:
        statistics: Before; not changed.
        scores: [B] as they are compared; NaN for an unjudged video.
        group: [B] integer, equal for the videos of one group.
        prompt: [B] integer, the number of the prompt that each video shows.
        memory: As in PromptSamplingSettings.
    """
    after = {number: dict(found) for number, found in statistics.items()}
    for index in group.unique().tolist():
        members = group == index
        number = int(prompt[members][0])
        values = scores[members].double()
        judged = values[~values.isnan()]
        tied = len(judged.unique()) < 2
        found = after.setdefault(number, dict.fromkeys((*COUNTS, *SUMS, *RECENT), 0.0))
        found["groups"] += 1
        found["tied_groups"] += tied
        found["unjudged_videos"] += len(values) - len(judged)
        found["recent_groups"] = memory * found["recent_groups"] + 1
        found["recent_ties"] = memory * found["recent_ties"] + tied
        for value in judged.tolist():
            found["videos"] += 1
            before = value - found["mean"]
            found["mean"] += before / found["videos"]
            found["squares"] += before * (value - found["mean"])
    return after


def write_statistics(path: str | Path, prompts: Sequence[str], statistics: Statistics) -> None:
    """Write `describe_prompts` as JSON, whole or not at all."""
    text = json.dumps(describe_prompts(prompts, statistics), indent=1, allow_nan=False)
    write_whole(path, text)


def check_same_prompts(path: str | Path, prompts: Sequence[str]) -> None:
    """Refuse to go on with other prompts: groups and history are kept by their numbers.

    Args:
        path: what `write_statistics` wrote of the run; nothing is said where there is none.
        prompts: as they are now.

    Raises:
        ValueError: names the first prompt that differs.
    """
    path = Path(path)
    if not path.is_file():
        return
    earlier = [one["prompt"] for one in json.loads(path.read_text(encoding="utf-8"))]
    pairs = enumerate(itertools.zip_longest(earlier, prompts), start=1)
    for number, (before, now) in pairs:
        if before != now:
            raise ValueError(
                f"prompts must be those that the run began with, got {len(prompts)} where it had "
                f"{len(earlier)}, the first that differs number {number}: {now!r}, was {before!r}; "
                f"put them back (they are in {path}), choose another output, or --restart to set "
                "the earlier run aside"
            )


def describe_prompts(prompts: Sequence[str], statistics: Statistics) -> list[dict[str, Any]]:
    """What is known of each prompt, for a reader: plain numbers, None where there are none."""
    return [_describe(text, statistics.get(number)) for number, text in enumerate(prompts)]


def _describe(text: str, found: Mapping[str, float] | None) -> dict[str, Any]:
    if found is None:
        return {"prompt": text, "groups": 0, "videos": 0, "unjudged_videos": 0} | dict.fromkeys(
            ("mean", "spread", "tie_rate", "recent_tie_rate")
        )
    videos, groups = found["videos"], found["groups"]
    return {
        "prompt": text,
        "groups": int(groups),
        "videos": int(videos),
        "unjudged_videos": int(found["unjudged_videos"]),
        "mean": found["mean"] if videos else None,
        "spread": (found["squares"] / videos) ** 0.5 if videos else None,
        "tie_rate": found["tied_groups"] / groups,
        "recent_tie_rate": found["recent_ties"] / found["recent_groups"],
    }
