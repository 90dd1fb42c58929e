"""Consensus of sampled answers: one rule, for judges here and elsewhere.

Axes: N choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Votes:
    """How answers are sampled where their consensus decides."""

    num_votes: int = 8
    """Sampled answers per question, at least 2."""
    temperature: float = 1.0
    """Of sampling, above 0."""
    seed: int = 0
    """Vote i is sampled with seed + i."""
    max_new_tokens: int = 1024
    """Most tokens of a sampled answer, at least 1; for judges here."""

    def __post_init__(self) -> None:
        for name, least in (("num_votes", 2), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    @property
    def decoder(self) -> str:
        """What reports say of it."""
        return (
            f"verdict by {self.num_votes} sampled votes at temperature {self.temperature:g}, "
            f"seed {self.seed}; texts greedy"
        )


def first_choice(text: str, prefix: str, choices: Sequence[str]) -> list[float]:
    """[N] 1 for the choice that comes first in an answer, behind the prefix's last line.

    Example:
        >>> first_choice('{"findings": []}\\nVerdict: clean', "...\\nVerdict:", [" clean", " bad"])
        [1.0, 0.0]
        >>> first_choice("I cannot tell", "", ["Yes", "No"])
        [0.0, 0.0]
    """
    line = prefix.rpartition("\n")[2]
    places = [text.find(line + choice) for choice in choices]
    found = [place for place in places if place >= 0]
    return [float(bool(found) and place == min(found)) for place in places]


def count_votes(texts: Sequence[str], prefix: str, choices: Sequence[str]) -> Tensor:
    """[N] log of the number of answers that make each choice first; NaN where none makes any."""
    votes = torch.zeros(len(choices))
    for text in texts:
        votes += torch.tensor(first_choice(text, prefix, choices))
    return votes.log() if votes.any() else torch.full_like(votes, math.nan)
