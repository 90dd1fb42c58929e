"""The annotation format: what is known of one clip, and its form as plain JSON values.

Times are seconds of the clip and boxes are relative to the frame, as in a judge's report. What is
not known is left out, never made up.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import PurePosixPath
from reprlib import repr as short

from cac_reward.exports.base import LabelledClip
from cac_reward.plain import (
    check_line,
    read_integer,
    read_number,
    read_record,
    read_sequence,
    read_string,
)
from cac_reward.report import VERDICTS, Finding, TimeWindow

SCHEMA_VERSION = 1
UNVERSIONED = 0
"""What `cac-reward export --to findings` writes: a clip with findings, without a version."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""How the options of a question are called, in their order."""

FIRST_REASONING = "first_reasoning"
"""Name in `AnnotatedClip.extra` of the thinking that led to `first_answer`."""
NO_WINDOW = "[-1.0, -1.0]"
"""As a `first_answer`: that no stretch is anomalous, in VAU-R1's form."""

MAX_PATH_CHARACTERS = 4096
MAX_PIXELS = 1_000_000
"""Widest and highest frame."""
_UNVERSIONED_KEYS = ("path", "width", "height", "fps", "num_frames", "findings")


class SchemaError(ValueError):
    """An annotation of another schema version, `version`."""

    def __init__(self, version: int, where: str = "", remedy: str = "") -> None:
        self.version = version
        start, end = (f"{where}: " if where else ""), (f"; {remedy}" if remedy else "")
        super().__init__(f"{start}schema_version must be {SCHEMA_VERSION}, got {version}{end}")


@dataclass(frozen=True)
class Caption:
    """A sentence on what happens in a stretch of a clip, usual or not."""

    window: TimeWindow
    text: str

    def __post_init__(self) -> None:
        if not _check_text("caption", self.text).strip():
            raise ValueError(f"caption must say something, got {self.text!r}")

    def to_json(self) -> dict[str, object]:
        return {"window": self.window.to_json(), "text": self.text}

    @classmethod
    def from_json(cls, value: object) -> Caption:
        """Read {"window": [start, end], "text": ...}.

        Raises:
            ValueError: If a key is missing or unknown, or a value breaks its rule.
        """
        record = read_record("caption", value, ("window", "text"))
        return cls(TimeWindow.from_json(record["window"]), read_string("text", record["text"]))


