"""Every reader against thousands of generated and damaged inputs: none may crash, hang or surprise.

    python -m benchmarks.fuzz                       all targets, about 28,000 inputs
    python -m benchmarks.fuzz --only videos --count 50000 --seed 7
    python -m benchmarks.fuzz --only videos --number 1234     one input again, with its traceback

An input is right when it is read and what was read keeps its promises, or when it is refused with
an error of a documented kind and a message of ordinary length. Anything else is a fault: another
kind of error, an input that was damaged in no way and is refused all the same, more than the time
limit, a dead process. Each input depends on seed, target and number alone. The exit status is 1
where there is a fault.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from types import FrameType

from benchmarks.fuzz_targets import TARGETS, Target

SECONDS = 10.0
MEMORY_BYTES = 3 * 1024**3
MAX_MESSAGE = 2000
MAX_SHOWN = 20


class TooSlow(BaseException):
    """An input took longer than the limit; no reader may catch it."""


class Caught:
    """Holds whatever error ended a block; what a reader lets through is what is looked for."""

    error: BaseException | None = None

    def __enter__(self) -> Caught:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        self.error = error
        return isinstance(error, Exception | TooSlow)


@dataclass
class Outcome:
    """What became of a target's inputs."""

    read: int = 0
    """Inputs that were read and kept their promises."""
    refused: Counter[str] = field(default_factory=Counter)
    """Inputs that were refused as documented, by kind of error."""
    faults: dict[int, str] = field(default_factory=dict)
    """What is wrong, by number of the input."""
    seconds: float = 0.0
    """For all inputs together."""
    slowest: float = 0.0
    """Seconds of the slowest input."""

    @property
    def count(self) -> int:
        return self.read + self.refused.total() + len(self.faults)


def try_input(target: Target, number: int, seed: int, folder: Path) -> tuple[str | None, str]:
    """Read one input.

    Returns:
        The kind of the documented error or None, and what is wrong or an empty text.
    """
    chance = random.Random(f"{seed}/{target.name}/{number}")
    made, damaged = target.make(chance)
    with Caught() as caught:
        target.read(made, folder)
    if caught.error is None:
        return None, ""
    kind, message = type(caught.error), str(caught.error)
    if kind not in target.errors:
        return None, f"not a documented error: {kind.__name__}: {message[:200]}"
    if not message or len(message) > MAX_MESSAGE:
        return None, f"{kind.__name__} with a message of {len(message)} characters"
    if not damaged:
        return None, f"a sound input was refused: {kind.__name__}: {message[:200]}"
    return kind.__name__, ""


def run_target(
    target: Target,
    numbers: Sequence[int],
    seed: int,
    seconds: float,
    at: Synchronized[int] | None = None,
) -> Outcome:
    """Try inputs one after the other, each within a limit of time.

    Args:
        target: What reads.
        numbers: Of the inputs.
        seed: Of all of them.
        seconds: For each input; must be run in the main thread of its process.
        at: Where the number of the input being tried is shown to another process.
    """
    outcome = Outcome()
    before = signal.signal(signal.SIGALRM, _stop)
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number in numbers:
                if at is not None:
                    at.value = number
                    # A hang that never comes back to Python is ended with the process.
                    faulthandler.dump_traceback_later(3 * seconds, exit=True)
                signal.setitimer(signal.ITIMER_REAL, seconds)
                start = time.perf_counter()
                kind, fault = try_input(target, number, seed, Path(folder))
                signal.setitimer(signal.ITIMER_REAL, 0)
                outcome.slowest = max(outcome.slowest, time.perf_counter() - start)
                if fault:
                    outcome.faults[number] = fault
                elif kind:
                    outcome.refused[kind] += 1
                else:
                    outcome.read += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
    outcome.seconds = time.perf_counter() - began
    return outcome


def run_apart(target: Target, count: int, seed: int, seconds: float) -> Outcome:
    """Try inputs in a process of their own, and go on behind one that ends the process."""
    context = multiprocessing.get_context("fork")
    whole = Outcome()
    first = 0
    while first < count:
        at = context.Value("q", first)
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(
            target=_child, args=(target, range(first, count), seed, seconds, at, theirs)
        )
        child.start()
        theirs.close()
        try:
            part = ours.recv()
            first = count
        except EOFError:
            child.join()
            part = Outcome(faults={at.value: f"the process ended with {child.exitcode}"})
            part.read = at.value - first  # What they became is not known; they were no faults.
            first = at.value + 1
        child.join()
        whole.read += part.read
        whole.refused += part.refused
        whole.faults |= part.faults
        whole.seconds += part.seconds
        whole.slowest = max(whole.slowest, part.slowest)
    return whole


def _child(
    target: Target,
    numbers: Sequence[int],
    seed: int,
    seconds: float,
    at: Synchronized[int],
    answer: Connection,
) -> None:
    import torch

    from cac_reward.server.decoding import limit_process

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # What readers say of damaged files is not looked at.
    faulthandler.enable()
    limit_process(MEMORY_BYTES, MEMORY_BYTES)
    answer.send(run_target(target, numbers, seed, seconds, at))
    answer.close()


def _stop(_: int, __: FrameType | None) -> None:
    raise TooSlow("took longer than the limit")


def write_table(outcomes: dict[str, Outcome]) -> str:
    """A Markdown table of what became of each target's inputs."""
    lines = [
        "| target | inputs | read | refused as documented | faults | s | slowest, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in outcomes.items():
        lines.append(
            f"| {name} | {one.count} | {one.read} | {one.refused.total()} | {len(one.faults)} | "
            f"{one.seconds:.1f} | {one.slowest:.3f} |"
        )
    rows = outcomes.values()
    lines.append(
        f"| all | {sum(one.count for one in rows)} | {sum(one.read for one in rows)} | "
        f"{sum(one.refused.total() for one in rows)} | {sum(len(one.faults) for one in rows)} | "
        f"{sum(one.seconds for one in rows):.1f} | {max(one.slowest for one in rows):.3f} |"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the targets; 1 where there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    names = [target.name for target in TARGETS]
    parser.add_argument("--only", action="append", choices=names, help="a target; several times")
    parser.add_argument("--count", type=int, help="inputs of each target instead of its own number")
    parser.add_argument("--number", type=int, help="try one input in this process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit for one input")
    given = parser.parse_args(arguments)
    chosen = [one for one in TARGETS if not given.only or one.name in given.only]
    if given.number is not None:
        for target in chosen:
            made, damaged = target.make(random.Random(f"{given.seed}/{target.name}/{given.number}"))
            print(f"{target.name} {given.number}, {'damaged' if damaged else 'sound'}: {made!r}")
            with tempfile.TemporaryDirectory() as folder:
                target.read(made, Path(folder))
        return 0
    outcomes = {}
    for target in chosen:
        count = given.count or target.count
        outcomes[target.name] = run_apart(target, count, given.seed, given.seconds)
        found = outcomes[target.name].faults
        print(f"{target.name}: {count} inputs, {len(found)} faults", file=sys.stderr, flush=True)
        for number in list(found)[:MAX_SHOWN]:
            print(f"  {target.name} {number}: {found[number]}", file=sys.stderr, flush=True)
    print(write_table(outcomes))
    return int(any(one.faults for one in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
