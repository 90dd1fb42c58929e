"""What a judge says about one clip: time windows, boxes, findings and the report that holds them.

Every class is frozen and checks itself when it is made, whatever it was made from. Times are
seconds of the source clip; boxes are relative to the frame, origin at the top left.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from reprlib import repr as short

from cac_reward.plain import (
    check_line,
    read_counts,
    read_integer,
    read_json,
    read_number,
    read_numbers,
    read_record,
    read_sequence,
    read_string,
    read_values,
    set_float,
)

SCHEMA_VERSION = 4
MODES = ("full", "fast")
"""How the judge is asked; see `AnomalyReport.mode`."""
NOT_RECORDED = "not recorded"
_LATER: Mapping[int, Mapping[str, object]] = {
    1: {
        **{"revision": None, "decoder": NOT_RECORDED, "attention": None, "prompt_sha256": None},
        **{"settings": None, "tokens": None},
    },
    2: {"settings": None, "tokens": None},
    3: {"tokens": None},
}
"""What reports of an older schema lack, and what stands for it when they are read."""
SEVERITIES = (1, 2, 3)
VERDICTS = ("clean", "anomalous")
UNSPECIFIED = "unspecified"
TIME_TOLERANCE = 0.006
"""Seconds; judges write times with two decimals, so a time may be off by half of 0.01."""

_MAX_TYPE_CHARACTERS = 64
_MAX_WHY_CHARACTERS = 1000


@dataclass(frozen=True, order=True)
class TimeWindow:
    """A stretch of a clip in seconds, half-open: [start_seconds, end_seconds).

    Example:
        >>> TimeWindow(0.25, 1.0).frame_indices(num_frames=13, fps=8.0)
        range(2, 8)
    """

    start_seconds: float
    end_seconds: float

    def __post_init__(self) -> None:
        set_float(self, "start_seconds")
        set_float(self, "end_seconds")
        if not 0 <= self.start_seconds < self.end_seconds:
            raise ValueError(
                "window must have 0 <= start < end in seconds, got "
                f"[{self.start_seconds}, {self.end_seconds}]"
            )

    @property
    def length_seconds(self) -> float:
        return self.end_seconds - self.start_seconds

    def frame_indices(self, num_frames: int, fps: float) -> range:
        """Frames f of the clip with start <= f / fps < end, up to `TIME_TOLERANCE`."""
        # Cut before rounding: the product of two large numbers is infinite.
        first = (self.start_seconds - TIME_TOLERANCE) * fps
        stop = (self.end_seconds - TIME_TOLERANCE) * fps
        return range(
            math.ceil(min(max(first, 0), num_frames)), math.ceil(min(max(stop, 0), num_frames))
        )

    def holds(self, time_seconds: float) -> bool:
        """Whether a time is in the window or at its end, both as they are written, rounded."""
        early = self.start_seconds - 2 * TIME_TOLERANCE
        return early <= time_seconds <= self.end_seconds + 2 * TIME_TOLERANCE

    def to_json(self) -> list[float]:
        return [self.start_seconds, self.end_seconds]

    @classmethod
    def from_json(cls, value: object) -> TimeWindow:
        """Read [start, end].

        Raises:
            ValueError: If `value` is not two numbers that make a window.
        """
        return cls(*read_numbers("window", value, 2))


@dataclass(frozen=True)
class Box:
    """Where a fault is in the frame shown at one time; 0 <= x1 < x2 <= 1, likewise y."""

    time_seconds: float
    x1: float
    y1: float
    x2: float
    y2: float

    def __post_init__(self) -> None:
        for name in ("time_seconds", "x1", "y1", "x2", "y2"):
            set_float(self, name)
        if self.time_seconds < 0:
            raise ValueError(f"time must be at least 0 seconds, got {self.time_seconds}")
        if not (0 <= self.x1 < self.x2 <= 1 and 0 <= self.y1 < self.y2 <= 1):
            raise ValueError(
                "box must have 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1, got "
                f"{list(self.coordinates)}; coordinates are relative to the frame"
            )

    @property
    def coordinates(self) -> tuple[float, float, float, float]:
        return (self.x1, self.y1, self.x2, self.y2)

    @property
    def area(self) -> float:
        return (self.x2 - self.x1) * (self.y2 - self.y1)

    def to_json(self) -> dict[str, object]:
        return {"time": self.time_seconds, "box": list(self.coordinates)}

    @classmethod
    def from_json(cls, value: object) -> Box:
        """Read {"time": t, "box": [x1, y1, x2, y2]}.

        Raises:
            ValueError: If a key is missing or unknown, or the box is not one.
        """
        record = read_record("box", value, ("time", "box"))
        return cls(read_number("time", record["time"]), *read_numbers("box", record["box"], 4))


@dataclass(frozen=True)
class Finding:
    """One fault: what kind, when, where, how bad, and why the judge thinks so."""

    type: str
    """Name of the kind of fault, for example a leaf of `taxonomy`; one printable line."""
    window: TimeWindow
    boxes: tuple[Box, ...] = ()
    """Any number, each inside the window; none means that the place is not known."""
    severity: int = 2
    """1 (slight), 2 (plain) or 3 (severe)."""
    why: str = ""
    """One line of prose; never used for the score."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "boxes", tuple(self.boxes))
        check_line("type", self.type, _MAX_TYPE_CHARACTERS)
        check_line("why", self.why, _MAX_WHY_CHARACTERS)
        if not self.type.strip():
            raise ValueError(f"type must name the kind of fault, got {self.type!r}")
        if not isinstance(self.window, TimeWindow):
            raise ValueError(f"window must be a TimeWindow, got {short(self.window)}")
        object.__setattr__(self, "severity", read_integer("severity", self.severity))
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity must be one of {SEVERITIES}, got {short(self.severity)}")
        for box in self.boxes:
            if not isinstance(box, Box):
                raise ValueError(f"boxes must hold Box objects, got {short(box)}")
            if not self.window.holds(box.time_seconds):
                raise ValueError(
                    f"box time must be inside its window {self.window.to_json()}, "
                    f"got {box.time_seconds}"
                )

    def boxes_at(self, time_seconds: float) -> tuple[Box, ...]:
        """The boxes nearest in time: between its boxes a finding keeps the last or the next."""
        if not self.boxes:
            return ()
        nearest = min(abs(box.time_seconds - time_seconds) for box in self.boxes)
        return tuple(
            box for box in self.boxes if abs(box.time_seconds - time_seconds) <= nearest + 1e-6
        )

    def to_json(self) -> dict[str, object]:
        return {
            "type": self.type,
            "window": self.window.to_json(),
            "boxes": [box.to_json() for box in self.boxes],
            "severity": self.severity,
            "why": self.why,
        }

    @classmethod
    def from_json(cls, value: object) -> Finding:
        """Read what `to_json` wrote.

        Raises:
            ValueError: If a key is missing or unknown, or a value breaks its rule.
        """
        record = read_record("finding", value, ("type", "window", "boxes", "severity", "why"))
        return cls(
            type=read_string("type", record["type"]),
            window=TimeWindow.from_json(record["window"]),
            boxes=tuple(Box.from_json(box) for box in read_sequence("boxes", record["boxes"])),
            severity=read_integer("severity", record["severity"]),
            why=read_string("why", record["why"]),
        )


