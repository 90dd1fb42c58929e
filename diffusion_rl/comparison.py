"""Before against after on the same prompts and seeds: paired, with intervals.

Axes: N pairs of videos, P prompts, S bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_rl.shapes import check_shape

CONFIDENCE = 0.95
_MAX_DRAWS = 4_000_000
"""Numbers drawn at once; bounds the memory of a bootstrap."""


@dataclass(frozen=True)
class Estimate:
    """A number and the interval that the data leaves for it."""

    value: float
    """From all pairs."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end of the 95% interval."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """One measure of the base and the tuned generator."""

    pairs: int
    """Pairs in which both videos have a value."""
    missing: int
    """Pairs left out because one has none (NaN)."""
    base: float
    """Mean over the base generator's videos."""
    tuned: float
    """Mean over the tuned generator's videos."""
    difference: Estimate
    """tuned - base."""
    ratio: Estimate | None
    """tuned / base; None where base is not above 0."""


@dataclass(frozen=True)
class McNemar:
    """The exact test of two rates measured on the same pairs."""

    only_base: int
    """Pairs with the fault in the base video alone."""
    only_tuned: int
    """Pairs with the fault in the tuned video alone."""
    p_value: float
    """Two-sided: how often a fair coin splits the pairs that differ so unevenly."""


def relative_reduction(
    base: Tensor,
    tuned: Tensor,
    *,
    group: Tensor | None = None,
    samples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Say by what share a rate went down, with a paired bootstrap interval.

    reduction = 1 - mean(tuned) / mean(base)

    Args:
        base: [N] of the base generator, at least 0 (for a rate: 0 or 1); NaN leaves the pair out.
        tuned: [N] of the tuned generator on the same prompts and seeds.
        group: [N] integer, the prompt of each pair: whole prompts are then drawn, which is right
            when videos of one prompt are alike. None draws single pairs.
        samples: S, bootstrap samples, at least 1.
        seed: Of the bootstrap.

    Returns:
        1 means none is left, 0 no change, below 0 more than before.

    Raises:
        ValueError: A shape or value is wrong, or the base has none to reduce.
    """
    pairs = _pairs(base, tuned, group)
    if bool((pairs[0] < 0).any()) or bool((pairs[1] < 0).any()):
        raise ValueError("base and tuned must be at least 0 for a relative reduction")
    if not pairs[0].mean() > 0:
        raise ValueError("base must have a mean above 0, got 0; there is nothing to reduce")
    return _bootstrap(pairs, _reduction, samples, seed)


def compare(
    base: Tensor,
    tuned: Tensor,
    *,
    group: Tensor | None = None,
    samples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare one measure of two generators on the same prompts and seeds.

    Args:
        base: [N] of the base generator; NaN leaves the pair out.
        tuned: [N] of the tuned generator.
        group: [N] integer, the prompt of each pair, see `relative_reduction`.
        samples: S, bootstrap samples, at least 1.
        seed: Of the bootstrap.

    Raises:
        ValueError: A shape is wrong or no pair is left.
    """
    pairs = _pairs(base, tuned, group)
    before, after, _ = pairs
    comparable = bool((before >= 0).all()) and before.mean() > 0
    return Comparison(
        pairs=len(before),
        missing=len(base) - len(before),
        base=before.mean().item(),
        tuned=after.mean().item(),
        difference=_bootstrap(pairs, lambda b, t: t - b, samples, seed),
        ratio=_bootstrap(pairs, lambda b, t: 1 - _reduction(b, t), samples, seed)
        if comparable
        else None,
    )


def mcnemar(base: Tensor, tuned: Tensor) -> McNemar:
    """Test whether a fault is rarer in one generator than in the other, exactly.

    p_value = min(1, 2 * P(X <= min(only_base, only_tuned))),
              X ~ Binomial(only_base + only_tuned, 1 / 2)

    Args:
        base: [N] 0 or 1; NaN leaves the pair out.
        tuned: [N] 0 or 1, on the same prompts and seeds.

    Raises:
        ValueError: A shape is wrong or a value is neither 0 nor 1.

    Source:
        McNemar, Psychometrika 12 (1947), with the exact binomial distribution.
    """
    before, after, _ = _pairs(base, tuned, None)
    for name, values in (("base", before), ("tuned", after)):
        strange = values[(values != 0) & (values != 1)]
        if len(strange):
            raise ValueError(f"{name} must be 0 or 1, got {strange[0].item()}")
    only_base = int((before > after).sum())
    only_tuned = int((after > before).sum())
    count = only_base + only_tuned
    # Integers throughout: the powers of two overflow a float beyond a thousand pairs.
    ways = sum(math.comb(count, k) for k in range(min(only_base, only_tuned) + 1))
    return McNemar(only_base, only_tuned, min(1.0, 2 * ways / 2**count))


def compare_all(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], group: Tensor | None = None
) -> dict[str, Comparison]:
    """Compare every measure of two generators.

    Args:
        base: Measure's name to its values [N].
        tuned: The same names.
        group: [N] integer, the prompt of each pair, see `relative_reduction`.

    Raises:
        ValueError: The names differ, or a measure cannot be compared.
    """
    if set(base) != set(tuned):
        raise ValueError(
            f"tuned must have the measures of base {sorted(base)}, got {sorted(tuned)}"
        )
    return {name: compare(base[name], tuned[name], group=group) for name in base}


