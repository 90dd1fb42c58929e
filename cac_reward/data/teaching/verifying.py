"""Whether a teacher's answer may be kept: its form, its times, and what the annotation says.

Nothing is mended: an answer is kept as it is or refused with every reason that was found.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from cac_reward.answers import MAX_WINDOWS, limited, load_json
from cac_reward.data.teaching.stretches import Stretch
from cac_reward.overlap import window_iou
from cac_reward.plain import check_line
from cac_reward.questions import sanitise_prompt
from cac_reward.report import TIME_TOLERANCE, UNSPECIFIED, VERDICTS, TimeWindow

RULES: Mapping[str, str] = MappingProxyType(
    {
        "form": "is one JSON object of the schema, of plain text without tags",
        "cut": "ends before the limit of tokens",
        "refused": "is given at all",
        "outside": "times are inside the stretch that is shown",
        "verdict": "verdict as annotated, and findings exactly where it is anomalous",
        "type": "findings are of the annotated types",
        "window": "windows lie on the annotated ones",
        "missing": "every annotated finding is among the findings",
        "answer": "the answer to the question is the annotated one",
        "judgement": "the reflection knows whether the first answer was right",
        "source": "does not speak of the annotation, which the reader cannot see",
    }
)
MAX_PROSE_CHARACTERS = 4000
MAX_WHY_CHARACTERS = 1000

Schema = Mapping[str, Any]
"""What answers need of JSON Schema. Lengths are checked here: not every server knows them."""
Reason = tuple[str, str]
"""A key of `RULES`, and why."""


class RejectedAnswerError(ValueError):
    """An answer that is not kept."""

    def __init__(self, reasons: Sequence[Reason]) -> None:
        super().__init__("; ".join(why for _, why in reasons))
        self.reasons = tuple(reasons)


@dataclass(frozen=True)
class Claim:
    """A finding as a teacher says it."""

    type: str
    window: TimeWindow
    why: str


def text_schema(choices: Sequence[str] | None = None) -> Schema:
    """A text, or one of some texts."""
    return {"type": "string"} if choices is None else {"type": "string", "enum": list(choices)}


def object_schema(**properties: Schema) -> Schema:
    """An object with exactly these keys."""
    return {
        "type": "object",
        "properties": {name: dict(one) for name, one in properties.items()},
        "required": list(properties),
        "additionalProperties": False,
    }


def list_schema(item: Schema) -> Schema:
    """A list of any length."""
    return {"type": "array", "items": dict(item)}


# An object and no pair: not every server knows lists of a fixed length.
WINDOW_SCHEMA = object_schema(start={"type": "number"}, end={"type": "number"})


def read_json_answer(text: str, schema: Schema) -> dict[str, Any]:
    """An answer as plain values of a schema.

    A leading <think> ... </think> and the fence of a code block around everything are left out:
    many servers leave them in.

    Raises:
        RejectedAnswerError: If it is anything else.
    """
    body = re.sub(r"\A\s*<think>.*?</think>", "", text, flags=re.DOTALL).strip()
    fenced = re.fullmatch(r"```(?:json)?\n(.*)\n```", body, flags=re.DOTALL)
    try:
        value = load_json(limited(fenced.group(1) if fenced else body))
        _check_schema("answer", value, schema)
    except ValueError as error:
        raise RejectedAnswerError([("form", str(error))]) from error
    assert isinstance(value, dict)
    return value


def read_claims(answer: Mapping[str, Any]) -> tuple[Claim, ...]:
    """The findings of an answer that fits its schema.

    Raises:
        RejectedAnswerError: If one is none, or there are too many.
    """
    claims, reasons = [], []
    listed = answer["findings"]
    if len(listed) > MAX_WINDOWS:
        reasons.append(("form", f"findings must be at most {MAX_WINDOWS}, got {len(listed)}"))
    for number, one in enumerate(listed):
        try:
            check_line(f"findings[{number}].why", one["why"], MAX_WHY_CHARACTERS)
            claims.append(Claim(one["type"], read_window(one["window"]), one["why"]))
        except ValueError as error:
            reasons.append(("form", f"findings[{number}]: {error}"))
    if reasons:
        raise RejectedAnswerError(reasons)
    return tuple(claims)


def read_window(value: Mapping[str, float]) -> TimeWindow:
    """A window of `WINDOW_SCHEMA`.

    Raises:
        ValueError: If it does not begin before it ends, from 0 on.
    """
    return TimeWindow(value["start"], value["end"])


def window_reasons(name: str, window: TimeWindow, within: TimeWindow) -> Iterator[Reason]:
    """Why a window is not inside a stretch, as times are written."""
    if not (within.holds(window.start_seconds) and within.holds(window.end_seconds)):
        yield "outside", f"{name} must be within {_span(within)}, got {_span(window)}"


def prose_reasons(
    name: str, text: object, within: TimeWindow, *, reader_sees_video_only: bool = True
) -> Iterator[Reason]:
    """Why a text may not be taught.

    A time as it stands before a frame ("<1.25 seconds>") or as on a clock ("0:01") must be inside
    the stretch. Another number of seconds or minutes may be a time or a duration: it must be
    inside, or no longer than the stretch.

    Args:
        name: of the text.
        text: that is said.
        within: the stretch.
        reader_sees_video_only: refuse to speak of the annotation.
    """
    assert isinstance(text, str)
    if not text.strip():
        yield "form", f"{name} must say something, got {text!r}"
    if len(text) > MAX_PROSE_CHARACTERS:
        yield "form", f"{name} must have at most {MAX_PROSE_CHARACTERS} characters, got {len(text)}"
        return
    plain = _STAMP.sub(" ", text)
    try:
        speaks = sanitise_prompt(plain) != " ".join(unicodedata.normalize("NFKC", plain).split())
    except ValueError as error:
        yield "form", f"{name}: {error}"
        return
    if speaks:
        yield "form", f"{name} must be plain text without tags, calls and hidden characters"
    outside = sorted({said for said, fits in _spoken_times(text, within) if not fits})
    if outside:
        yield (
            "outside",
            f"{name} must name times within {_span(within)} only, as <1.25 seconds>, got "
            f"{', '.join(outside[:5])}",
        )
    told = _SOURCE.search(text)
    if reader_sees_video_only and told:
        yield "source", f"{name} must not speak of the annotation, got {told.group()!r}"


def verdict_reasons(verdict: object, claims: Sequence[Claim]) -> Iterator[Reason]:
    """Why a verdict does not follow from the findings beside it."""
    if (verdict == VERDICTS[1]) != bool(claims):
        yield (
            "verdict",
            f"findings must be given exactly where the verdict is anomalous, got {len(claims)} "
            f"with {verdict!r}",
        )


def disagreements(
    verdict: object, claims: Sequence[Claim], stretch: Stretch, min_iou: float
) -> Iterator[Reason]:
    """What of an answer the annotation of a stretch contradicts.

    A finding agrees with an annotated one of its type (of any type where that is unspecified) if
    their windows share something and at least `min_iou` of what either covers. Where it is known
    that something is wrong but not when, only the verdict is compared.
    """
    if verdict != stretch.verdict:
        yield "verdict", f"verdict must be {stretch.verdict!r} as annotated, got {verdict!r}"
        return
    if not stretch.findings:
        return
    known = stretch.findings
    strays = 0
    for claim in claims:
        same = [one for one in known if one.type in (UNSPECIFIED, claim.type)]
        if not same:
            kinds = ", ".join(sorted({one.type for one in known}))
            yield "type", f"findings must be of the annotated types ({kinds}), got {claim.type!r}"
        elif not any(_on(claim.window, one.window, min_iou) for one in same):
            strays += 1
            spans = ", ".join(_span(one.window) for one in same)
            yield (
                "window",
                f"window of {claim.type} must lie on {spans} (overlap over union at least "
                f"{min_iou:g}), got {_span(claim.window)}",
            )
    for one in known:
        fitting = [claim for claim in claims if one.type in (UNSPECIFIED, claim.type)]
        covered = any(_on(claim.window, one.window, min_iou) for claim in fitting)
        # A window beside the annotated one is a wrong window, not also a missing one.
        if not covered and not (fitting and strays):
            yield "missing", f"findings must hold the annotated {one.type} at {_span(one.window)}"


def _on(first: TimeWindow, second: TimeWindow, min_iou: float) -> bool:
    overlap = window_iou(first, second)
    # The quotient of two rounded lengths may be a hair below what it stands for.
    return overlap > 0 and overlap >= min_iou - 1e-9


_STAMP = re.compile(r"<\s*(\d+(?:\.\d+)?)\s*seconds?\s*>")
_NUMBER = r"(?<![\w.:])(\d+(?:\.\d+)?)"
_UNIT = r"(?:s|secs?|seconds?|min|mins|minutes?)\b"
_RANGE = re.compile(
    rf"{_NUMBER}\s*(?:-|\u2013|to|and|until)\s*(\d+(?:\.\d+)?)(\s*|-)({_UNIT})", re.I
)
_SINGLE = re.compile(rf"{_NUMBER}(\s*|-)({_UNIT})", re.I)
_CLOCK = re.compile(r"(?<![\w:.])(\d{1,3}):([0-5]\d(?:\.\d+)?)(?![\d:]|\s*[ap]\.?m\b)", re.I)
_KINDS = {"string": str, "number": int | float, "boolean": bool}
_SOURCE = re.compile(r"\bannotat\w*|\bground[- ]?truth|\bgold[- ](?:answer|label|standard)", re.I)


def _spoken_times(text: str, within: TimeWindow) -> Iterator[tuple[str, bool]]:
    """Times that a text names, and whether they can be meant."""
    for found in _STAMP.finditer(text):
        yield found.group(), within.holds(float(found.group(1)))
    text = _STAMP.sub(" ", text)
    for found in _CLOCK.finditer(text):
        yield found.group(), within.holds(60 * int(found.group(1)) + float(found.group(2)))
    for pattern in (_RANGE, _SINGLE):
        for found in pattern.finditer(text):
            *numbers, gap, unit = found.groups()
            if unit in "sS" and not gap and numbers[-1].endswith("0") and "." not in numbers[-1]:
                continue  # The 1990s, a man in his 40s.
            scale = 60 if unit.lower().startswith("min") else 1
            seconds = [scale * float(number) for number in numbers]
            longest = within.length_seconds + 2 * TIME_TOLERANCE
            yield found.group(), all(one <= longest or within.holds(one) for one in seconds)


def _check_schema(name: str, value: Any, schema: Schema) -> None:
    """Refuse what a schema of this module does not allow."""
    kind, choices = schema["type"], schema.get("enum")
    if kind == "object":
        if not isinstance(value, dict) or set(value) != set(schema["required"]):
            keys = ", ".join(schema["required"])
            raise ValueError(f"{name} must be an object with exactly the keys {keys}")
        for key, one in schema["properties"].items():
            _check_schema(f"{name}.{key}", value[key], one)
    elif kind == "array":
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list")
        for number, one in enumerate(value):
            _check_schema(f"{name}[{number}]", one, schema["items"])
    elif choices is not None and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}")
    elif not isinstance(value, _KINDS[kind]) or isinstance(value, bool) != (kind == "boolean"):
        raise ValueError(f"{name} must be a {kind}")


def _span(window: TimeWindow) -> str:
    return f"[{window.start_seconds:.2f}, {window.end_seconds:.2f}]"
