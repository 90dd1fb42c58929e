"""From accepted clips to answers: a bounded queue, decoders, batches, and one model process.

Every accepted clip is answered exactly once, whatever dies in between: a batch whose process died
is judged again clip by clip, and a clip that was there twice is answered with an error.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cac_reward.server.children import Child, ChildDiedError, ChildTimeoutError
from cac_reward.server.lines import SPENT
from cac_reward.server.metrics import Metrics
from cac_reward.server.settings import ServerSettings
from cac_reward.server.wire import Answer, ClipRequest, WireError

logger = logging.getLogger(__name__)

MAX_TRIES = 2
MAX_STARTS = 3
MAX_RETRY_SECONDS = 60
_BROKEN_TEXT = "a process of this server cannot be started any more; see its log"
_BROKEN = Answer("failed", error=_BROKEN_TEXT)


class OverloadedError(Exception):
    """The queue is full; `retry_seconds` says when there may be room."""

    def __init__(self, text: str, retry_seconds: int) -> None:
        super().__init__(text)
        self.retry_seconds = retry_seconds


class BrokenError(Exception):
    """The model process cannot be started any more."""


@dataclass(eq=False)
class _Clip:
    """One accepted clip on its way."""

    request: ClipRequest
    input: Path
    output: Path
    answer: asyncio.Future[Answer]
    lengths: tuple[int, ...] = ()
    decoded: dict[str, Any] = field(default_factory=dict)
    num_tries: int = 0


class Pipeline:
    """Decoders and the model process, and the clips between them.

    Args:
        settings: limits, and where files may be named.
        scorer: what the model process loads; see `cac_reward.server.judging.load_scorer`.
        metrics: where everything is counted.
    """

    def __init__(
        self, settings: ServerSettings, scorer: Mapping[str, object], metrics: Metrics
    ) -> None:
        self._limits = settings.limits
        self._metrics = metrics
        self._spool = tempfile.TemporaryDirectory(prefix="cac_reward_")
        root = None if settings.media_root is None else str(settings.media_root)
        decoding = json.dumps({**asdict(settings.limits), "media_root": root})
        self._decoders = [
            Child(f"decoder {number}", "cac_reward.server.decoding", [decoding], bare=True)
            for number in range(settings.limits.num_decoders)
        ]
        judging = json.dumps({**scorer, "spool": self._spool.name})
        self._model = Child("the model process", "cac_reward.server.judging", [judging])
        self._arrived: asyncio.Queue[_Clip] = asyncio.Queue()
        self._decoded: asyncio.Queue[_Clip] = asyncio.Queue(2 * settings.limits.max_batch)
        self._suspects: deque[_Clip] = deque()
        self._tasks: list[asyncio.Task[None]] = []
        self._numbers = itertools.count()
        self._seconds_per_clip = 0.5
        self.judge = ""
        self.broken = asyncio.Event()

    async def start(self) -> None:
        """Start every process; the model is loaded when this returns.

        Raises:
            ChildDiedError: One of them ended at once; its last words are on standard error.
            ChildTimeoutError: One of them was not ready in time.
        """
        children = [*self._decoders, self._model]
        *_, ready = await asyncio.gather(
            *(one.start(self._limits.start_seconds) for one in children)
        )
        self.judge = ready["judge"]
        for work in [*(self._decode_all(child) for child in self._decoders), self._judge_all()]:
            task = asyncio.create_task(work)
            task.add_done_callback(self._note_end)
            self._tasks.append(task)

    async def stop(self) -> None:
        """End every process and remove the spool; call it when nothing is left to answer."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for child in [*self._decoders, self._model]:
            await child.kill()
        self._spool.cleanup()

    def process_ids(self) -> dict[str, int | None]:
        """Of the model process and of every decoder."""
        return {child.name: child.process_id for child in [self._model, *self._decoders]}

    def _reserve(self, count: int) -> None:
        """Take places in the queue; each is given back with its clip's answer."""
        if self.broken.is_set():
            raise BrokenError(_BROKEN_TEXT)
        if count > self._limits.max_queue:
            raise WireError(
                f"request must hold at most max_queue={self._limits.max_queue} clips, got {count}"
            )
        queued = self._metrics.queued_clips
        if queued + count > self._limits.max_queue:
            seconds = math.ceil(self._seconds_per_clip * max(queued, 1))
            raise OverloadedError(
                f"queue must hold at most {self._limits.max_queue} clips, got {count} more than "
                f"{queued}; try again later",
                min(max(seconds, 1), MAX_RETRY_SECONDS),
            )
        self._metrics.queued_clips += count

    async def answer(self, requests: Sequence[ClipRequest]) -> list[Answer]:
        """Answer all of these clips; being cancelled gives them up.

        Raises:
            OverloadedError: The queue has too few places.
            BrokenError: Nothing will be judged any more.
            WireError: One of them is no base64, or they can never fit; none is judged then.
        """
        self._reserve(len(requests))
        clips = [self._accept(request) for request in requests]
        writing = asyncio.create_task(asyncio.to_thread(self._write_inputs, clips))
        try:
            await asyncio.shield(writing)
        except BaseException:
            await asyncio.wait([writing])  # A thread cannot be stopped; clean up after it.
            for clip in clips:
                self._finish(clip, None)
            raise
        for clip in clips:
            self._arrived.put_nowait(clip)
        return await asyncio.gather(*(clip.answer for clip in clips))

    def _accept(self, request: ClipRequest) -> _Clip:
        path = Path(self._spool.name) / f"{next(self._numbers)}.in"
        answer = asyncio.get_running_loop().create_future()
        return _Clip(request, path, path.with_suffix(".raw"), answer)

    def _write_inputs(self, clips: Sequence[_Clip]) -> None:
        """Write clips to the spool as they came."""
        for clip in clips:
            if clip.request.kind != "path":
                clip.lengths = clip.request.write(clip.input)

    async def _decode_all(self, child: Child) -> None:
        """One decoder's work, forever."""
        while True:
            clip = await self._arrived.get()
            if clip.answer.done() or self.broken.is_set():
                self._finish(clip, _BROKEN)
                continue
            reply = await self._decode(child, clip)
            if isinstance(reply, Answer):
                self._finish(clip, reply)
            else:
                clip.decoded = reply
                clip.input.unlink(missing_ok=True)
                await self._decoded.put(clip)

    async def _decode(self, child: Child, clip: _Clip) -> dict[str, Any] | Answer:
        """Shape and rate of the decoded clip, or why there is none."""
        request = clip.request
        message = {
            "name": request.name,
            "kind": request.kind,
            "input": request.content[0] if request.kind == "path" else str(clip.input),
            "lengths": clip.lengths,
            "fps": request.fps,
            "output": str(clip.output),
        }
        began = time.monotonic()
        for _ in range(MAX_TRIES):
            try:
                reply = await child.ask(message, self._limits.decode_seconds)
            except (ChildDiedError, ChildTimeoutError) as error:
                fault = f"{request.name} could not be decoded: {error}"
                logger.warning("%s", fault)
                self._metrics.add("decoder_restarts_total")
                await self._revive(child)
                if isinstance(error, ChildTimeoutError):
                    return Answer("refused", error=fault)
                continue
            self._metrics.add("decode_seconds_total", time.monotonic() - began)
            if reply.get(SPENT):
                self._metrics.add("decoder_restarts_total")
                await self._revive(child)
            return Answer("refused", error=reply["error"]) if "error" in reply else reply
        return Answer("failed", error=fault)

    async def _judge_all(self) -> None:
        """The model's work, forever."""
        while True:
            batch = await self._next_batch()
            if self.broken.is_set():
                for clip in batch:
                    self._finish(clip, _BROKEN)
            elif batch:
                await self._judge(batch)

    async def _next_batch(self) -> list[_Clip]:
        """Clips to judge together; one alone where it may have brought a process down."""
        if self._suspects:
            batch = [self._suspects.popleft()]
        else:
            batch = [await self._decoded.get()]
            if self._decoded.qsize() < self._limits.max_batch - 1:
                await asyncio.sleep(self._limits.batch_wait_seconds)
            while len(batch) < self._limits.max_batch and not self._decoded.empty():
                batch.append(self._decoded.get_nowait())
        for clip in batch:
            if clip.answer.done():
                self._finish(clip, None)
        return [clip for clip in batch if not clip.answer.done()]

    async def _judge(self, batch: list[_Clip]) -> None:
        began = time.monotonic()
        clips = [
            {
                "name": clip.request.name,
                "frames": str(clip.output),
                "prompt": clip.request.prompt,
                **clip.decoded,
            }
            for clip in batch
        ]
        try:
            reply = await self._model.ask({"clips": clips}, self._limits.batch_seconds)
        except (ChildDiedError, ChildTimeoutError) as error:
            logger.warning("%s while it judged %d clips", error, len(batch))
            self._try_again(batch, str(error))
            self._metrics.add("model_restarts_total")
            await self._revive(self._model)
            return
        if "error" in reply:
            self._try_again(batch, reply["error"])
            return
        seconds = time.monotonic() - began
        self._metrics.add("batches_total")
        self._metrics.add("judge_seconds_total", seconds)
        self._seconds_per_clip += 0.2 * (seconds / len(batch) - self._seconds_per_clip)
        for clip, answer in zip(batch, reply["answers"], strict=True):
            status = "unjudged" if answer["score"] is None else "scored"
            self._finish(clip, Answer(status, **answer))

    def _try_again(self, batch: Sequence[_Clip], fault: str) -> None:
        """Judge each clip alone; one that was alone already and tried twice is given up."""
        for clip in batch:
            clip.num_tries += 1
            if clip.num_tries < MAX_TRIES:
                self._suspects.append(clip)
            else:
                text = f"{clip.request.name} could not be judged in {MAX_TRIES} tries: {fault}"
                self._finish(clip, Answer("failed", error=text))

    async def _revive(self, child: Child) -> None:
        """Start a child anew; when it will not start, break the server off."""
        for number in range(MAX_STARTS):
            await child.kill()
            try:
                await child.start(self._limits.start_seconds)
            except (ChildDiedError, ChildTimeoutError, OSError) as error:
                logger.error("start %d of %d failed: %s", number + 1, MAX_STARTS, error)
                await asyncio.sleep(2.0**number)
            else:
                return
        self.broken.set()

    def _finish(self, clip: _Clip, answer: Answer | None) -> None:
        """Answer an accepted clip, once; None where nobody waits for it any more."""
        self._metrics.queued_clips -= 1
        clip.input.unlink(missing_ok=True)
        clip.output.unlink(missing_ok=True)
        if answer is None or clip.answer.done():
            self._metrics.add("clips_total", status="given_up")
            return
        self._metrics.add("clips_total", status=answer.status)
        clip.answer.set_result(answer)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        """A worker ends only when it is stopped; anything else must not go unnoticed."""
        if not task.cancelled():
            logger.error("a worker of the server ended", exc_info=task.exception())
            self.broken.set()
