"""The limit of the queue, to the clip: what is taken, what may come back, what can never fit."""

import asyncio

import pytest

from cac_reward.server.metrics import Metrics
from cac_reward.server.pipeline import MAX_RETRY_SECONDS, BrokenError, OverloadedError, Pipeline
from cac_reward.server.settings import ServerLimits, ServerSettings
from cac_reward.server.wire import WireError

QUEUE = 4


def idle_pipeline() -> tuple[Pipeline, Metrics]:
    """A pipeline whose processes are never started."""
    metrics = Metrics()
    settings = ServerSettings(limits=ServerLimits(max_queue=QUEUE, max_batch=2))
    return Pipeline(settings, {"scorer": "tests.serving:stub"}, metrics), metrics


def test_the_queue_holds_its_limit_and_not_one_clip_more() -> None:
    pipeline, metrics = idle_pipeline()
    pipeline._reserve(QUEUE - 1)
    with pytest.raises(OverloadedError, match="hold at most 4 clips, got 2 more than 3; try again"):
        pipeline._reserve(2)
    pipeline._reserve(1)
    assert metrics.queued_clips == QUEUE
    with pytest.raises(OverloadedError, match="got 1 more than 4") as refusal:
        pipeline._reserve(1)
    assert refusal.value.retry_seconds == 2  # Four clips at half a second each, to begin with.
    pipeline._seconds_per_clip = 1000.0
    with pytest.raises(OverloadedError) as refusal:
        pipeline._reserve(1)
    assert refusal.value.retry_seconds == MAX_RETRY_SECONDS
    assert metrics.queued_clips == QUEUE


def test_what_can_never_fit_is_not_told_to_come_back() -> None:
    pipeline, metrics = idle_pipeline()
    with pytest.raises(WireError, match="request must hold at most max_queue=4 clips, got 5"):
        pipeline._reserve(QUEUE + 1)
    assert metrics.queued_clips == 0


def test_a_broken_server_takes_nothing() -> None:
    pipeline, metrics = idle_pipeline()
    pipeline.broken.set()
    with pytest.raises(BrokenError, match="cannot be started any more"):
        asyncio.run(pipeline.answer([]))
    assert metrics.queued_clips == 0
