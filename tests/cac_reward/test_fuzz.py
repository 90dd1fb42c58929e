"""A slice of `benchmarks.fuzz` on every run, and that it would see a fault of each kind."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import fuzz
from benchmarks.fuzz import run_apart, run_target, write_table
from benchmarks.fuzz_targets import TARGETS, Target

SLICES = {"videos": 60, "uploads": 60}


def test_all_targets_together_are_enough() -> None:
    assert sum(target.count for target in TARGETS) >= 20_000
    assert len({target.name for target in TARGETS}) == len(TARGETS)


@pytest.mark.parametrize("target", TARGETS, ids=lambda one: one.name)
def test_a_reader_reads_or_refuses_whatever_it_is_given(target: Target) -> None:
    # Other inputs than a run of the benchmark with its own seed.
    outcome = run_target(target, range(SLICES.get(target.name, 150)), seed=77, seconds=20.0)
    assert outcome.faults == {}
    assert outcome.read > 0
    assert outcome.refused.total() > outcome.count // 4


def test_an_input_is_made_again_from_its_number() -> None:
    kinds = [
        [fuzz.try_input(target, number, 5, Path("/nowhere")) for number in range(40)]
        for target in TARGETS[:2] * 2
    ]
    assert kinds[:2] == kinds[2:]
    assert kinds[0] != kinds[1]


def target_that(read: Callable[[int, Path], None], damaged: bool = True) -> Target:
    return Target("test", 4, lambda chance: (chance.randrange(10), damaged), read)


def refuse(text: str) -> Callable[[int, Path], None]:
    def read(_: int, __: Path) -> None:
        raise ValueError(text)

    return read


def break_promise(_: int, __: Path) -> None:
    assert _ < 0, "a promise"


def let_through(_: int, __: Path) -> None:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        (target_that(let_through), "not a documented error: KeyError: 'x'"),
        (target_that(break_promise), "not a documented error: AssertionError: a promise"),
        (target_that(lambda _, __: b"\xff".decode()), "documented error: UnicodeDecodeError"),
        (target_that(refuse("no")), ""),
        (target_that(refuse("no"), damaged=False), "a sound input was refused: ValueError: no"),
        (target_that(refuse("")), "ValueError with a message of 0 characters"),
        (target_that(refuse("x" * 3000)), "ValueError with a message of 3000 characters"),
        (target_that(lambda _, __: time.sleep(5)), "not a documented error: TooSlow: took longer"),
    ],
)
def test_every_kind_of_fault_is_seen(target: Target, fault: str) -> None:
    outcome = run_target(target, range(2), seed=0, seconds=0.2)
    assert len(outcome.faults) == (2 if fault else 0)
    assert all(fault in one for one in outcome.faults.values())
    assert outcome.count == 2


def test_a_dead_process_is_a_fault_and_the_rest_goes_on() -> None:
    deaths = iter([False, True, False, False])

    def read(_: int, __: Path) -> None:
        if next(deaths):
            os._exit(9)

    # The iterator is copied into each process: the second input of the first two ends them.
    outcome = run_apart(target_that(read), 4, seed=0, seconds=5.0)
    assert outcome.faults == {1: "the process ended with 9", 3: "the process ended with 9"}
    assert (outcome.read, outcome.count) == (2, 4)
    assert "| test | 4 | 2 | 0 | 2 |" in write_table({"test": outcome})


def test_a_fault_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "TARGETS", [target_that(let_through)])
    assert fuzz.main(["--count", "2"]) == 1
    printed = capfd.readouterr()
    assert "test 1: not a documented error: KeyError" in printed.err
    assert "| all | 2 | 0 | 0 | 2 |" in printed.out
    monkeypatch.setattr(fuzz, "TARGETS", [target_that(refuse("no"))])
    assert fuzz.main(["--count", "2"]) == 0
