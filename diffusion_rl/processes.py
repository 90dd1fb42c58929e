"""The processes of a run: who this one is, and how they put together what each of them found.

A run of one process needs none of it: every function then gives back what it was given. Several are
started by `accelerate launch` or `torchrun`; they hold the same weights and share out the videos of
each update (`shares.py`). Where the tokens of a video are shared out, too, neighbours form teams:
all of a team work on the same videos, each has a part of their gradient, the first speaks for it.

Axes: B videos of this process, N videos of all of them.
"""

from __future__ import annotations

import datetime
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from torch import Tensor

PATIENCE = datetime.timedelta(hours=6)
"""How long a process waits for the others, which may be judging. One that dies ends the wait."""
BUCKET = 1 << 26
"""Gradients are added up over the processes in pieces of about so many numbers."""


_TEAM: dict[str, Any] = {"size": 1, "group": None}

_LAUNCHERS = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_")
_PLACES = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
}
"""What torchrun and accelerate tell their processes in environment variables."""


def environment_alone() -> dict[str, str]:
    """This process's environment without what a launcher put there.

    For a child that is none of the run's processes: it would look for the others.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _PLACES and not name.startswith(_LAUNCHERS)
    }


def start(device: str) -> None:
    """Join the processes that a launcher started, if it started several.

    Args:
        device: of the generator; "cuda" becomes this process's own GPU.

    Raises:
        ValueError: the launcher's or the generator's settings do not fit several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and torch.device(device).index is not None:
        raise ValueError(
            f"generator.device must be 'cuda' where several processes run, got {device}; each "
            "takes the GPU of its own number"
        )
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Scores and counts live on the CPU, gradients where the weights are.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)


def own_gpu() -> int | None:
    """Number of the GPU that "cuda" means here, where each of several processes has its own."""
    return torch.cuda.current_device() if count() > 1 and torch.cuda.is_available() else None


def form_teams(size: int) -> None:
    """Let every `size` neighbours work on the same videos; all processes call it, once.

    Raises:
        ValueError: the processes do not divide into such teams.
    """
    if count() % size:
        raise ValueError(
            f"teams must be of equal size, got {count()} processes for teams of {size}"
        )
    _TEAM.update(size=size, group=None)
    for first in range(0, count(), size) if size > 1 else ():
        group = distributed.new_group(range(first, first + size), timeout=PATIENCE, backend="gloo")
        if first <= rank() < first + size:
            _TEAM["group"] = group


def team_size() -> int:
    """Processes that work on the same videos as this one, itself among them."""
    return int(_TEAM["size"])


def team() -> int:
    """Which team this process is of, from 0."""
    return rank() // team_size()


def team_count() -> int:
    """Teams of the run; as many as processes where nothing else was asked for."""
    return count() // team_size()


def leads() -> bool:
    """Whether this process speaks for its team."""
    return rank() % team_size() == 0


def from_leader(own: Any) -> Any:
    """What the first process of the team has; it is pickled, as in `gather_objects`."""
    if team_size() == 1:
        return own
    box = [own if leads() else None]
    distributed.broadcast_object_list(box, src=team() * team_size(), group=_TEAM["group"])
    return box[0]


def count() -> int:
    """Processes of the run."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the one that writes."""
    return rank() == 0


def gather_objects(own: Any) -> list[Any]:
    """What every process gives, by rank; it is pickled, so only for what the run itself made."""
    if count() == 1:
        return [own]
    found = [None] * count()
    distributed.all_gather_object(found, own)
    return found


def gather_rows(own: Tensor, rows: Tensor, total: int) -> Tensor:
    """Rows [N ...] that the processes hold one part each of, the same on all.

    Args:
        own: [B ...] of this process; NaN and infinity are kept.
        rows: [B] long, their places among all; no place is held by two teams.
        total: N; rows that none of them holds are 0.
    """
    if count() == 1 and len(rows) == total:
        return own
    whole = torch.zeros((total, *own.shape[1:]), dtype=own.dtype, device=own.device)
    if leads():
        whole[rows.to(own.device)] = own
    if count() > 1:
        distributed.all_reduce(whole)  # Of each row all but one addend are 0: it is exact.
    return whole


def sum_over_teams(own: Tensor) -> Tensor:
    """The sum of what each team has, in a tensor of its own."""
    whole = own.clone() if leads() else torch.zeros_like(own)
    if count() > 1:
        distributed.all_reduce(whole)
    return whole


def add_up(values: Sequence[float]) -> list[float]:
    """Sums over the teams, in float64."""
    return _reduced(values if leads() else [0.0] * len(values), distributed.ReduceOp.SUM)


def largest(values: Sequence[float]) -> list[float]:
    """Maxima over the processes."""
    return _reduced(values, distributed.ReduceOp.MAX)


def _reduced(values: Sequence[float], operation: Any) -> list[float]:
    if count() == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(numbers, operation)
    return [float(number) for number in numbers]


@torch.no_grad()
def add_up_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replace each gradient by its sum over the processes; one that none of them has stays None."""
    if count() == 1:
        return
    parameters = [one for one in parameters if one.requires_grad]
    has = largest([0.0 if one.grad is None else 1.0 for one in parameters])
    learning = [one for one, number in zip(parameters, has, strict=True) if number]
    for one in learning:
        if one.grad is None:
            one.grad = torch.zeros_like(one)
    for bucket in _buckets(learning):
        gradients = [one.grad for one in bucket if one.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Neighbours of one device and type, of about BUCKET numbers together."""
    bucket: list[torch.nn.Parameter] = []
    for one in parameters:
        alike = not bucket or (bucket[0].device, bucket[0].dtype) == (one.device, one.dtype)
        if bucket and (not alike or sum(other.numel() for other in bucket) >= BUCKET):
            yield bucket
            bucket = []
        bucket.append(one)
    if bucket:
        yield bucket


@contextmanager
def together(doing: str) -> Iterator[None]:
    """Do something that may fail on one process alone; then all of them stop, and none waits.

    Args:
        doing: said in the error of the processes that did not fail.

    Raises:
        RuntimeError: another process failed; this one did not.
    """
    try:
        yield
    except Exception as error:
        gather_objects(f"{type(error).__name__}: {error}")
        raise
    if count() == 1:
        return
    for number, failure in enumerate(gather_objects(None)):
        if failure is not None:
            raise RuntimeError(f"process {number} of {count()} failed while {doing}: {failure}")


def part_ways(*words: int) -> None:
    """Give the global random numbers of all processes but the first a seed of their own.

    Rewards may draw from them; the loop's own numbers follow from its seed and step.

    Args:
        words: at least 0 each; the seed follows from them and the rank.
    """
    if is_main():
        return
    seed = int(np.random.SeedSequence((*words, rank())).generate_state(1)[0])
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
