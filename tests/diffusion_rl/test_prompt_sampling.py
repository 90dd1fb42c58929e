"""What is known of prompts, and how it says which come next."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from diffusion_rl.prompt_sampling import (
    PromptSamplingSettings,
    add_groups,
    choose_informative,
    choose_prompts,
    describe_prompts,
    teaching_shares,
)

NAN = float("nan")


def groups(*scores: list[float], prompts: list[int]):
    width = len(scores[0])
    index = torch.arange(len(scores)).repeat_interleave(width)
    return torch.tensor(scores).flatten(), index, torch.tensor(prompts)[index]


def test_statistics_are_those_of_all_scores_together() -> None:
    source = torch.Generator().manual_seed(0)
    found, kept = {}, {0: [], 1: [], 2: []}
    for update in range(6):
        chosen = [update % 3, (update + 1) % 3]
        scores = torch.randn(2, 4, generator=source)
        scores[0, 1] = NAN
        for prompt, own in zip(chosen, scores, strict=True):
            kept[prompt] += own[~own.isnan()].tolist()
        found = add_groups(found, *groups(*scores.tolist(), prompts=chosen), memory=0.8)
    for record, (prompt, values) in zip(
        describe_prompts(["a", "b", "c", "d"], found), kept.items(), strict=False
    ):
        assert record["prompt"] == "abc"[prompt]
        assert record["groups"] == 4
        assert record["videos"] == len(values) == 14
        assert record["unjudged_videos"] == 2
        assert record["mean"] == pytest.approx(sum(values) / len(values), abs=1e-6)
        spread = torch.tensor(values).double().std(correction=0).item()
        assert record["spread"] == pytest.approx(spread, abs=1e-6)
        assert record["tie_rate"] == record["recent_tie_rate"] == 0.0
    unseen = describe_prompts(["a", "b", "c", "d"], found)[3]
    assert unseen == {
        **{"prompt": "d", "groups": 0, "videos": 0, "unjudged_videos": 0, "mean": None},
        **{"spread": None, "tie_rate": None, "recent_tie_rate": None},
    }


def test_ties_are_counted_and_forgotten_by_the_memory() -> None:
    tie, differs = [1.0, 1.0, NAN], [1.0, 2.0, 3.0]
    found: dict = {}
    for scores in (tie, tie, differs):
        before = {number: dict(one) for number, one in found.items()}
        after = add_groups(found, *groups(scores, prompts=[5]), memory=0.5)
        assert found == before  # It is not changed in place.
        found = after
    record = describe_prompts(["x"] * 6, found)[5]
    assert record["tie_rate"] == pytest.approx(2 / 3)
    recent = (0.5 + 0.25) / (1 + 0.5 + 0.25)
    assert record["recent_tie_rate"] == pytest.approx(recent)
    shares = teaching_shares(6, found)
    assert shares[5].item() == pytest.approx(1 - 0.75 / 2.75)
    assert shares[:5].tolist() == [1.0] * 5
    alone = add_groups({}, *groups([1.0, NAN], [NAN, NAN], prompts=[0, 1]), memory=0.5)
    assert [record["tie_rate"] for record in describe_prompts(["a", "b"], alone)] == [1.0, 1.0]
    assert describe_prompts(["a", "b"], alone)[1]["mean"] is None


def tied(*prompts: int, times: int = 50) -> dict:
    found: dict = {}
    for _ in range(times):
        rows = [[0.0, 0.0]] * len(prompts)
        found = add_groups(found, *groups(*rows, prompts=list(prompts)), memory=1.0)
    return found


def test_prompts_that_tie_are_drawn_as_rarely_as_the_floor_says() -> None:
    statistics = tied(0, 1, times=10_000 // 100)
    drawn: Counter = Counter()
    for step in range(3000):
        drawn[int(choose_informative(4, 1, 0, step, statistics, floor=0.2)[0])] += 1
    chance = 0.2 + 0.8 * teaching_shares(4, statistics)[0].item()
    expected = chance / (2 * chance + 2)
    for prompt in (0, 1):
        # Four standard deviations of a binomial.
        slack = 4 * math.sqrt(expected * (1 - expected) / 3000)
        assert abs(drawn[prompt] / 3000 - expected) < slack
    assert min(drawn.values()) > 0


def test_an_update_has_no_prompt_twice_before_it_has_all() -> None:
    for step in range(20):
        few = choose_informative(5, 4, 0, step, tied(1), floor=0.1).tolist()
        assert len(set(few)) == 4
        many = Counter(choose_informative(5, 12, 0, step, tied(1), floor=0.1).tolist())
        assert sorted(many.values()) == [2, 2, 2, 3, 3]


def test_the_choice_follows_from_seed_update_and_statistics_alone() -> None:
    def choose(seed: int, step: int, found: dict) -> list[int]:
        return choose_informative(50, 8, seed, step, found, floor=0.1).tolist()

    assert choose(0, 3, {}) == choose(0, 3, {})
    assert choose(0, 3, {}) != choose(1, 3, {})
    assert choose(0, 3, {}) != choose(0, 4, {})
    assert choose(0, 3, {}) != choose(0, 3, tied(*choose(0, 3, {})))


def test_uniform_goes_through_all_prompts_before_any_comes_again() -> None:
    places = [place for step in range(1, 6) for place in choose_prompts(5, 2, 0, step).tolist()]
    assert Counter(places[:5]) == Counter(places[5:]) == Counter(range(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "unifrom"}, "name must be one of uniform, .* got unifrom; near names: uniform"),
        ({"floor": 0.0}, r"floor must be in \(0, 1\], got 0.0"),
        ({"floor": 0.5}, "floor must be left out with name 'uniform', got 0.5; it would be ign"),
        ({"memory": 1.5}, r"memory must be in \[0, 1\], got 1.5"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptSamplingSettings(**options)
