"""Where advantages go: pooling by brute force, and the properties that credit must keep."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rl.blame import LatentGrid, blame_weights, move_at_random, pool_blame
from diffusion_rl.credit import (
    Credit,
    CreditSettings,
    ScorePart,
    assign_credit,
    blamed_shares,
    check_blame,
)
from diffusion_rl.generators.base import AbstractVideoGenerator

GROUPS = (range(1), range(1, 5), range(5, 9))  # Wan: frame 0 alone, then groups of four.
GRID = LatentGrid(GROUPS, 3, 2)
GROUNDED = CreditSettings(name="grounded")
GROUP = torch.tensor([0, 0, 1, 1])
NAN = math.nan


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def one_part(score: Sequence[float], blame: Tensor | None) -> list[ScorePart]:
    return [ScorePart(torch.tensor(score), blame)]


def assign(
    advantages: Sequence[float],
    parts: Sequence[ScorePart],
    settings: CreditSettings = GROUNDED,
    seeds: Sequence[int] = (5, 6, 7, 8),
) -> Credit:
    return assign_credit(torch.tensor(advantages), parts, GROUP, GRID, seeds, settings)


def in_cells(side: int, pixels: int) -> list[list[float]]:
    """How much of each pixel lies in each cell, by cutting the side into side * pixels slivers."""
    shares = [[0.0] * pixels for _ in range(side)]
    for sliver in range(side * pixels):
        shares[sliver // pixels][sliver // side] += 1 / pixels
    return shares


@pytest.mark.parametrize("size", [(3, 2), (6, 8), (1, 1), (2, 3), (5, 7), (12, 5)])
def test_pooling_is_the_mean_over_what_a_position_shows(size: tuple[int, int]) -> None:
    blame = noise(2, 9, *size)
    pooled = pool_blame(blame, GRID)
    rows, columns = in_cells(3, size[0]), in_cells(2, size[1])
    for video, t, h, w in product(range(2), range(3), range(3), range(2)):
        expected = sum(
            blame[video, frame, y, x].item() * rows[h][y] * columns[w][x] / len(GROUPS[t])
            for frame in GROUPS[t]
            for y, x in product(range(size[0]), range(size[1]))
        )
        assert pooled[video, t, h, w].item() == pytest.approx(expected, rel=1e-9)


def test_the_first_frame_is_a_latent_frame_of_its_own() -> None:
    for frame, expected in (
        (0, [1, 0, 0]),
        (1, [0, 0.25, 0]),
        (4, [0, 0.25, 0]),
        (5, [0, 0, 0.25]),
    ):
        blame = torch.zeros(1, 9, 4, 4)
        blame[:, frame] = 1
        assert pool_blame(blame, GRID)[0, :, 0, 0].tolist() == expected


@pytest.mark.parametrize("factor", [2, 3, 5])
@pytest.mark.parametrize("size", [(3, 2), (4, 7)])
def test_a_map_drawn_larger_gives_the_same_weights(factor: int, size: tuple[int, int]) -> None:
    blame = noise(2, 9, *size)
    larger = blame.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    expected = pool_blame(blame, GRID)
    torch.testing.assert_close(pool_blame(larger, GRID), expected)
    weights = [blame_weights(one, GRID).float() for one in (expected, pool_blame(larger, GRID))]
    torch.testing.assert_close(weights[1], weights[0])


def test_weights_follow_blame_and_not_its_strength() -> None:
    blame = noise(3, 9, 6, 4)
    weights = blame_weights(pool_blame(blame, GRID), GRID)
    torch.testing.assert_close(weights.mean((1, 2, 3)), torch.ones(3, dtype=torch.float64))
    faint = blame_weights(pool_blame(1e-6 * blame, GRID), GRID)
    torch.testing.assert_close(faint, weights)
    blame[1] = 0.0
    blame[2] = 0.3
    weights = blame_weights(pool_blame(blame, GRID), GRID)
    assert bool((weights[1:] == 1).all())
    assert bool((weights[0] != 1).any())


def test_maps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="blame must have the 9 frames that the latent .*got 8"):
        pool_blame(torch.zeros(1, 8, 4, 4), GRID)
    for value in (-0.1, NAN):
        with pytest.raises(ValueError, match="blame must be at least 0, got"):
            pool_blame(torch.full((1, 9, 4, 4), value), GRID)
    with pytest.raises(ValueError, match="axes 'B F Y X' need 4 axes"):
        pool_blame(torch.zeros(9, 4, 4), GRID)


def test_shares_are_parts_of_the_shortfall() -> None:
    judge = [0.0, 1.0, 0.4, 0.4]
    guards = [-0.5, -0.5, -0.9, -0.1]
    extra = [0.25, 0.75, 0.0, 0.2]
    shares = blamed_shares(torch.tensor([judge, guards, extra]), GROUP)
    # Shortfalls of video 0: 0.5, 0, 0.25; of video 2: 0, 0.4, 0.1; 1 and 3 lead their groups.
    expected = torch.tensor([[2 / 3, 0, 0, 0], [0, 0, 0.8, 0], [1 / 3, 0, 0.2, 0]])
    torch.testing.assert_close(shares, expected)


def test_unjudged_videos_have_no_share_and_no_say() -> None:
    scores = torch.tensor([[0.0, NAN, 1.0, 2.0, 3.0], [0.0, 0.0, 1.0, 0.5, NAN]])
    shares = blamed_shares(scores, torch.tensor([0, 0, 1, 1, 1]))
    # Video 0 is alone in its group, 1 and 4 are not judged; 2 and 3 have mean 1.5 and 0.75.
    assert shares.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]
    parts = [ScorePart(torch.tensor([NAN, 1.0, 0.0, 1.0]), noise(4, 9, 6, 4))]
    credit = assign([0.0, 0.0, -1.0, 1.0], parts)
    assert credit.focused.tolist() == [False, False, True, False]
    assert not credit.weights.isnan().any()


def test_only_what_is_below_average_and_has_blame_is_focused() -> None:
    blame = noise(4, 9, 6, 4)
    blame[2] = 0.0
    credit = assign([-1.0, 1.0, -2.0, 2.0], one_part([0.0, 1.0, 0.0, 1.0], blame))
    assert credit.focused.tolist() == [True, False, False, False]
    assert bool((credit.weights[1:] == 1).all())
    expected = blame_weights(pool_blame(blame, GRID), GRID)[0].float()
    torch.testing.assert_close(credit.weights[0], expected)


@pytest.mark.parametrize("name", ["grounded", "random"])
@pytest.mark.parametrize("mix", [0.25, 1.0])
def test_the_total_weight_of_a_video_is_unchanged(name: str, mix: float) -> None:
    parts = [
        *one_part([0.0, 1.0, 0.0, 1.0], noise(4, 9, 5, 4)),
        *one_part([0.0, 0.3, 1.0, 0.0], noise(4, 9, 2, 3, seed=1)),
        *one_part([0.5, 1.0, 0.9, 1.0], None),
    ]
    credit = assign([-1.0, 1.0, -2.0, 2.0], parts, CreditSettings(name=name, mix=mix))
    assert credit.focused.tolist() == [True, False, True, False]
    torch.testing.assert_close(credit.weights.mean((1, 2, 3)), torch.ones(4))
    total = credit.advantages[:, None, None, None] * credit.weights
    torch.testing.assert_close(total.mean((1, 2, 3)), credit.advantages)
    # No position is pushed against the sign of its video.
    assert bool((credit.weights >= 0).all())


def test_the_rest_of_the_disadvantage_is_spread() -> None:
    """A video that owes half of what it lacks to the guards is focused by half."""
    blame = noise(4, 9, 6, 4)
    judge = one_part([0.0, 1.0, 0.5, 0.5], blame)
    guards = one_part([-1.0, 0.0, 0.0, 0.0], None)
    alone = assign([-1.0, 1.0, 0.0, 0.0], judge).weights
    both = assign([-1.0, 1.0, 0.0, 0.0], [*judge, *guards]).weights
    torch.testing.assert_close(both[0], (1 + alone[0]) / 2)
    mixed = assign([-1.0, 1.0, 0.0, 0.0], judge, CreditSettings(name="grounded", mix=0.5)).weights
    torch.testing.assert_close(mixed, both)
    # Wholly the guards' fault: nothing to focus, whatever the judge drew.
    assert assign([-1.0, 1.0, 0.0, 0.0], [*one_part([0.5] * 4, blame), *guards]).weights is None


def test_even_blame_and_no_mix_are_uniform_credit() -> None:
    scores = [0.0, 1.0, 0.0, 1.0]
    advantages = [-1.0, 1.0, -1.0, 1.0]
    for blame in (torch.full((4, 9, 7, 5), 0.3), torch.zeros(4, 9, 7, 5)):
        assert assign(advantages, one_part(scores, blame)).weights is None
    blame = noise(4, 9, 7, 5)
    assert assign(advantages, one_part(scores, blame)).weights is not None
    for settings in (CreditSettings(name="grounded", mix=0.0), CreditSettings()):
        assert assign(advantages, one_part(scores, blame), settings).weights is None


def test_rewards_that_never_blame_are_refused() -> None:
    for name in ("grounded", "random"):
        with pytest.raises(ValueError, match=f"credit.name must be uniform .* got {name}"):
            check_blame([None, None], CreditSettings(name=name))
        check_blame([None, torch.zeros(4, 9, 2, 2)], CreditSettings(name=name))
    check_blame([None], CreditSettings())


def test_without_any_blame_all_is_spread() -> None:
    for name in ("grounded", "random"):
        parts = one_part([0.0, 1.0, 0.0, 1.0], None)
        credit = assign([-1.0, 1.0, -2.0, 2.0], parts, CreditSettings(name=name))
        assert credit.weights is None
        assert credit.advantages.tolist() == [-1.0, 1.0, -2.0, 2.0]


BALANCED = CreditSettings(name="grounded", balanced=True)


def parts_of(blame: Tensor | None) -> list[ScorePart]:
    return one_part([0.0, 1.0, 0.0, 1.0], blame)


@pytest.mark.parametrize("name", ["grounded", "random"])
@pytest.mark.parametrize("mix", [0.4, 1.0])
def test_balanced_advantages_of_a_group_cancel_at_every_position(name: str, mix: float) -> None:
    """By loops: what is above average has the mean weights of what is below."""
    parts = [
        *one_part([0.0, 0.2, 1.0, 0.9, 0.1, 0.1, 0.3, 0.8], noise(8, 9, 5, 4)),
        *one_part([0.5, 0.3, 0.9, 1.0, 0.5, 0.2, 0.2, 0.9], None),
    ]
    advantages = torch.tensor([-2.0, -0.5, 1.5, 1.0, -0.5, -1.0, 0.0, 1.5])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    places = (group, GRID, range(8))
    plain, balanced = (
        assign_credit(
            advantages, parts, *places, CreditSettings(name=name, mix=mix, balanced=balanced)
        ).weights
        for balanced in (False, True)
    )
    for index in range(2):
        members = [row for row in range(8) if group[row] == index]
        below = [row for row in members if advantages[row] < 0]
        size = -sum(advantages[row].item() for row in below)
        expected = sum(-advantages[row] / size * plain[row] for row in below)
        for row in members:
            own = expected if advantages[row] > 0 else plain[row]
            torch.testing.assert_close(balanced[row], own)
        total = sum(advantages[row] * balanced[row] for row in members)
        torch.testing.assert_close(total, torch.zeros(3, 3, 2), rtol=0, atol=1e-6)
        assert sum(advantages[row] * plain[row] for row in members).abs().max() > 0.1
    torch.testing.assert_close(balanced.mean((1, 2, 3)), torch.ones(8))
    assert bool((balanced >= 0).all())


def test_balanced_credit_leaves_alone_what_no_video_of_the_group_is_blamed_for() -> None:
    blame = torch.zeros(4, 9, 6, 4)
    blame[0, :, :2, :2] = 1.0
    blame[2, :, 4:, 2:] = 1.0
    credit = assign([-1.0, 1.0, -2.0, 2.0], parts_of(blame), BALANCED)
    for pair in ((0, 1), (2, 3)):
        first, second = (credit.weights[row] for row in pair)
        assert torch.equal(first, second)
        assert torch.count_nonzero(first) == len(GROUPS)
    assert credit.focused.tolist() == [True] * 4
    # Of the disadvantage alone, as without balance.
    assert credit.focused_share == assign([-1.0, 1.0, -2.0, 2.0], parts_of(blame)).focused_share


def test_balanced_credit_without_places_is_uniform_credit() -> None:
    for blame in (torch.full((4, 9, 7, 5), 0.3), torch.zeros(4, 9, 7, 5), None):
        assert assign([-1.0, 1.0, -1.0, 1.0], parts_of(blame), BALANCED).weights is None
    # A group in which nothing is below average, and one whose videos could not be judged.
    blame = noise(4, 9, 6, 4)
    assert assign([0.0, 1.0, 0.0, 0.0], parts_of(blame), BALANCED).weights is None


def test_random_credit_is_the_same_region_at_another_place() -> None:
    blame = torch.zeros(4, 9, 6, 4)
    blame[:, 1:5, :2, :2] = 0.8
    parts, advantages = one_part([0.0, 1.0, 0.0, 1.0], blame), [-1.0, 1.0, -1.0, 1.0]
    grounded = assign(advantages, parts)
    random = CreditSettings(name="random")
    places = set()
    for seed in range(40):
        moved = assign(advantages, parts, random, seeds=(seed, 1, 2, 3))
        again = assign(advantages, parts, random, seeds=(seed, 9, 9, 9))
        assert torch.equal(moved.weights[0], again.weights[0])
        for video in (0, 2):
            values = [one.weights[video].flatten().sort().values for one in (grounded, moved)]
            assert torch.equal(*values)
        places.add(int(moved.weights[0].argmax()))
    assert len(places) > 12  # Of the 18 that there are.
    # Videos of one group that start from the same noise are moved each by itself.
    same = [assign(advantages, parts, random, seeds=(seed,) * 4).weights for seed in range(5)]
    assert any(not torch.equal(one[0], one[2]) for one in same)


def test_the_columns_of_ratios() -> None:
    """By loops: one mean under the weights for each video, or every position."""
    positions, weights = noise(2, 3, 3, 2), 2 * noise(2, 3, 3, 2, seed=1)
    weights = weights / weights.mean((1, 2, 3), keepdim=True)
    advantages, whole = torch.tensor([-1.0, 2.0]), positions.flatten(1).mean(1)
    credit = Credit(advantages, weights)
    expected = [
        sum(p * w for p, w in zip(*(one[video].flatten().tolist() for one in (positions, weights))))
        / 18
        for video in range(2)
    ]
    torch.testing.assert_close(credit.columns(whole, positions), torch.tensor(expected)[:, None])
    assert torch.equal(credit.column_advantages(18), advantages)
    torch.testing.assert_close(credit.widths(18)[:, 0], weights.square().mean((1, 2, 3)).sqrt())
    each = Credit(advantages, weights, "position")
    assert torch.equal(each.columns(whole, positions), positions.flatten(1))
    torch.testing.assert_close(each.column_advantages(18).mean(1), advantages)
    assert torch.equal(each.widths(18), torch.full((2, 18), 18**0.5))
    plain = Credit(advantages)
    assert torch.equal(plain.columns(whole, positions)[:, 0], whole)
    assert plain.widths(18) is None
    # A video without a focus keeps its own mean, beside one with.
    half = Credit(advantages, torch.stack([weights[0], torch.ones(3, 3, 2)]))
    assert half.columns(whole + 1, positions)[1, 0] == whole[1] + 1


def test_how_much_is_focused_is_said() -> None:
    weights = torch.ones(3, 2, 2, 2)
    weights[0] = 0.0
    weights[0, 0, 0] = 4.0  # Two of eight positions.
    credit = Credit(torch.tensor([-1.0, -3.0, 5.0]), weights)
    assert credit.focus_area == pytest.approx(0.25)
    assert credit.focused_share == pytest.approx(0.25 * 0.75)  # A quarter of it, where 3/4 moved.
    assert Credit(torch.tensor([-1.0])).focused_share == 0.0
    assert math.isnan(Credit(torch.tensor([-1.0])).focus_area)
    assert Credit(torch.tensor([1.0, 2.0, 5.0]), weights).focused_share == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "grounding"}, "name must be one of uniform, grounded, random, got grounding"),
        ({"clip": "frame"}, "clip must be one of video, position, got frame"),
        ({"name": "grounded", "mix": 1.5}, r"mix must be in \[0, 1\], got 1.5"),
        ({"name": "random", "mix": NAN}, r"mix must be in \[0, 1\], got nan"),
        ({"mix": 0.5}, "mix must be left out with name 'uniform', got 0.5"),
        ({"balanced": True}, "balanced must be left out with name 'uniform', got True"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CreditSettings(**options)


FAMILIES = {
    "wan": ("wan", "WanGenerator", "build_tiny_wan", {}),
    "wan2.2": ("wan22", "Wan22Generator", "build_tiny_ti2v", {}),
    "cogvideox": ("cogvideox", "CogVideoXGenerator", "build_tiny_cogvideox", {}),
    "cogvideox1.5": (
        *("cogvideox", "CogVideoXGenerator", "build_tiny_cogvideox"),
        {"version": "1.5"},
    ),
    "ltx": ("ltx", "LtxGenerator", "build_tiny_ltx", {}),
    "hunyuan1.5": ("hunyuan15", "HunyuanVideo15Generator", "build_tiny_hunyuan15", {}),
}


def build(family: str) -> AbstractVideoGenerator:
    module, kind, builder, options = FAMILIES[family]
    tiny = importlib.import_module(f"tests.tiny_{module}")
    size = tiny.TI2V_SIZE if family == "wan2.2" else tiny.SIZE
    made: AbstractVideoGenerator = getattr(
        importlib.import_module(f"diffusion_rl.generators.{module}"), kind
    )(getattr(tiny, builder)(**options), **size)
    return made


CAUSAL = ("wan", "wan2.2", "hunyuan1.5")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_what_its_latent_frames_show(family: str) -> None:
    """Against its own decoder: the frames that change when one latent frame does."""
    generator = build(family)
    generator.num_frames = 17
    groups = generator.frame_groups
    assert len(groups) == generator.latent_shape[1]
    shown = [group for group in groups if len(group)]
    assert [frame for group in shown for frame in group] == list(range(17))
    assert [len(group) for group in shown] == [1, 4, 4, 4, 4]
    source = torch.Generator().manual_seed(0)
    latent = torch.randn((1, *generator.latent_shape), generator=source)
    before = generator.decode(latent)
    assert before.shape[1] == 17
    for place, group in enumerate(groups):
        other = latent.clone()
        other[:, :, place] += 0.5 * torch.randn(other[:, :, place].shape, generator=source)
        change = (generator.decode(other) - before).abs().mean((0, 2, 3, 4))
        changed = (change > 1e-7).nonzero().flatten().tolist()
        if not len(group):
            assert changed == []  # Cut off before decoding.
        elif family in CAUSAL:
            assert changed[0] == group[0]
        else:  # These look at later latent frames too, or normalise over several.
            near = [frame for one in groups[max(0, place - 1) : place + 2] for frame in one]
            assert int(change.argmax()) in near


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_latents_take_blame(family: str) -> None:
    generator = build(family)
    grid = LatentGrid(generator.frame_groups, *generator.latent_shape[2:])
    frames, (_, t, h, w) = generator.num_frames, generator.latent_shape
    height, width = generator.height, generator.width
    blame = torch.zeros(1, frames, height, width)
    blame[:, 0, : height // h, : width // w] = 0.4  # What one latent position shows.
    pooled = pool_blame(blame, grid)
    first = [place for place, group in enumerate(grid.frame_groups) if 0 in group][0]
    assert pooled.shape == (1, t, h, w)
    assert pooled.nonzero().tolist() == [[0, first, 0, 0]]
    assert pooled[0, first, 0, 0].item() == pytest.approx(0.4)
    even = blame_weights(pool_blame(torch.full_like(blame, 0.4), grid), grid)
    assert bool((even == 1).all())


def test_latent_frames_that_show_nothing_take_no_blame() -> None:
    grid = LatentGrid((range(0), *GROUPS), 3, 2)
    blame = noise(1, 9, 6, 4)
    weights = blame_weights(pool_blame(blame, grid), grid)
    assert bool((weights[:, 0] == 0).all())
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0).double())
    for seed in range(20):
        moved = move_at_random(weights, grid, [seed])
        assert bool((moved[:, 0] == 0).all())


def test_a_generator_of_odd_groups_must_name_them() -> None:
    generator = build("wan")
    generator.num_frames = 5
    assert generator.frame_groups == (range(1), range(1, 5))
    generator.num_frames = 1
    assert generator.frame_groups == (range(1),)

    class Odd(type(generator)):  # type: ignore[misc]
        latent_shape = (4, 3, 2, 2)

    odd = Odd.__new__(Odd)
    odd.num_frames = 6
    with pytest.raises(
        ValueError, match="frame_groups must be given .* 6 frames .* 2 equal groups"
    ):
        _ = odd.frame_groups
