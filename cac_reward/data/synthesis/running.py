"""Many sources: in parallel, and resumed where a run stopped, however it stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from cac_reward.data.storage import annotation_writer
from cac_reward.data.synthesis.making import (
    CLIPS_FOLDER,
    Source,
    SourceRecord,
    SynthesisSettings,
    make_source,
)
from cac_reward.records import RecordWriter
from cac_reward.whole_files import whole_file

JOURNAL = "journal.jsonl"
"""A line for each source as it is finished, in any order."""
SETTINGS = "settings.json"
ANNOTATIONS = "annotations.jsonl"
"""Every clip, in the order of the sources; there when all of them are done."""
SKIPPED = "skipped.jsonl"
"""Sources and takes that gave no clips, with the reason."""

_AHEAD = 4
"""Sources that wait for each worker; more would only fill the memory."""


def synthesize(
    sources: Sequence[Source], output: Path, settings: SynthesisSettings, workers: int = 1
) -> Iterator[SourceRecord]:
    """Make the clips of every source that is not done yet.

    Each source is noted in a journal when its clips are on the disk, so that the same call goes on
    after any stop. What has failed is tried again. The output is the same for any number of
    workers and stops.

    Args:
        sources: Clean clips, of different names.
        output: Folder; made if missing.
        settings: Must be those with which the folder was begun.
        workers: Processes; 1 works in this one.

    Yields:
        What became of each source, as it is finished; those done before first.

    Raises:
        ValueError: If the folder was begun with other settings, another process writes to it, two
            sources have one name, or `workers` is below 1.
        ChildProcessError: If a worker died.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError("sources must have different names, got one twice")
    (output / CLIPS_FOLDER).mkdir(parents=True, exist_ok=True)
    with RecordWriter(output / JOURNAL) as journal:
        _check_settings(output / SETTINGS, settings)
        done = Journal(output)
        waiting = []
        for source in sources:
            record = done.find(source.name)
            if record is not None and _is_current(record, source, output):
                yield record
            else:
                waiting.append(source)
        made = (
            (make_source(one, output, settings) for one in waiting)
            if workers == 1
            else _in_parallel(waiting, output, settings, workers)
        )
        for record in made:
            journal.write(record)
            yield record


def finish(sources: Sequence[Source], output: Path) -> tuple[int, int]:
    """Write the annotations of all sources, and the list of what was left out.

    Returns:
        Number of clips, and number of sources and takes that were left out.

    Raises:
        ValueError: If a source is not done.
    """
    done = Journal(output)
    clips = left_out = 0
    with (
        annotation_writer(output / ANNOTATIONS) as write,
        whole_file(output / SKIPPED, newline="\n") as skipped,
    ):
        for source in sources:
            record = done.find(source.name)
            if record is None:
                raise ValueError(f"sources must all be done, got none of {source.name}")
            for clip in record.clips:
                write(clip)
                clips += 1
            for reason in record.failures:
                skipped.write(json.dumps({"path": source.path, "reason": reason}) + "\n")
                left_out += 1
    return clips, left_out


class Journal:
    """Finds what became of a source; holds places in the file, not their content."""

    def __init__(self, output: Path) -> None:
        self._path = output / JOURNAL
        self._places: dict[str, int] = {}
        place = 0
        with self._path.open("rb") as opened:
            for number, line in enumerate(opened, 1):
                try:
                    name = SourceRecord.from_json(line.decode("utf-8")).name
                except ValueError as error:
                    raise ValueError(
                        f"{self._path} must hold a source per line, got in line {number}: {error}; "
                        "delete the line to make its clips again"
                    ) from error
                self._places[name] = place
                place += len(line)

    def find(self, name: str) -> SourceRecord | None:
        """The last that was noted on a source."""
        if name not in self._places:
            return None
        with self._path.open("rb") as opened:
            opened.seek(self._places[name])
            return SourceRecord.from_json(opened.readline().decode("utf-8"))


def _check_settings(path: Path, settings: SynthesisSettings) -> None:
    wanted = settings.to_json()
    if not path.exists():
        with whole_file(path) as opened:
            opened.write(wanted)
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(wanted)
    for name in now:
        if before.get(name) != now[name]:
            raise ValueError(
                f"{name} must be as in {path}, where it is {before.get(name)!r}, got "
                f"{now[name]!r}; name another --output"
            )


def _is_current(record: SourceRecord, source: Source, output: Path) -> bool:
    """Whether a source needs no work: unchanged, all takes made, and their files still there."""
    path = Path(source.path)
    return (
        not record.failures
        and path.is_file()
        and path.stat().st_size == record.num_bytes
        and all(clip.prompt == source.prompt for clip in record.clips)
        and all((output / clip.path).is_file() for clip in record.clips)
    )


def _in_parallel(
    sources: Sequence[Source], output: Path, settings: SynthesisSettings, workers: int
) -> Iterator[SourceRecord]:
    """Records in the order in which they are finished."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    running: set[Future[SourceRecord]] = set()
    rest = iter(sources)
    try:
        while True:
            for source in rest:
                running.add(pool.submit(make_source, source, output, settings))
                if len(running) >= _AHEAD * workers:
                    break
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for one in finished:
                yield one.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"a worker died, perhaps for want of memory ({error}); the same command goes on, with "
            "fewer --workers if that was it"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """One thread, and an end with the process that started it, even if that was killed."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