@dataclass(frozen=True, kw_only=True)
class AnnotatedClip:
    """One clip and what people, a teacher or a program that plants faults say of it."""

    path: str
    """Video file, folder of frames, or shard (.tar); relative paths are below a root that the
    reader of the file knows, by default the folder of the annotation file."""
    key: str | None = None
    """Sample of the shard that holds the clip; None where `path` is the clip itself."""
    source: str = ""
    """Data set, generator or tool that the clip comes from."""
    source_video: str | None = None
    """Recording that the clip was cut from or made of; clips that share it belong in one split.
    None: the clip is its own."""
    split: str | None = None
    """For example 'train', 'val' or 'test'."""
    prompt: str = ""
    """What the clip was generated from."""
    fps: float | None = None
    """Frames per second, above 0."""
    duration_seconds: float | None = None
    """Length of the clip, above 0."""
    width: int | None = None
    """Pixels."""
    height: int | None = None
    """Pixels."""
    verdict: str | None = None
    """'clean' or 'anomalous'; None where nobody has said. Findings make it 'anomalous'."""
    category: str | None = None
    """Class of the clip in the words of its data set."""
    findings: tuple[Finding, ...] = ()
    """Faults with type, window, boxes, severity and explanation, in any order, which is kept. An
    anomalous clip without findings is one whose windows are not known."""
    description: str | None = None
    """What is to be seen, in any number of lines."""
    captions: tuple[Caption, ...] = ()
    """Sentences on stretches of the clip."""
    question: str | None = None
    """Asked of the clip."""
    options: tuple[str, ...] = ()
    """Of a multiple-choice question, none or at least two; named by `LETTERS`."""
    answer: str | None = None
    """Letter of the right option, or free text where there are no options."""
    reasoning: str | None = None
    """Why the verdict or the answer is right."""
    first_answer: str | None = None
    """What `reflection` looks back at."""
    reflection: str | None = None
    """What is wrong or right with the first answer."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Anything else, by name."""

    def __post_init__(self) -> None:
        for name in ("findings", "captions", "options"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "extra", dict(self.extra))
        self._check_texts()
        self._check_numbers()
        for finding in self.findings:
            if not isinstance(finding, Finding):
                raise ValueError(f"findings must hold Finding objects, got {short(finding)}")
        if self.findings and self.verdict is None:
            object.__setattr__(self, "verdict", VERDICTS[1])
        if self.verdict not in (None, *VERDICTS):
            raise ValueError(f"verdict must be one of {VERDICTS} or null, got {self.verdict!r}")
        if self.findings and self.verdict == VERDICTS[0]:
            raise ValueError(
                f"verdict must be 'anomalous' where there are findings, got 'clean' and "
                f"{len(self.findings)} findings"
            )
        self._check_question()

    def _check_texts(self) -> None:
        check_line("path", self.path, MAX_PATH_CHARACTERS)
        if not self.path:
            raise ValueError("path must name a file, got ''")
        if "://" in self.path:
            raise ValueError(f"path must be a local file, got {self.path[:200]!r}; fetch it first")
        check_line("source", self.source, MAX_PATH_CHARACTERS)
        for name in ("key", "source_video", "split", "category"):
            value = getattr(self, name)
            if value is not None:
                check_line(name, value, MAX_PATH_CHARACTERS)
                if not value:
                    raise ValueError(f"{name} must be null where it is not known, got ''")
        _check_text("prompt", self.prompt)
        texts = ("description", "question", "answer", "reasoning", "first_answer", "reflection")
        for name in texts:
            value = getattr(self, name)
            if value is not None and not _check_text(name, value).strip():
                raise ValueError(f"{name} must be null where there is none, got {value!r}")
        for name, value in self.extra.items():
            _check_text(f"extra[{_check_text('name in extra', name)!r}]", value)

    def _check_numbers(self) -> None:
        for name in ("fps", "duration_seconds"):
            if getattr(self, name) is not None:
                value = read_number(name, getattr(self, name))
                object.__setattr__(self, name, value)
                if value <= 0:
                    raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and not 1 <= read_integer(name, value) <= MAX_PIXELS:
                raise ValueError(f"{name} must be 1 to {MAX_PIXELS} pixels, got {short(value)}")
        if (self.width is None) != (self.height is None):
            raise ValueError(
                f"width and height must be known together, got {self.width} and {self.height}"
            )

    def _check_question(self) -> None:
        if self.question is None and (self.options or self.answer is not None):
            raise ValueError(
                f"question must be given with options and answer, got {self.options} and "
                f"{self.answer!r}"
            )
        if self.options and not 2 <= len(self.options) <= len(LETTERS):
            raise ValueError(f"options must be 2 to {len(LETTERS)}, got {len(self.options)}")
        for option in self.options:
            _check_text("options", option)
        letters = LETTERS[: len(self.options)]
        if self.options and (self.answer is not None and self.answer not in tuple(letters)):
            raise ValueError(
                f"answer must be the letter of an option, {letters[0]} to {letters[-1]}, got "
                f"{self.answer!r}"
            )

    @property
    def name(self) -> str:
        """What tells this clip from others: its path, with the key where it is in a shard."""
        return self.path if self.key is None else f"{self.path}#{self.key}"

    @property
    def origin(self) -> str:
        """The recording behind the clip: `source_video`, or its own name."""
        return self.name if self.source_video is None else self.source_video

    @property
    def num_frames(self) -> int | None:
        """Frames of the clip; None where rate or length is not known."""
        if self.fps is None or self.duration_seconds is None:
            return None
        return max(1, round(self.duration_seconds * self.fps))

    @classmethod
    def from_labelled(cls, clip: LabelledClip) -> AnnotatedClip:
        """Take a clip from an annotation tool; one without findings has no verdict yet."""
        return cls(
            path=clip.path,
            fps=clip.fps,
            duration_seconds=clip.num_frames / clip.fps,
            width=clip.width,
            height=clip.height,
            findings=clip.findings,
        )

    def to_dict(self) -> dict[str, object]:
        """A tree of plain JSON values that `from_dict` reads back to an equal clip.

        What is empty or not known is left out; no field can be empty but by its default.
        """
        plain: dict[str, object] = {"schema_version": SCHEMA_VERSION}
        plain.update({name: value for name, value in vars(self).items() if value})
        for name in ("findings", "captions"):
            if name in plain:
                plain[name] = [each.to_json() for each in getattr(self, name)]
        if "options" in plain:
            plain["options"] = list(self.options)
        return plain

    @classmethod
    def from_dict(cls, value: object) -> AnnotatedClip:
        """Read what `to_dict` wrote; null is the same as leaving out.

        Raises:
            SchemaError: If it is of another schema version.
            ValueError: If a key is missing or unknown, or a value breaks its rule.
        """
        record = read_record("clip", value, None)
        version = schema_version(record)
        if version != SCHEMA_VERSION:
            raise SchemaError(version)
        _check_keys(record)
        values = {
            name: one
            for name, one in record.items()
            if one is not None and name != "schema_version"
        }
        for name, read in (("findings", Finding.from_json), ("captions", Caption.from_json)):
            if name in values:
                listed = read_sequence(name, values[name])
                values[name] = tuple(read(one) for one in listed)  # type: ignore[operator]
        if "options" in values:
            values["options"] = tuple(read_sequence("options", values["options"]))
        if "extra" in values:
            values["extra"] = read_record("extra", values["extra"], None)
        return cls(**values)  # type: ignore[arg-type]