_Pairs = tuple[Tensor, Tensor, Tensor]


def _pairs(base: Tensor, tuned: Tensor, group: Tensor | None) -> _Pairs:
    """Both values of the pairs that have both, in float64, and what they are drawn by."""
    axes = check_shape("base", base, "N")
    check_shape("tuned", tuned, "N", **axes)
    if group is None:
        group = torch.arange(axes["N"])
    check_shape("group", group, "N", **axes)
    base, tuned = base.detach().cpu().double(), tuned.detach().cpu().double()
    if bool(base.isinf().any() | tuned.isinf().any()):
        raise ValueError("base and tuned must be finite, or NaN where there is no value")
    complete = ~(base.isnan() | tuned.isnan())
    if not bool(complete.any()):
        raise ValueError(
            f"base and tuned must share a pair with both values, got none of {len(base)}"
        )
    return base[complete], tuned[complete], group.cpu()[complete]


def _reduction(base: Tensor, tuned: Tensor) -> Tensor:
    """1 - tuned / base; a sample without any in the base counts as the worst, or as no change."""
    worst = torch.where(tuned > 0, -torch.inf, 0.0)
    return torch.where(base > 0, 1 - tuned / base.clamp_min(torch.finfo(base.dtype).tiny), worst)


def _bootstrap(
    pairs: _Pairs, statistic: Callable[[Tensor, Tensor], Tensor], samples: int, seed: int
) -> Estimate:
    """A statistic of two means, with the percentile interval over resampled pairs or prompts."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    base, tuned, group = pairs
    _, prompt = group.unique(return_inverse=True)
    count = int(prompt.max()) + 1
    per_prompt = torch.zeros(count, 3, dtype=torch.float64)
    per_prompt.index_add_(0, prompt, torch.stack([base, tuned, torch.ones_like(base)], dim=1))

    source = torch.Generator().manual_seed(seed)
    drawn = []
    rows = max(1, _MAX_DRAWS // count)
    for start in range(0, samples, rows):
        size = (min(rows, samples - start), count)
        chosen = torch.randint(count, size, generator=source)
        total_base, total_tuned, number = per_prompt[chosen].sum(dim=1).unbind(dim=1)
        drawn.append(statistic(total_base / number, total_tuned / number))
    ordered = torch.cat(drawn).sort().values
    outside = (1 - CONFIDENCE) / 2
    # Whole places of the sorted samples: interpolating between infinities would give NaN.
    low = ordered[math.floor(outside * (samples - 1))].item()
    high = ordered[math.ceil((1 - outside) * (samples - 1))].item()
    return Estimate(statistic(base.mean(), tuned.mean()).item(), low, high)