@dataclass(frozen=True, kw_only=True)
class AnomalyReport:
    """Everything one judgement of one clip produced, enough to draw, check and repeat it."""

    score: float | None
    """P(clean) in [0, 1]; None where the clip could not be judged (then `error` says why)."""
    judge_id: str
    """Model id or folder, with the revision where there is one."""
    revision: str | None = None
    """Commit of the judge's weights where they came from a hub."""
    decoder: str = "greedy"
    """How the judge's answers were chosen."""
    attention: str | None = None
    """The attention kernel the judge ran on, where that is known."""
    fps: float
    """Frames per second of the clip."""
    num_frames: int
    """Frames of the clip."""
    findings: tuple[Finding, ...] = ()
    windows: tuple[TimeWindow, ...] = ()
    """What turn 1 asked to see again; none when it gave its verdict at once."""
    scan_frames: tuple[int, ...] = ()
    """Indices of the clip's frames that turn 1 saw."""
    inspect_frames: tuple[int, ...] = ()
    """Indices of the clip's frames that turn 2 saw."""
    scan_text: str = ""
    """Raw answer of turn 1."""
    judge_text: str | None = None
    """Raw answer of turn 2; None where there was none."""
    settings: Mapping[str, object] | None = None
    """How the judge was asked, numbers and texts by name, such as 'scan.max_frames'; None where
    that was not recorded."""
    prompt: str = ""
    """What the clip was generated from, as given."""
    mode: str = "full"
    """'full' (findings are written before the verdict) or 'fast' (verdict only)."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage, for example {'scan': 0.8, 'inspect': 1.1}."""
    tokens: Mapping[str, int] | None = None
    """Tokens read and written by stage, for example {'scan.read': 812, 'scan.written': 24}; None
    where they were not all counted."""
    note: str | None = None
    """What a reader must know, for example that the clip is outside the judge's domain."""
    error: str | None = None
    """Why the clip could not be judged; None where it was."""

    def __post_init__(self) -> None:
        for name in ("findings", "windows", "scan_frames", "inspect_frames"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "timings", dict(self.timings))
        for name in ("settings", "tokens"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, dict(getattr(self, name)))
        set_float(self, "fps")
        if self.fps <= 0:
            raise ValueError(f"fps must be above 0, got {self.fps}")
        if read_integer("num_frames", self.num_frames) < 1:
            raise ValueError(f"num_frames must be at least 1, got {self.num_frames}")
        if (self.score is None) != (self.error is not None):
            raise ValueError(
                "score must be None exactly where error says why, got "
                f"score={short(self.score)} and error={short(self.error)}"
            )
        if self.score is not None:
            set_float(self, "score")
            if not 0 <= self.score <= 1:
                raise ValueError(f"score must be in [0, 1], got {self.score}")
        for name in ("scan_frames", "inspect_frames"):
            for index in getattr(self, name):
                if not 0 <= read_integer(name, index) < self.num_frames:
                    raise ValueError(f"{name} must be in [0, {self.num_frames}), got {index}")

    @property
    def verdict(self) -> str | None:
        """'clean' from P(clean) 0.5 on, 'anomalous' below, None where there is no score."""
        if self.score is None:
            return None
        return VERDICTS[0] if self.score >= 0.5 else VERDICTS[1]

    @property
    def reward(self) -> float:
        """The score, or NaN where the clip could not be judged."""
        return math.nan if self.score is None else self.score

    @property
    def duration_seconds(self) -> float:
        return self.num_frames / self.fps

    @property
    def prompt_sha256(self) -> str:
        """Hash of the prompt in UTF-8, to join reports with where prompts must not be shown."""
        return hashlib.sha256(self.prompt.encode("utf-8", "surrogatepass")).hexdigest()

    def to_dict(self) -> dict[str, object]:
        """A tree of plain JSON values that `from_dict` reads back to an equal report."""
        plain: dict[str, object] = {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "prompt_sha256": self.prompt_sha256,
        }
        for one in fields(self):
            plain[one.name] = getattr(self, one.name)
        plain["findings"] = [finding.to_json() for finding in self.findings]
        plain["windows"] = [window.to_json() for window in self.windows]
        plain["scan_frames"] = list(self.scan_frames)
        plain["inspect_frames"] = list(self.inspect_frames)
        plain["timings"] = dict(self.timings)
        plain["settings"] = None if self.settings is None else dict(self.settings)
        plain["tokens"] = None if self.tokens is None else dict(self.tokens)
        return plain

    @classmethod
    def from_dict(cls, value: object) -> AnomalyReport:
        """Read what `to_dict` wrote, now or under an older schema.

        Raises:
            ValueError: If the schema is another one, a key is missing or unknown, or a value
                breaks its rule.
        """
        version = value.get("schema_version") if isinstance(value, Mapping) else SCHEMA_VERSION
        if isinstance(version, bool) or version not in (*_LATER, SCHEMA_VERSION):
            raise ValueError(
                f"schema_version must be 1 to {SCHEMA_VERSION}, got {short(version)}; "
                "read this report with the version of cac_reward that wrote it"
            )
        names = [one.name for one in fields(cls)]
        keys = ("schema_version", "verdict", "prompt_sha256", *names)
        later = _LATER.get(version, {})
        if later:
            known = read_record("report", value, [key for key in keys if key not in later])
            value = {**later, **known}
        record = read_record("report", value, keys)
        values = {name: record[name] for name in names}
        for name in ("scan_frames", "inspect_frames"):
            values[name] = tuple(read_integer(name, i) for i in read_sequence(name, record[name]))
        values["windows"] = tuple(
            TimeWindow.from_json(one) for one in read_sequence("windows", record["windows"])
        )
        values["findings"] = tuple(
            Finding.from_json(one) for one in read_sequence("findings", record["findings"])
        )
        for name in ("judge_id", "decoder", "scan_text", "prompt", "mode"):
            values[name] = read_string(name, record[name])
        for name in ("revision", "attention", "judge_text", "note", "error"):
            values[name] = None if record[name] is None else read_string(name, record[name])
        timings = read_record("timings", record["timings"], None)
        values["timings"] = {name: read_number("timings", one) for name, one in timings.items()}
        values["settings"] = read_values("settings", record["settings"])
        values["tokens"] = read_counts("tokens", record["tokens"])
        report = cls(**values)  # type: ignore[arg-type]
        if record["verdict"] != report.verdict:
            raise ValueError(
                f"verdict must agree with score {report.score}, got {short(record['verdict'])}"
            )
        if record["prompt_sha256"] != report.prompt_sha256 and version != 1:
            raise ValueError(
                f"prompt_sha256 must be the hash of the prompt, {report.prompt_sha256}, "
                f"got {short(record['prompt_sha256'])}"
            )
        return report

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> AnomalyReport:
        """Read what `to_json` wrote.

        Raises:
            ValueError: If the text is not JSON or not a report.
        """
        return cls.from_dict(read_json("report", text))