def schema_version(record: Mapping[str, object]) -> int:
    """Version of an annotation as plain values; `UNVERSIONED` for exported findings.

    Raises:
        ValueError: If it states none and is no exported finding either.
    """
    if "schema_version" in record:
        return read_integer("schema_version", record["schema_version"])
    if set(record) == set(_UNVERSIONED_KEYS):
        return UNVERSIONED
    raise ValueError(
        f"clip must state its schema_version, {SCHEMA_VERSION}, got the keys {short(list(record))}"
    )


def upgrade(value: object) -> AnnotatedClip:
    """Read an annotation of this or any older schema version.

    Raises:
        SchemaError: If the version is newer than this code.
        ValueError: If it is no annotation.
    """
    record = read_record("clip", value, None)
    version = schema_version(record)
    if version == UNVERSIONED:
        findings = tuple(map(Finding.from_json, read_sequence("findings", record["findings"])))
        known = {name: record[name] for name in _UNVERSIONED_KEYS[:-1]}
        return AnnotatedClip.from_labelled(LabelledClip(**known, findings=findings))  # type: ignore[arg-type]
    return AnnotatedClip.from_dict(record)


def conversion_hint(version: int, path: str) -> str:
    """What to do with a file of another schema version."""
    if version > SCHEMA_VERSION:
        return "a newer cac_reward wrote it; update with: pip install --upgrade cac-reward"
    place = PurePosixPath(path)
    converted = place.with_name(f"{place.stem}.v{SCHEMA_VERSION}{place.suffix or '.jsonl'}")
    source, output = shlex.quote(path), shlex.quote(str(converted))
    return f"convert it with: cac-reward annotate convert {source} --output {output}"


def _check_text(name: str, value: object) -> str:
    """Text of any number of lines that every file can hold."""
    text = read_string(name, value)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} must be valid Unicode, got {text[:80]!r}: {error}") from error
    return text


def _check_keys(record: Mapping[str, object]) -> None:
    known = [one.name for one in fields(AnnotatedClip)]
    unknown = [name for name in record if name not in (*known, "schema_version")]
    if unknown:
        near = get_close_matches(str(unknown[0]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "put what has no field into 'extra'"
        raise ValueError(f"clip must have no key {short(unknown[0])}; {hint}")
    if record.get("path") is None:
        raise ValueError(f"clip must have 'path', got only {short(sorted(map(str, record)))}")
