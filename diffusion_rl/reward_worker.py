"""A reward in a process of its own: python -m diffusion_rl.reward_worker, started by ProcessReward.

Messages go through standard input and output: two lengths, a JSON header, tensors as safetensors.
Nothing is pickled. The process ends when its input does, and what the reward started with it, so
that neither outlives the run.

Axes: B videos, F frames, C channels, H height, W width.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from diffusion_rl.memory_errors import OutOfMemoryError
from diffusion_rl.reward_contract import (
    RESUME,
    RewardFailed,
    RewardFunction,
    RewardSettings,
    ask_once,
    build_function,
    plain_report,
)

_LENGTHS = struct.Struct("!QQ")


def write_message(
    file: IO[bytes], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Send a header and tensors."""
    text = json.dumps(header).encode()
    data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    file.write(_LENGTHS.pack(len(text), len(data)))
    file.write(text)
    file.write(data)
    file.flush()


def read_message(file: IO[bytes]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The next header and its tensors; None where the other side has ended."""
    lengths = file.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    size, rest = _LENGTHS.unpack(lengths)
    text, data = file.read(size), file.read(rest)
    if len(text) < size or len(data) < rest:
        return None
    return json.loads(text), load(data)


def main() -> None:
    """Build the reward of the first message, then answer one message at a time."""
    # What libraries print must not be taken for an answer.
    errors = sys.stderr.fileno()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(errors, sys.stdout.fileno())
    if hasattr(os, "register_at_fork"):
        # A process that the reward forks must not keep this one's end from being seen.
        os.register_at_fork(
            after_in_child=lambda: os.dup2(errors, answers.fileno(), inheritable=False)
        )
    first = read_message(sys.stdin.buffer)
    if first is None:
        return
    settings, gpu = RewardSettings(**first[0]["settings"]), first[0]["gpu"]
    if gpu is not None:
        torch.cuda.set_device(gpu)
    function = build_function(settings)
    write_message(answers, {"ready": True}, {})
    with suppress(BrokenPipeError):  # The run may end while it waits for an answer.
        while (message := read_message(sys.stdin.buffer)) is not None:
            write_message(answers, *answer(settings.name, function, *message))
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # The run is gone: what the reward started goes, too.


def answer(
    name: str, function: RewardFunction, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The judgement of {prompts, fps} and {videos [B F C H W]}; or what went wrong with it."""
    try:
        found = ask_once(name, function, tensors["videos"], header["prompts"], header["fps"])
        reports = found.reports
        plain = None if reports is None else [plain_report(name, report) for report in reports]
    except RewardFailed as error:
        cause = error.__cause__
        return {"failed": f"{type(cause).__name__}: {cause}"}, {}
    except OutOfMemoryError as error:
        # Of this process's memory, which may be free again at the next attempt.
        return {"failed": f"OutOfMemoryError: {str(error).removesuffix(f'; {RESUME}')}"}, {}
    except ValueError as error:
        return {"refused": str(error).removesuffix(f"; {RESUME}")}, {}
    kept = {"score": found.score, "blame": found.blame}
    return {"reports": plain}, {key: one for key, one in kept.items() if one is not None}


if __name__ == "__main__":
    main()
