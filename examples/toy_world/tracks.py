"""Blobs linked over time, and the faults that can be read off a track.

Legend: F frames. Places and lengths are relative to the frame, ways are per frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from examples.toy_world.blobs import HUES, Blobs

_JUMP = 0.155
"""A longer way than this between two frames is a teleport; honest objects make at most 0.08."""
_STILL = ((4, 0.024), (5, 0.04))
"""(frames, room): a centre that keeps within this room so long stands still; one that bounces off
a wall needs at least 0.045 in four frames and 0.09 in five."""
_FAINT = 0.6
"""Below this share of its usual colour mass an object counts as not there."""
_FAINT_ONCE = 0.45
"""The same for a dip that occurs but once."""
_DEFORMED = 0.42
"""Log of width over height beyond which an object is stretched."""
_SCRAP = 0.45
"""Below this share of a thing's usual area a blob is no thing of its own."""
_RECOLOURED_WAY = 0.2
"""How near a blob of a new hue must be to the last place of a thing to be that thing."""
_COLUMNS = ("centre", "area", "aspect", "form", "box", "strength")


@dataclass(frozen=True)
class Finding:
    """One fault found; windows follow the half-open convention of planted faults."""

    type: str
    window: tuple[float, float]
    """Seconds, [start, end]; the end is the end of the last faulty frame."""
    boxes: tuple[tuple[float, tuple[float, float, float, float]], ...]
    """(time in seconds, (x1, y1, x2, y2) relative to the frame), one per faulty frame."""
    object: str
    """What is concerned, such as 'red circle'."""


@dataclass
class Track:
    """One thing over F frames; rows of frames in which it was not seen mean nothing."""

    hue: int
    seen: np.ndarray
    """[F] bool."""
    hues: np.ndarray
    """[F] index into HUES, which differs from `hue` while the thing is recoloured."""
    centre: np.ndarray
    area: np.ndarray
    aspect: np.ndarray
    form: np.ndarray
    box: np.ndarray
    strength: np.ndarray
    ghost: bool = False
    """Whether this is a second copy of another thing, or a short apparition."""

    def places(self) -> zip:
        return zip(self.centre, self.seen)

    def deformed(self) -> np.ndarray:
        """[F] whether it is stretched."""
        return self.seen & (np.abs(self.aspect) > _DEFORMED)

    def gaps(self) -> tuple[np.ndarray, np.ndarray]:
        """Frames in which it was seen, and the moves [len - 1, 2] between them."""
        frames = np.nonzero(self.seen)[0]
        return frames, np.diff(self.centre[frames], axis=0)

    def ways(self) -> np.ndarray:
        """Lengths of honest moves between neighbouring frames."""
        frames, moves = self.gaps()
        length = np.linalg.norm(moves, axis=1)
        return length[(np.diff(frames) == 1) & (length < _JUMP)]

    def motion(self) -> str:
        """The axis it moves along most of the time."""
        frames, moves = self.gaps()
        size = np.abs(moves[(np.diff(frames) == 1) & (np.linalg.norm(moves, axis=1) < _JUMP)])
        size = size[size.max(1) > 0.015] if len(size) else size
        if not len(size):
            return "still"
        x, y = np.median(size, axis=0)
        angle = np.degrees(np.arctan2(y, x))
        return "sideways" if angle < 22.5 else "up and down" if angle > 67.5 else "diagonally"


