"""Forked processes that talk over gloo, and what each of them gives back or dies of."""

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as distributed

from diffusion_rl import processes

PATIENCE = 300


def run_on(count: int, function: Callable[[], Any]) -> list[Any]:
    """What `function` returns on each of `count` processes; an exception it raised stands for it.

    A process that was killed stands as minus its signal.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    group = [
        context.Process(target=_run, args=(function, rank, count, port, pipes[rank][1]))
        for rank in range(count)
    ]
    for one in group:
        one.start()
    for _, sender in pipes:
        sender.close()
    found = []
    for one, (receiver, _) in zip(group, pipes, strict=True):
        try:
            came = receiver.poll(PATIENCE)
            found.append(pickle.loads(receiver.recv_bytes()) if came else TimeoutError("it hangs"))
        except EOFError:
            one.join(PATIENCE)
            found.append(one.exitcode)
    for one in group:
        one.kill()
        one.join()
    return found


# Pickled by hand: a pipe would hand over a tensor's memory, which ends with its process.
def _run(function: Callable[[], Any], rank: int, count: int, port: int, sender: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        processes.start("cpu")
        sender.send_bytes(pickle.dumps(function()))
    except (RuntimeError, ValueError, OSError, KeyboardInterrupt) as error:
        # As an exception that another process can unpickle, whatever its class takes.
        sender.send_bytes(pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}")))
    finally:
        sender.close()
        if distributed.is_initialized():
            distributed.destroy_process_group()
