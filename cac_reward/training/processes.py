"""The processes of a run, as `accelerate launch` or `torchrun` started them."""

from __future__ import annotations

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """This process among the others; without a GPU they talk over gloo.

    accelerate looks for others on a machine without GPU only where it is told that there is none:
    else each of them would think itself alone, and write the same files.
    """
    return PartialState(cpu=not torch.cuda.is_available())