def build_tracks(blobs: Blobs, num_frames: int) -> list[Track]:
    """Link the blobs of one clip: things of the first frame, then what is left of later hues."""
    hosts, copies, later = [], [], []
    for hue in np.unique(blobs.hue):
        rows = np.nonzero(blobs.hue == hue)[0]
        if blobs.picture[rows[0]] > 0:
            later.append(rows)
            continue
        chain = _whole(blobs, _smoothest_chain(blobs, rows))
        hosts.append(_track(blobs, chain, num_frames))
        copies.append((hosts[-1], np.setdiff1d(rows, chain)))
    left = set(np.concatenate([*later, np.zeros(0, int)]))
    for host in hosts:
        _follow_recoloured(blobs, host, left)
    for rows in later:
        rows = np.array(sorted(left.intersection(rows)), int)
        if len(rows):
            chain = _smoothest_chain(blobs, rows)
            hosts.append(_track(blobs, chain, num_frames))
            hosts[-1].ghost = len(chain) <= 2
            copies.append((hosts[-1], np.setdiff1d(rows, chain)))
    for host, rows in copies:
        rest = _copies(blobs, rows, host)
        if len(rest):
            hosts.append(_track(blobs, rest, num_frames))
            hosts[-1].ghost = True
    return hosts


def _track(blobs: Blobs, rows: np.ndarray, num_frames: int) -> Track:
    """A track of one hue, from at most one blob per frame."""
    hue, frames = int(blobs.hue[rows[0]]), blobs.picture[rows]
    seen = np.zeros(num_frames, bool)
    seen[frames] = True

    def spread(values: np.ndarray) -> np.ndarray:
        full = np.zeros((num_frames, *values.shape[1:]))
        full[frames] = values[rows]
        return full

    columns = (spread(getattr(blobs, name)) for name in _COLUMNS)
    return Track(hue, seen, np.full(num_frames, hue), *columns)


def _smoothest_chain(blobs: Blobs, rows: np.ndarray) -> np.ndarray:
    """One blob per frame such that the whole way is shortest (Viterbi); rows in frame order."""
    frames = blobs.picture[rows]
    steps = [rows[frames == frame] for frame in np.unique(frames)]
    if len(steps) == len(rows):
        return np.concatenate(steps)
    usual = np.median(blobs.area[rows])

    def own(step: np.ndarray) -> np.ndarray:
        return 0.1 * np.abs(np.log(blobs.area[step] / usual))

    cost, back = own(steps[0]), []
    for before, after in zip(steps, steps[1:]):
        way = blobs.centre[before][:, None] - blobs.centre[after][None]
        total = cost[:, None] + np.linalg.norm(way, axis=-1)
        back.append(total.argmin(0))
        cost = total.min(0) + own(after)
    pick = [int(cost.argmin())]
    for choice in reversed(back):
        pick.append(int(choice[pick[-1]]))
    return np.array([step[i] for step, i in zip(steps, reversed(pick))])


def _whole(blobs: Blobs, chain: np.ndarray) -> np.ndarray:
    """The chain without scraps, such as a rim of the old colour around a recoloured thing."""
    return chain[blobs.area[chain] > _SCRAP * np.median(blobs.area[chain])]


def _copies(blobs: Blobs, rows: np.ndarray, main: Track) -> np.ndarray:
    """The largest further blob of each frame, where it is large enough to be a thing."""
    rows = rows[blobs.area[rows] > _SCRAP * np.median(main.area[main.seen])]
    largest = {}
    for row in rows[np.argsort(blobs.area[rows])]:
        largest[blobs.picture[row]] = row
    return np.array([largest[frame] for frame in sorted(largest)], int)


def _follow_recoloured(blobs: Blobs, host: Track, left: set[int]) -> None:
    """Where a thing is gone, follow a blob of a new hue that takes its place; uses up `left`."""
    whole = _SCRAP * np.median(host.area[host.seen])
    last = 0
    for frame in range(1, len(host.seen)):
        if not host.seen[frame] and frame - last <= 2:
            reach = _RECOLOURED_WAY + 0.06 * (frame - last - 1)
            rows = [r for r in left if blobs.picture[r] == frame and blobs.area[r] > whole]
            ways = [np.linalg.norm(blobs.centre[row] - host.centre[last]) for row in rows]
            if ways and min(ways) < reach:
                row = rows[int(np.argmin(ways))]
                for name in _COLUMNS:
                    getattr(host, name)[frame] = getattr(blobs, name)[row]
                host.seen[frame], host.hues[frame] = True, blobs.hue[row]
                left.remove(row)
        if host.seen[frame]:
            last = frame


