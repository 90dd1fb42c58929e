"""Many clips: asked side by side, each answer kept as it comes, resumed where a run stopped."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.lines import write_record
from cac_reward.data.storage import read_annotations
from cac_reward.data.teaching.asking import HaltedError, Teacher, UnansweredError
from cac_reward.data.teaching.lessons import Answer, Job, Lesson, Question, digest, finish
from cac_reward.data.teaching.recipes import RECIPES
from cac_reward.data.teaching.settings import TeachSettings
from cac_reward.data.teaching.stretches import Stretch
from cac_reward.data.teaching.verifying import RejectedAnswerError
from cac_reward.plain import read_json
from cac_reward.records import RecordWriter

TAUGHT, THERE, FAILED, UNASKED = "taught", "there", "failed", "unasked"
JOURNAL_SUFFIX = ".answers"
"""Behind the output's name: accepted answers, until no clip lacks one."""
_AHEAD = 2
"""Jobs that are ready before there is a thread for them; more would fill the memory."""

_PATIENCE_SECONDS = 2.0
"""How long the end waits for threads; without requests under way they need none of it."""


@dataclass(frozen=True)
class Outcome:
    """What became of one clip."""

    name: str
    state: str
    """'taught' now, 'there' before, 'failed', or 'unasked' because the run was stopped."""
    reason: str = ""
    """Why it failed."""


def teach(
    clips: Iterable[AnnotatedClip], videos: Path, output: Path, teacher: Teacher
) -> Iterator[Outcome]:
    """Have clips taught that are not in the output yet.

    Each clip goes to the output when its last answer is accepted, each accepted answer to a
    journal beside it at once, so that the same call goes on after any stop and asks again only
    what was under way.

    Args:
        clips: Annotated; a question on a clip is there once.
        videos: Root of their paths.
        output: A `.jsonl`; made if missing.
        teacher: Who is asked; `teacher.halt` ends the run.

    Yields:
        What became of each clip, as soon as it is known.

    Raises:
        JudgeUnreachableError: If the server refuses key, address or model, or is not there.
        ValueError: If the output holds other things than this run's, or another process writes it.
    """
    journal_path = output.with_name(output.name + JOURNAL_SUFFIX)
    with RecordWriter(output) as writer, Journal(journal_path) as journal:
        run = _Run(videos, teacher, writer, journal, _read_done(output, teacher.settings))
        complete = True
        for outcome in run.outcomes(clips):
            complete = complete and outcome.state in (TAUGHT, THERE)
            yield outcome
    if complete:
        journal_path.unlink()


