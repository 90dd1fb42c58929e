"""Reports that survive restarts, other processes and kills, and are never mixed up."""

import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest
import torch

from cac_reward.cache import ReportCache, report_key
from cac_reward.report import AnomalyReport, Finding, TimeWindow

FRAMES = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
ASKED = {"judge": "folder", "mode": "full", "pixels": 576}


def report(score: float, prompt: str = "a cup") -> AnomalyReport:
    findings = (Finding("vanish", TimeWindow(0.1, 0.2), why="gone"),)
    return AnomalyReport(
        score=score, judge_id="j", fps=8.0, num_frames=3, findings=findings, prompt=prompt
    )


def test_a_report_is_found_again_after_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "cache.sqlite"
    first = ReportCache(file)
    assert first.get("a") is None
    first.put({"a": report(0.25), "b": report(0.75)})
    second = ReportCache(file)
    assert second.get("a") == report(0.25)
    assert second.get("b") == report(0.75)
    assert (second.hits, second.misses, len(second)) == (2, 0, 2)
    assert (first.hits, first.misses) == (0, 1)


def test_what_could_not_be_judged_is_tried_again(tmp_path: Path) -> None:
    cache = ReportCache(tmp_path / "c")
    failed = AnomalyReport(score=None, error="rubbish", judge_id="j", fps=8.0, num_frames=3)
    cache.put({"a": failed})
    assert cache.get("a") is None
    cache.put({"a": report(0.5)})
    assert cache.get("a") == report(0.5)


def test_the_first_report_under_a_key_stays(tmp_path: Path) -> None:
    cache = ReportCache(tmp_path / "c")
    cache.put({"a": report(0.1)})
    cache.put({"a": report(0.9)})
    assert cache.get("a") == report(0.1)


@pytest.mark.parametrize(
    "other",
    [
        (FRAMES + 1e-6, 8.0, "a cup", ASKED),
        (FRAMES.double(), 8.0, "a cup", ASKED),
        (FRAMES.transpose(2, 3), 8.0, "a cup", ASKED),
        (FRAMES.reshape(3, 3, 5, 4), 8.0, "a cup", ASKED),
        (FRAMES.flip(0), 8.0, "a cup", ASKED),
        (FRAMES, 8.1, "a cup", ASKED),
        (FRAMES, 8.0, "a cup ", ASKED),
        (FRAMES, 8.0, "a cup", {**ASKED, "mode": "fast"}),
        (FRAMES, 8.0, "a cup", {**ASKED, "more": None}),
    ],
)
def test_the_key_depends_on_everything(other: tuple) -> None:
    assert report_key(*other) != report_key(FRAMES, 8.0, "a cup", ASKED)


def test_the_key_depends_on_nothing_else() -> None:
    key = report_key(FRAMES, 8, "a cup", dict(reversed(ASKED.items())))
    assert key == report_key(FRAMES.clone(), 8.0, "a cup", ASKED)
    strided = FRAMES.transpose(2, 3).contiguous().transpose(2, 3)
    assert key == report_key(strided, 8.0, "a cup", ASKED)
    assert len(report_key(FRAMES.bfloat16(), 8.0, "a cup", ASKED)) == 64


def write_many(file: Path, worker: int, count: int) -> None:
    cache = ReportCache(file)
    for i in range(count):
        cache.put({f"{worker}-{i}": report(i / count), "shared": report(0.5)})


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_many, args=(tmp_path / "c", w, 25)) for w in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    cache = ReportCache(tmp_path / "c")
    assert len(cache) == 4 * 25 + 1
    assert cache.get("3-24") == report(24 / 25)


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    ReportCache(tmp_path / "c")
    writer = multiprocessing.get_context("fork").Process(
        target=write_many, args=(tmp_path / "c", 0, 100_000)
    )
    writer.start()
    deadline = time.monotonic() + 30
    while len(ReportCache(tmp_path / "c")) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(writer.pid or 0, signal.SIGKILL)
    writer.join()
    cache = ReportCache(tmp_path / "c")
    count = len(cache)
    assert count >= 5
    assert all(cache.get(f"0-{i}") is not None for i in range(count - 1))
    cache.put({"after": report(0.5)})
    assert len(cache) == count + 1


def test_another_kind_of_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database at all, but long enough to look at" * 100)
    before = text.read_bytes()
    with pytest.raises(ValueError, match=r"cache must be a file written .* name another file"):
        ReportCache(text)
    assert text.read_bytes() == before
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE music (name TEXT)")
    connection.close()
    with pytest.raises(ValueError, match="cache must be of version 1, got 0"):
        ReportCache(other)
