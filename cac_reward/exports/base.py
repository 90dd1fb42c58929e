"""What every format shares: a clip with its findings, and findings as tracks of boxes over frames.

Frames count from 0. A track shows one box at each frame from `first` up to, but without, `stop`;
between its keyframes tools hold or interpolate the box.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from cac_reward.records import ClipRecord
from cac_reward.report import Box, Finding, TimeWindow

Corners = tuple[float, float, float, float]

WHOLE_FRAME: Corners = (0.0, 0.0, 1.0, 1.0)
MAX_MESSAGE = 800
"""Characters of an error; some quote the entry that is wrong, however long it is."""
PIXEL_TOLERANCE = 0.01
"""Tools write two decimals of a pixel; a box that is off by less has not been moved."""


class EntryError(ValueError):
    """An entry that breaks a rule, in a file that is of the right form as a whole."""

    def __init__(self, why: str, line: int | None = None, column: str | None = None) -> None:
        super().__init__(why if len(why) <= MAX_MESSAGE else f"{why[:MAX_MESSAGE]}...")
        self.line, self.column = line, column


@dataclass(frozen=True, kw_only=True)
class LabelledClip:
    """A clip and what is wrong with it, by a judge or by a person."""

    path: str
    """Of the video file."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    fps: float
    """Frames per second."""
    num_frames: int
    """Frames of the clip."""
    findings: tuple[Finding, ...] = ()
    """In any order, which is kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "findings", tuple(self.findings))
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"path must name a file, got {self.path!r}")
        for name in ("width", "height", "num_frames", "fps"):
            value = getattr(self, name)
            kinds = int | float if name == "fps" else int
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1e9:
                raise ValueError(f"{name} of {self.path} must be a number above 0, got {value!r}")
        object.__setattr__(self, "fps", float(self.fps))

    @classmethod
    def from_record(cls, record: ClipRecord) -> LabelledClip:
        """Take the findings of a judged clip.

        Raises:
            ValueError: If the file could not be read.
        """
        report = record.report
        if report is None or record.width is None or record.height is None:
            raise ValueError(f"clip must have been readable to be exported, got {record.path}")
        return cls(
            path=record.path,
            width=record.width,
            height=record.height,
            fps=report.fps,
            num_frames=report.num_frames,
            findings=report.findings,
        )


@dataclass(frozen=True)
class Track:
    """One box over a stretch of a clip."""

    first: int
    """First frame on which it is shown."""
    stop: int
    """Frame behind the last one."""
    keyframes: tuple[tuple[int, Corners], ...]
    """Frame and (x1, y1, x2, y2) relative to the frame, in order of frames; at least one."""
    between: tuple[tuple[int, Corners], ...] = ()
    """What a tool shows on frames that are none of these, where it is not the nearest of them."""


@dataclass(frozen=True)
class Part:
    """A track with what it says: a finding is one part, or several where boxes come together."""

    track: Track
    type: str
    severity: int
    why: str
    note: str = ""
    """JSON of the finding as it was exported, and its number; empty for what a person added."""


def frame_span(finding: Finding, clip: LabelledClip) -> range:
    """Frames of a finding's window; at least one, and inside the clip."""
    frames = finding.window.frame_indices(clip.num_frames, clip.fps)
    first = min(frames.start, clip.num_frames - 1)
    return range(first, max(first + 1, frames.stop))


def parts_of(clip: LabelledClip) -> list[Part]:
    """A clip's findings as tracks; one without boxes is a track of the whole frame."""
    parts = []
    for number, finding in enumerate(clip.findings):
        note = write_note(number, finding)
        shown = printable(finding.type), finding.severity, printable(finding.why)
        parts += [Part(track, *shown, note) for track in _tracks(finding, clip)]
    return parts


def findings_of(parts: Sequence[Part], clip: LabelledClip) -> tuple[Finding, ...]:
    """The findings that parts draw: exactly those exported where nothing was changed.

    Args:
        parts: In any order; those of one finding belong together by their notes.
        clip: Size, rate and length of the clip.

    Raises:
        ValueError: If a note is damaged, or parts of one finding say different things.
    """
    groups: dict[int, list[tuple[Part, Finding]]] = {}
    added = []
    for part in parts:
        if part.note:
            number, noted = read_note(part.note)
            groups.setdefault(number, []).append((part, noted))
        else:
            added.append(_restored([part], None, clip))
    findings = []
    for number in sorted(groups):
        together = [part for part, _ in groups[number]]
        first, noted = groups[number][0]
        for part in together:
            if (part.type, part.severity, part.why) != (first.type, first.severity, first.why):
                raise ValueError(
                    f"tracks of one finding must say the same, got {first.type!r} and "
                    f"{part.type!r} (severity {first.severity} and {part.severity}) in "
                    f"{clip.path}; delete the note of the one that is another"
                )
        findings.append(_restored(together, noted, clip))
    return (*findings, *added)


def write_note(number: int, finding: Finding) -> str:
    """What `read_note` reads."""
    return json.dumps({"number": number, "finding": finding.to_json()})