class Journal:
    """Accepted answers by the clip and the step; places in the file, not their content, are held.

    Args:
        path: Of the file; made if missing.

    Raises:
        ValueError: If a line is no answer, or another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._writer = RecordWriter(path)
        self._places: dict[str, int] = {}
        self._end = 0
        with path.open("rb") as opened:
            for number, line in enumerate(opened, 1):
                try:
                    note = _Note.from_json(line)
                except ValueError as error:
                    self._writer.__exit__(None, None, None)
                    raise ValueError(
                        f"{path} must hold an answer per line, got in line {number}: {error}; "
                        "delete the line to ask again"
                    ) from error
                self._places[note.place] = self._end
                self._end += len(line)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.__exit__(None, None, None)

    def find(self, place: str) -> Answer | None:
        """The answer noted for a place."""
        with self._lock:
            if place not in self._places:
                return None
            with self._path.open("rb") as opened:
                opened.seek(self._places[place])
                return _Note.from_json(opened.readline()).answer

    def add(self, place: str, answer: Answer) -> None:
        """Note an answer; it is on the disk when this returns."""
        note = _Note(place, answer)
        with self._lock:
            self._writer.write(note)
            self._places[place] = self._end
            self._end += len(note.to_json().encode("utf-8")) + 1


@dataclass(frozen=True)
class _Note:
    """A line of the journal."""

    place: str
    answer: Answer

    def to_json(self) -> str:
        return json.dumps({"place": self.place, "answer": dict(self.answer)}, allow_nan=False)

    @classmethod
    def from_json(cls, line: bytes) -> _Note:
        plain = read_json("answer", line)
        if not isinstance(plain, dict) or not isinstance(plain.get("answer"), dict):
            raise ValueError("it must be an object with place and answer")
        return cls(str(plain.get("place")), plain["answer"])


@dataclass(frozen=True)
class _Line:
    """A clip as a line of the output."""

    clip: AnnotatedClip

    def to_json(self) -> str:
        return write_record(self.clip)


@dataclass
class _Open:
    """A clip under way."""

    clip: AnnotatedClip
    stretches: tuple[Stretch, ...] = ()
    answers: dict[str, Answer] = field(default_factory=dict)
    jobs: int = 0
    """Under way."""
    submitted: bool = False
    """Whether all its jobs are under way or done."""
    end: Outcome | None = None
    """Set by the first of its jobs that brings nothing."""


class _Run:
    """One run over many clips."""

    def __init__(
        self,
        videos: Path,
        teacher: Teacher,
        writer: RecordWriter,
        journal: Journal,
        done: dict[bytes, str],
    ) -> None:
        self.videos, self.teacher, self.writer = videos, teacher, writer
        self.journal, self.done = journal, done
        self.settings = teacher.settings
        self.recipe = RECIPES[teacher.settings.recipe]
        self.begun: set[bytes] = set()
        self.waiting: dict[Future[dict[str, Answer]], _Open] = {}
        self.failures = 0
        self.workers = _Workers(teacher.limits.concurrency)

    def outcomes(self, clips: Iterable[AnnotatedClip]) -> Iterator[Outcome]:
        """What became of each clip."""
        try:
            for clip in clips:
                known = self._look_up(clip)
                if known is None:
                    yield from self._begin(clip)
                else:
                    yield self._counted(known)
                yield from self._collect(block=False)
            while self.waiting:
                yield from self._collect(block=True)
        finally:
            # Whatever ends this, nothing new is begun; a thread under way ends with its request.
            self.teacher.halt("the run is over")
            self.workers.close()

    def _look_up(self, clip: AnnotatedClip) -> Outcome | None:
        """The outcome of a clip that is not to be asked about."""
        key = _identity(clip)
        found = self.done.get(key)
        if found is not None:
            if found == digest(clip):
                return Outcome(clip.name, THERE)
            why = "annotation must be as it was when this output was written; name another output"
            return Outcome(clip.name, FAILED, why)
        if self.teacher.halted is not None:
            return Outcome(clip.name, UNASKED)
        if key in self.begun:
            why = "clip, or a question on it, must be there once, got it twice; see annotate check"
            return Outcome(clip.name, FAILED, why)
        self.begun.add(key)
        return None

    def _begin(self, clip: AnnotatedClip) -> Iterator[Outcome]:
        """Put the jobs of a clip on the way, as there is room."""
        seconds = None if self.recipe.whole else self.settings.subclip_seconds
        try:
            self.recipe.check(clip, self.settings)
            lesson = Lesson.open(clip, self.videos, self.settings, seconds)
        except (OSError, ValueError, ImportError) as error:
            yield self._counted(Outcome(clip.name, FAILED, str(error)))
            return
        opened = _Open(clip, lesson.stretches)
        for job in self.recipe.jobs(lesson):
            if opened.end is not None:
                break
            opened.jobs += 1
            self.waiting[self.workers.submit(self._work(opened, job))] = opened
            while len(self.waiting) >= self.teacher.limits.concurrency + _AHEAD:
                yield from self._collect(block=True)
        opened.submitted = True
        yield from self._closed(opened)

    def _work(self, opened: _Open, job: Job) -> Callable[[], dict[str, Answer]]:
        """What a thread does for a job."""
        asked = f"{self.settings.to_json()}\0{digest(opened.clip)}"

        def ask(question: Question) -> Answer:
            # The clip is lost already, so nothing more is spent on it.
            if opened.end is not None:
                lost = UnansweredError if opened.end.state == FAILED else HaltedError
                raise lost(opened.end.reason)
            place = hashlib.sha256(f"{asked}\0{question.step}".encode()).hexdigest()[:32]
            answer = self._recall(place, question)
            if answer is None:
                answer = self.teacher.ask(question, opened.clip.name)
                self.journal.add(place, answer)
            return answer

        return lambda: job.run(ask)

    def _recall(self, place: str, question: Question) -> Answer | None:
        """An answer from the journal, where there is one that may still be kept."""
        answer = self.journal.find(place)
        if answer is not None:
            try:
                question.check(answer)
            except RejectedAnswerError:
                return None
        return answer

    def _collect(self, *, block: bool) -> Iterator[Outcome]:
        """Take in what is done, at least one job where asked to block."""
        if not self.waiting:
            return
        timeout = None if block else 0
        done, _ = wait(self.waiting, timeout=timeout, return_when=FIRST_COMPLETED)
        for future in done:
            opened = self.waiting.pop(future)
            opened.jobs -= 1
            try:
                opened.answers.update(future.result())
            except HaltedError:
                opened.end = opened.end or Outcome(opened.clip.name, UNASKED)
            except UnansweredError as error:
                if opened.end is None or opened.end.state == UNASKED:
                    opened.end = Outcome(opened.clip.name, FAILED, str(error))
            yield from self._closed(opened)

    def _closed(self, opened: _Open) -> Iterator[Outcome]:
        """The outcome of a clip with nothing under way any more."""
        if opened.jobs or not opened.submitted:
            return
        if opened.end is None:
            clip = opened.clip
            answers = {step: opened.answers[step] for step in sorted(opened.answers, key=_order)}
            fields = self.recipe.taught(clip, opened.stretches, self.settings, answers)
            self.writer.write(_Line(finish(clip, self.settings, fields, answers)))
            opened.end = Outcome(clip.name, TAUGHT)
        yield self._counted(opened.end)

    def _counted(self, outcome: Outcome) -> Outcome:
        """The outcome; one failure too many ends the run."""
        self.failures += outcome.state == FAILED
        most = self.teacher.limits.max_failures
        if most is not None and self.failures > most:
            self.teacher.halt(f"more than max_failures={most} clips failed")
        return outcome


class _Workers:
    """Threads that end with the program, however long a request takes."""

    def __init__(self, count: int) -> None:
        self._jobs: queue.SimpleQueue[
            tuple[Future[dict[str, Answer]], Callable[[], dict[str, Answer]]] | None
        ] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._follow, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], dict[str, Answer]]) -> Future[dict[str, Answer]]:
        future: Future[dict[str, Answer]] = Future()
        self._jobs.put((future, work))
        return future

    def close(self) -> None:
        """Let the threads end; those whose request takes longer end with the program."""
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _follow(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, work = job
            try:
                future.set_result(work())
            except (RuntimeError, OSError, ValueError) as error:
                future.set_exception(error)
            except BaseException as error:
                # A fault of ours ends the run, and is shown with the thread that met it.
                future.set_exception(error)
                raise


def _order(step: str) -> tuple[int, str]:
    """'part 2' before 'part 10', 'first' before 'second'."""
    return len(step), step


def _identity(clip: AnnotatedClip) -> bytes:
    """A question on a clip, in a few bytes: a file may hold millions."""
    text = f"{clip.name}\0{clip.question or ''}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def _read_done(output: Path, settings: TeachSettings) -> dict[bytes, str]:
    """Digest of the annotation of each clip that is in the output."""
    done: dict[bytes, str] = {}
    wanted: Mapping[str, object] = json.loads(settings.to_json())
    for clip in read_annotations(output):
        asked = clip.extra.get(f"{settings.recipe}_teacher")
        if asked is None:
            raise ValueError(
                f"output must hold what the recipe {settings.recipe} wrote, got {clip.name} "
                f"without it in {output}; name another --output"
            )
        was = json.loads(asked)
        for name, now in wanted.items():
            if was.get(name) != now:
                raise ValueError(
                    f"{name} must be as in {output}, where it is {was.get(name)!r} for "
                    f"{clip.name}, got {now!r}; name another --output"
                )
        done[_identity(clip)] = clip.extra[f"{settings.recipe}_clip"]
    return done
