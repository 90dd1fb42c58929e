"""The processes of a run, as `accelerate launch` or `torchrun` started them."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """This process among the others; without a GPU they talk over gloo.

    accelerate looks for others on a machine without GPU only where it is told that there is none:
    else each of them would think itself alone, and write the same files.
    """
    return PartialState(cpu=not torch.cuda.is_available())


def check_launcher(optimizer: str, launcher: Mapping[str, str] = os.environ) -> None:
    """Refuse an optimiser that would not get what it needs from what `accelerate launch` set up.

    Args:
        optimizer: by name.
        launcher: its variables.
    """
    if optimizer == "muon" and launcher.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ValueError(
            "optimizer.name must be another than 'muon' with DeepSpeed, which lays weights in one "
            "row where muon needs matrices; set optimizer.name=adamw, or launch with "
            "configs/accelerate/fsdp2_8gpu.yaml"
        )
