"""Child processes that train, alone or as a group over gloo, and may kill themselves in between."""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from cac_reward.training import learning
from cac_reward.training.learning import LearningMixin
from cac_reward.training.settings import StageSettings
from cac_reward.training.stages import run_stage


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_update(number: int) -> None:
    """From now on the process is killed when it is about to take this update, counted from 1."""
    step = LearningMixin.training_step

    def step_or_die(self: Any, *arguments: Any, **more: Any) -> Any:
        if self.state.global_step + 1 == number:
            die()
        return step(self, *arguments, **more)

    LearningMixin.training_step = step_or_die  # type: ignore[method-assign]


def die_before_the_mark(updates: int) -> None:
    """Killed when all of a checkpoint is there but the word that it is whole."""
    mark = learning.mark_whole

    def mark_or_die(folder: Any, **more: Any) -> None:
        if more["updates"] == updates:
            die()
        mark(folder, **more)

    learning.mark_whole = mark_or_die


def train_apart(
    stage: StageSettings,
    *,
    processes: int = 1,
    prepare: Callable[[], None] = lambda: None,
    launcher: Mapping[str, str] | None = None,
) -> list[int]:
    """Run a stage in forked processes of a group of their own.

    Args:
        stage: to run.
        processes: of the group.
        prepare: called first, in the last of them alone.
        launcher: variables of `accelerate launch` for them.

    Returns:
        Exit status of each; minus the signal for one that was killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    group = [
        context.Process(target=_train, args=(stage, rank, processes, port, prepare, launcher or {}))
        for rank in range(processes)
    ]
    for one in group:
        one.start()
    group[-1].join(120)
    if group[-1].exitcode != 0:
        for one in group[:-1]:  # As a launcher does when one of them dies.
            one.kill()
    for one in group:
        one.join(120)
    return [int(one.exitcode if one.exitcode is not None else 99) for one in group]


def _train(
    stage: StageSettings,
    rank: int,
    processes: int,
    port: int,
    prepare: Callable[[], None],
    launcher: Mapping[str, str],
) -> None:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    if processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ |= launcher or {"ACCELERATE_USE_CPU": "true"}
        if "FSDP_VERSION" in launcher:
            _shard_on_cpus()
    if rank == processes - 1:
        prepare()
    run_stage(stage)


def _shard_on_cpus() -> None:
    """Let accelerate take CPUs for GPUs where it decides on FSDP, which it keeps from CPUs."""
    start = PartialState.__init__

    def start_as_gpus(self: Any, *arguments: Any, **more: Any) -> None:
        start(self, *arguments, **more)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start_as_gpus  # type: ignore[method-assign]
