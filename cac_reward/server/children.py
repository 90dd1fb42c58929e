"""The parent's side: start a child process, ask it, notice that it died or hangs, kill it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence

from cac_reward.server.lines import Message

TOKEN_VARIABLE = "CAC_REWARD_TOKEN"
BARE_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "OMP_NUM_THREADS")
MAX_LINE_BYTES = 256 * 1024**2

END_SECONDS = 10.0
"""How long a process may take to end once it closed its output."""


class ChildDiedError(Exception):
    """The process ended instead of answering."""


class ChildTimeoutError(Exception):
    """The process took too long and was killed."""


class Child:
    """One process that answers one message at a time.

    Args:
        name: for messages to people.
        module: what it runs, started with `python -m`.
        arguments: after the module's name; others on this machine can read them.
        bare: whether it sees only the variables that a process needs to run.
    """

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], *, bare: bool = False
    ) -> None:
        self.name = name
        self._bare = bare
        self._command = [sys.executable, "-P", "-m", module, *arguments]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def process_id(self) -> int | None:
        """Of the running process; None where there is none."""
        alive = self._process is not None and self._process.returncode is None
        return self._process.pid if alive and self._process is not None else None

    async def start(self, timeout_seconds: float) -> Message:
        """Start the process and wait for its first message, which says that it is ready.

        Raises:
            ChildDiedError: It ended before it was ready.
            ChildTimeoutError: It was not ready in time.
        """
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=child_environment(os.environ, bare=self._bare),
            # Ctrl-C goes to the whole group; children must outlive it to finish accepted work.
            start_new_session=True,
            limit=MAX_LINE_BYTES,
        )
        return await self._receive(timeout_seconds)

    async def ask(self, message: Message, timeout_seconds: float) -> Message:
        """Send a message and wait for its answer.

        Raises:
            ChildDiedError: The process ended.
            ChildTimeoutError: There was no answer in time; the process was killed.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise await self._died() from error
        return await self._receive(timeout_seconds)

    async def kill(self) -> None:
        """End the process now and wait until it is gone."""
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _receive(self, timeout_seconds: float) -> Message:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), timeout_seconds)
        except TimeoutError as error:
            await self.kill()
            raise ChildTimeoutError(
                f"{self.name} took longer than {timeout_seconds:g} s and was ended"
            ) from error
        if not line.endswith(b"\n"):
            raise await self._died()
        return json.loads(line)

    async def _died(self) -> ChildDiedError:
        """How a process that closed its output ended; asking for it to be killed would hide it."""
        assert self._process is not None
        try:
            await asyncio.wait_for(self._process.wait(), END_SECONDS)
        except TimeoutError:
            await self.kill()
        return ChildDiedError(f"{self.name} ended with status {self._process.returncode}")


def child_environment(parent: Mapping[str, str], *, bare: bool) -> dict[str, str]:
    """What a child sees: the parent's variables without its secret, and the same modules."""
    environment = {
        name: value
        for name, value in parent.items()
        if name != TOKEN_VARIABLE and (not bare or name in BARE_VARIABLES)
    }
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    return environment