def find_faults(
    tracks: list[Track], fps: float, shape_of: Callable[[Track], str]
) -> tuple[Finding, ...]:
    """Read the seven faults off the tracks of one clip."""
    findings = []
    for track in tracks:
        spans = [("duplicate", track.seen)] if track.ghost else _spans(track)
        for kind, frames in spans:
            index = np.nonzero(frames)[0]
            if track.ghost and len(index) < 2:
                continue
            first, last = int(index[0]), int(index[-1])
            boxes = tuple((f / fps, _box(track, f)) for f in range(first, last + 1))
            name = f"{HUES[track.hue]} {shape_of(track)}"
            findings.append(Finding(kind, (first / fps, (last + 1) / fps), boxes, name))
    return tuple(findings)


def _box(track: Track, frame: int) -> tuple[float, float, float, float]:
    """Where it is, or where it should be while it is not seen."""
    if not track.seen[frame]:
        frames = np.nonzero(track.seen)[0]
        row = [np.interp(frame, frames, track.box[frames, i]) for i in range(4)]
    else:
        row = list(track.box[frame])
    x1, y1, x2, y2 = (float(value) for value in row)
    return (x1, y1, x2, y2)


def _spans(track: Track) -> list[tuple[str, np.ndarray]]:
    """(type, [F] bool of faulty frames) for every fault of one main track."""
    spans = [*_absences(track)]
    recoloured = track.seen & (track.hues != track.hue)
    if recoloured.any():
        spans.append(("recolour", recoloured))
    deformed = track.deformed()
    if deformed.sum() >= 2:
        spans.append(("deform", deformed))
    spans += _jumps(track)
    spans += _stops(track)
    return spans


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """(first, last) of every run of true flags."""
    edges = np.diff(np.concatenate([[0], flags.astype(int), [0]]))
    return list(zip(np.nonzero(edges == 1)[0], np.nonzero(edges == -1)[0] - 1))


def _span(length: int, first: int, last: int) -> np.ndarray:
    index = np.arange(length)
    return (index >= first) & (index <= last)


def _absences(track: Track) -> list[tuple[str, np.ndarray]]:
    """Vanish: gone for three frames or more. Flicker: gone or faint for less, mostly repeatedly."""
    mass = track.area * track.strength * track.seen
    usual = np.median(mass[track.seen])
    gone = mass < _FAINT * usual
    runs = _runs(gone)
    spans = [("vanish", _span(len(gone), *run)) for run in runs if run[1] - run[0] >= 2]
    short = [run for run in runs if run[1] - run[0] < 2 and not _changes_hue(track, *run)]
    if len(short) > 1 or (short and mass[short[0][0]] < _FAINT_ONCE * usual):
        spans.append(("flicker", _span(len(gone), short[0][0], short[-1][1])))
    return spans


def _changes_hue(track: Track, first: int, last: int) -> bool:
    """Whether a thing has another hue after these frames than before: it is faint in between."""
    part = slice(max(0, first - 1), last + 2)
    return len(np.unique(track.hues[part][track.seen[part]])) > 1


def _jumps(track: Track) -> list[tuple[str, np.ndarray]]:
    frames, moves = track.gaps()
    allowed = _JUMP + 0.08 * (np.diff(frames) - 1)
    spans = []
    for i in np.nonzero(np.linalg.norm(moves, axis=1) > allowed)[0]:
        spans.append(("teleport", _span(len(track.seen), frames[i], frames[i + 1] + 1)))
    return spans


def _stops(track: Track) -> list[tuple[str, np.ndarray]]:
    """Runs of frames within which the centre keeps its place."""
    still = np.zeros(len(track.seen), bool)
    for length, room in _STILL:
        for first in range(len(still) - length + 1):
            part = slice(first, first + length)
            if track.seen[part].all() and np.ptp(track.centre[part], axis=0).max() < room:
                still[part] = True
    return [("freeze", _span(len(still), *run)) for run in _runs(still)]
