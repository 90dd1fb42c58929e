"""Ctrl-C, and a cluster's SIGTERM, as a request: finish the update, save, and stop."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from torch import distributed

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN_SECONDS = 3.0
"""A launcher passes on to its processes what the terminal has told them already; what comes later
than this after the first request is a second one."""


class StopRequest:
    """Listens for a request to stop; a second one stops at once.

    Use it around the training, in the main thread; elsewhere it hears nothing.
    """

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._hear) for one in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked_at is not None and now - self.asked_at > AGAIN_SECONDS:
            raise KeyboardInterrupt
        if self.asked_at is None:
            self.asked_at = now
            logger.warning("stopping after this update, with a checkpoint; again to stop at once")

    def agreed(self) -> bool:
        """Whether any process was asked; the same on all of them, which must call together."""
        asked = self.asked_at is not None
        if not (distributed.is_available() and distributed.is_initialized()):
            return asked
        on_gpu = "nccl" in distributed.get_backend()
        flag = torch.tensor(int(asked), device="cuda" if on_gpu else "cpu")
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)
