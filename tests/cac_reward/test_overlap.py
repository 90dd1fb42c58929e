"""Overlaps against brute force: counting unit cells over small windows, boxes and tubes."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cac_reward.overlap import (
    box_giou,
    box_iou,
    tube_giou,
    tube_iou,
    window_giou,
    window_iou,
    window_set_giou,
    window_set_iou,
)
from cac_reward.report import Box, TimeWindow

GRID = 8
WINDOWS = [TimeWindow(s, e) for s, e in product(range(6), range(7)) if s < e]
SPANS = [(a, b) for a, b in product(range(GRID + 1), range(GRID + 1)) if a < b]


@st.composite
def boxes(draw: Any) -> tuple[float, float, float, float]:
    (x1, x2), (y1, y2) = draw(st.sampled_from(SPANS)), draw(st.sampled_from(SPANS))
    return (x1 / GRID, y1 / GRID, x2 / GRID, y2 / GRID)


WINDOW_SETS = st.lists(st.sampled_from(WINDOWS), max_size=4)
TUBES = st.lists(st.tuples(st.integers(0, 5), boxes()), max_size=6)


def seconds(windows: Sequence[TimeWindow]) -> set[int]:
    return {s for w in windows for s in range(int(w.start_seconds), int(w.end_seconds))}


def cells(box: tuple[float, ...]) -> set[tuple[int, int]]:
    x1, y1, x2, y2 = (round(GRID * one) for one in box)
    return set(product(range(x1, x2), range(y1, y2)))


def as_tube(entries: list[tuple[int, tuple[float, ...]]]) -> list[Box]:
    return [Box(time / 8, *box) for time, box in entries]


def share(one: set, two: set) -> float:
    return len(one & two) / len(one | two) if one | two else 1.0


def test_window_iou_equals_counting_seconds_over_all_pairs() -> None:
    for first, second in product(WINDOWS, WINDOWS):
        expected = share(seconds([first]), seconds([second]))
        assert window_iou(first, second) == pytest.approx(expected)


@settings(max_examples=150, deadline=None)
@given(WINDOW_SETS, WINDOW_SETS)
def test_window_set_iou_equals_counting_seconds(first: list, second: list) -> None:
    expected = share(seconds(first), seconds(second))
    assert window_set_iou(first, second) == pytest.approx(expected)
    assert window_set_iou(second, first) == pytest.approx(expected)


def test_window_giou_equals_its_definition_over_all_pairs() -> None:
    for first, second in product(WINDOWS, WINDOWS):
        one, two = seconds([first]), seconds([second])
        hull = len(range(min(one | two), max(one | two) + 1))
        expected = share(one, two) - (hull - len(one | two)) / hull
        assert window_giou(first, second) == pytest.approx(expected)


def test_shaped_windows_tell_which_miss_is_nearer() -> None:
    truth = TimeWindow(0, 1)
    near, far = window_giou(truth, TimeWindow(2, 3)), window_giou(truth, TimeWindow(5, 6))
    assert window_iou(truth, TimeWindow(2, 3)) == window_iou(truth, TimeWindow(5, 6)) == 0
    assert -1 < far < near < 0
    sets = [[truth, TimeWindow(t, t + 1)] for t in (10, 12, 14)]
    values = [window_set_giou(one, [truth, TimeWindow(8, 9)]) for one in sets]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 3


@settings(max_examples=150, deadline=None)
@given(WINDOW_SETS, WINDOW_SETS)
def test_shaped_window_sets_stay_below_the_plain_ones(first: list, second: list) -> None:
    value = window_set_giou(first, second)
    assert -1 <= value <= window_set_iou(first, second)
    assert value == pytest.approx(window_set_giou(second, first))
    assert window_set_giou(first, first) == 1


@settings(max_examples=150, deadline=None)
@given(boxes(), boxes())
def test_box_iou_equals_counting_cells(first: tuple, second: tuple) -> None:
    assert box_iou(first, second) == pytest.approx(share(cells(first), cells(second)))
    assert box_iou(first, first) == 1
    assert box_giou(first, first) == 1


def test_box_giou_equals_torchvision() -> None:
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
    spans = torch.rand(60, 2, 2).sort(dim=1).values
    corners = spans.flatten(1)
    first, second = corners[:30], corners[30:]
    iou = torch.tensor([[box_iou(a, b) for b in second.tolist()] for a in first.tolist()])
    giou = torch.tensor([[box_giou(a, b) for b in second.tolist()] for a in first.tolist()])
    assert (iou == 0).any()
    torch.testing.assert_close(iou, ops.box_iou(first, second))
    torch.testing.assert_close(giou, ops.generalized_box_iou(first, second))


@settings(max_examples=150, deadline=None)
@given(TUBES, TUBES)
def test_tube_iou_equals_counting_cells_in_space_and_time(first: list, second: list) -> None:
    one = {(time, cell) for time, box in first for cell in cells(box)}
    two = {(time, cell) for time, box in second for cell in cells(box)}
    assert tube_iou(as_tube(first), as_tube(second)) == pytest.approx(share(one, two))


@settings(max_examples=150, deadline=None)
@given(TUBES, TUBES)
def test_shaped_tubes_are_bounded_symmetric_and_full_for_the_truth(
    first: list, second: list
) -> None:
    one, two = as_tube(first), as_tube(second)
    value = tube_giou(one, two)
    assert -1 <= value <= 1
    assert value == pytest.approx(tube_giou(two, one))
    assert tube_giou(one, one) == pytest.approx(1)


def test_shaped_tubes_tell_which_miss_is_nearer_in_space_and_in_time() -> None:
    truth = [Box(t / 8, 0.0, 0.0, 0.25, 0.25) for t in range(4)]
    near = [Box(t / 8, 0.25, 0.0, 0.5, 0.25) for t in range(4)]
    far = [Box(t / 8, 0.75, 0.0, 1.0, 0.25) for t in range(4)]
    later = [Box(t / 8, 0.0, 0.0, 0.25, 0.25) for t in range(6, 10)]
    much_later = [Box(t / 8, 0.0, 0.0, 0.25, 0.25) for t in range(20, 24)]
    misses = [near, far, later, much_later]
    assert [tube_iou(truth, miss) for miss in misses] == [0, 0, 0, 0]
    values = [tube_giou(truth, miss) for miss in misses]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 4


def test_a_clean_clip_called_clean_agrees_fully() -> None:
    window, box = TimeWindow(0, 1), Box(0, 0, 0, 1, 1)
    assert window_set_iou([], []) == tube_iou([], []) == window_set_giou([], []) == 1
    assert tube_giou([], []) == 1
    assert window_set_iou([window], []) == tube_iou([], [box]) == 0
    assert window_set_giou([], [window]) == tube_giou([box], []) == -1


def test_times_are_compared_as_they_are_written() -> None:
    exact, written = [Box(0.375, 0, 0, 1, 1)], [Box(0.38, 0, 0, 1, 1)]
    assert tube_iou(exact, written) == 1