def read_note(note: str) -> tuple[int, Finding]:
    """Number of a finding among those of its clip, and the finding as it was exported.

    Raises:
        ValueError: If it is no such note.
    """
    try:
        plain = json.loads(note)
        number = plain["number"]
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"number must be an integer, got {number!r}")
        return number, Finding.from_json(plain["finding"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"note must be as it was exported, got {note[:200]!r}: {error}; "
            "without the note the drawing counts"
        ) from error


def with_words(noted: Finding, type: str, severity: int, why: str) -> Finding:
    """A finding that says what a tool shows; what the tool could not show stays as it was."""
    return replace(
        noted,
        type=noted.type if type == printable(noted.type) else type,
        severity=severity,
        why=noted.why if why == printable(noted.why) else why,
    )


def printable(text: str) -> str:
    """Text as XML can hold it: its two non-characters become the replacement character."""
    return text.replace("\ufffe", "\ufffd").replace("\uffff", "\ufffd")


def same_box(one: Corners, other: Corners, clip: LabelledClip) -> bool:
    """Whether two boxes are less than `PIXEL_TOLERANCE` apart, plus a rounding error."""
    sides = (clip.width, clip.height) * 2
    return all(
        abs(a - b) * side <= PIXEL_TOLERANCE + 1e-9
        for a, b, side in zip(one, other, sides, strict=True)
    )


def make_box(time_seconds: float, corners: Corners) -> Box:
    """A box that a person drew, cut at the frame's edges.

    Raises:
        ValueError: If nothing of it is inside the frame.
    """
    x1, y1, x2, y2 = (min(1.0, max(0.0, one)) for one in corners)
    return Box(time_seconds, x1, y1, x2, y2)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Inside this context, data of another form than documented is a short ValueError."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeError, RecursionError) as error:
        raise ValueError(f"{what} must be text of its format, got another: {error}") from error
    except ValueError as error:
        if len(str(error)) <= MAX_MESSAGE or isinstance(error, EntryError):
            raise
        raise ValueError(f"{str(error)[:MAX_MESSAGE]}...") from error
    except (TypeError, AttributeError, KeyError, IndexError, ArithmeticError) as error:
        raise ValueError(
            f"{what} must have the documented form, got an entry of another: {str(error)[:200]}"
        ) from error


def get(plain: object, name: str, where: str) -> object:
    """An entry of a JSON object.

    Raises:
        ValueError: If it is no object or has no such entry.
    """
    if not isinstance(plain, Mapping) or name not in plain:
        got = sorted(plain) if isinstance(plain, Mapping) else type(plain).__name__
        raise ValueError(f"{where} must be an object with {name!r}, got {got}")
    return plain[name]


def _tracks(finding: Finding, clip: LabelledClip) -> list[Track]:
    """Each box is in the first track that has none at its frame yet."""
    span = frame_span(finding, clip)
    lanes: list[dict[int, Corners]] = []
    for box in finding.boxes:
        frame = min(max(round(box.time_seconds * clip.fps), span.start), span.stop - 1)
        lane = next((one for one in lanes if frame not in one), None)
        if lane is None:
            lane = {}
            lanes.append(lane)
        lane[frame] = box.coordinates
    tracks = []
    for lane in lanes or [{span.start: WHOLE_FRAME}]:
        # The nearest box holds, so the first and last ones reach to the ends of the window.
        lane.setdefault(span.start, lane[min(lane)])
        lane.setdefault(span.stop - 1, lane[max(lane)])
        tracks.append(Track(span.start, span.stop, tuple(sorted(lane.items()))))
    return tracks


def _restored(parts: Sequence[Part], noted: Finding | None, clip: LabelledClip) -> Finding:
    """The finding that was exported, if its parts still draw it; else the one that they draw."""
    first = parts[0]
    tracks = [part.track for part in parts]
    if noted is None or not _same(_tracks(noted, clip), tracks, clip):
        begin, stop = min(one.first for one in tracks), max(one.stop for one in tracks)
        window = TimeWindow(begin / clip.fps, stop / clip.fps)
        drawn = sorted(shown for one in tracks for shown in (*one.keyframes, *one.between))
        whole = all(same_box(corners, WHOLE_FRAME, clip) for _, corners in drawn)
        boxes = () if whole else tuple(make_box(frame / clip.fps, one) for frame, one in drawn)
        return Finding(first.type, window, boxes, first.severity, first.why)
    return with_words(noted, first.type, first.severity, first.why)


def _same(ours: Sequence[Track], theirs: Sequence[Track], clip: LabelledClip) -> bool:
    """Whether two drawings agree, in whatever order their tracks are."""
    rest = list(theirs)
    for track in ours:
        match = next((one for one in rest if _same_track(track, one, clip)), None)
        if match is None:
            return False
        rest.remove(match)
    return not rest


def _same_track(one: Track, other: Track, clip: LabelledClip) -> bool:
    frames = [frame for frame, _ in one.keyframes]
    return (one.first, one.stop, frames) == (
        other.first,
        other.stop,
        [frame for frame, _ in other.keyframes],
    ) and all(
        same_box(a, b, clip) for (_, a), (_, b) in zip(one.keyframes, other.keyframes, strict=True)
    )
