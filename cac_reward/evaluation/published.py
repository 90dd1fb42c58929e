"""Answers of published systems, in the files that their own code writes, as predictions.

VAU-R1 writes a CSV for each task, 'Video Name' and one of `VAU_R1_COLUMNS` (two for reasoning); the
rules by which its evaluation reads an answer hold here: a missing tag falls back to the first [..],
mm:ss is a time, what is no interval counts as none, and the first row on a video counts. Skyra
writes one JSON list. A bare verdict has P(clean) 0 or 1.

Sources: https://github.com/GVCLab/VAU-R1 (src/evaluation/, arXiv:2505.23504);
https://github.com/JoeLeelyf/Skyra (eval/, arXiv:2512.15693).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cac_reward.data.importers.base import check_texts, json_entries, one_line
from cac_reward.evaluation.answered import read_answered
from cac_reward.evaluation.predictions import Prediction
from cac_reward.plain import read_record, read_string, read_table, read_text
from cac_reward.records import read_records
from cac_reward.report import UNSPECIFIED, Box, Finding, TimeWindow
from cac_reward.taxonomy import SOURCES

GROUNDING, CLASS, OPTION = "Temporal Grounding", "CLS answer", "QA answer"
PROSE = ("Description", "Analysis")
VAU_R1_COLUMNS = (GROUNDING, CLASS, OPTION, *PROSE)
CLASSES = (
    *("Abuse", "Agriculture", "Arrest", "Arson", "Assault", "Explosion", "Fighting", "Fire"),
    *("Food Safety", "Medical Abnormality", "Natural Hazard", "Normal", "Object_falling"),
    *("People_falling", "Robbery", "Shooting", "Stealing", "Traffic_accident", "Vandalism"),
    "Water_incident",
)
"""That VAU-R1's classification chooses from."""
_GAP = r"[_\s]*"
_CLASS = re.compile(
    r"\b(?:" + "|".join(f"({re.sub('[ _]', lambda _: _GAP, one)})" for one in CLASSES) + r")\b",
    re.IGNORECASE,
)
_TIME = re.compile(r"(?:(?:([0-9]+):)?([0-9]+):)?(-?(?:[0-9]+\.?[0-9]*|\.[0-9]+))")
_LETTER = re.compile(r"(?<![A-Za-z0-9])([A-D])(?![A-Za-z0-9])", re.IGNORECASE)
_FAULT = re.compile(
    r"<type>([^<]*)</type>\s*in\s*<t>\s*\[([^\]<]*)\]\s*</t>"
    r"(?:\s*at\s*<bbox>\s*\[([^\]<]*)\]\s*</bbox>)?"
)


def read_reports(paths: Sequence[Path]) -> dict[str, Prediction]:
    """Lines that `cac-reward score --output` wrote, by the path of their clip.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line is no record.
    """
    found: dict[str, Prediction] = {}
    for path in paths:
        found |= {name: Prediction.from_record(one) for name, one in read_records(path).items()}
    return found


def read_vau_r1(paths: Sequence[Path]) -> dict[str, Prediction]:
    """CSVs of VAU-R1's tasks, by the name of their video; several files make one prediction.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file has none of the columns, or two files answer the same of a video.
    """
    answers: dict[str, dict[str, tuple[str, Path]]] = {}
    for path in paths:
        rows = read_table("predictions", read_text("predictions", path), ["Video Name"])
        columns = [name for name in VAU_R1_COLUMNS if rows and name in rows[0][1]]
        if not columns:
            raise ValueError(
                f"predictions must have one of the columns {', '.join(VAU_R1_COLUMNS)}, got none "
                f"in {path}"
            )
        for line, row in rows:
            name = (row["Video Name"] or "").strip()
            if not name:
                raise ValueError(f"predictions must name a video, got none in {path}, line {line}")
            # VAU-R1's inference leaves the suffix off where its list does.
            known = answers.setdefault(name if name.endswith(".mp4") else f"{name}.mp4", {})
            for column in columns:
                text, first = known.setdefault(column, (row[column] or "", path))
                if first != path:
                    raise ValueError(
                        f"{column} of {name} must be in one file, got {first} and {path}"
                    )
    return {name: _vau_r1(said) for name, said in answers.items()}


def _vau_r1(answers: Mapping[str, tuple[str, Path]]) -> Prediction:
    """One video's answers to all the tasks it was asked."""
    found = Prediction(judge=", ".join(dict.fromkeys(path.stem for _, path in answers.values())))
    failures = []
    if CLASS in answers:
        category = named_class(answers[CLASS][0])
        failures += [] if category else [f"no class in {answers[CLASS][0][:80]!r}"]
        clean = None if category is None else float(category == "Normal")
        found = replace(found, category=category, p_clean=clean)
    if GROUNDING in answers:
        text = answers[GROUNDING][0]
        window, verdict = grounded_window(text), _verdict(text, "anomaly", "normal")
        findings = () if window is None else (Finding(UNSPECIFIED, window),)
        failures += [] if "[" in text or verdict is not None else [f"nothing in {text[:80]!r}"]
        # A verdict beside the interval counts before that of the class.
        verdict = found.p_clean if verdict is None else verdict
        found = replace(found, located=True, findings=findings, p_clean=verdict)
        # It was asked for one interval, never for a place or for what is wrong there.
        found = replace(found, boxes_asked=False, types_asked=False)
    if OPTION in answers:
        option = option_letter(answers[OPTION][0])
        failures += [] if option else [f"no option in {answers[OPTION][0][:80]!r}"]
        found = replace(found, option=option)
    prose = [f"{name}: {answers[name][0]}" for name in PROSE if answers.get(name, ("",))[0].strip()]
    return replace(found, text="\n".join(prose) or None, failure=failures[0] if failures else None)


def grounded_window(text: str) -> TimeWindow | None:
    """The interval of a grounding answer, by VAU-R1's rules.

    Inside `<glue>`, else inside the first square brackets; two numbers or times with a comma
    between. A beginning before 0 is 0. None where there is no such interval or it has no length.
    """
    found = re.search(r"<glue>(.*?)</glue>", text) or re.search(r"\[(.*?)\]", text)
    words = re.sub(r"[^0-9:.,-]", "", found[1]).split(",") if found else []
    times = [_seconds(word) for word in words]
    if len(times) != 2 or times[0] is None or times[1] is None:
        return None
    start = max(times[0], 0.0)
    return TimeWindow(start, times[1]) if start < times[1] else None


def named_class(text: str) -> str | None:
    """The first of `CLASSES` in the `<answer>`, or anywhere where that tag is missing."""
    tagged = re.search(r"<answer>(.*?)(?:</answer>|$)", text, re.DOTALL)
    found = _CLASS.search(tagged[1] if tagged else text)
    return None if found is None or found.lastindex is None else CLASSES[found.lastindex - 1]


def option_letter(text: str) -> str | None:
    """The letter of an answer to a question, by VAU-R1's rules.

    The one in `<answer>`; else one in angle brackets; else the last that stands alone behind the
    thinking; else the last that stands alone.
    """
    for pattern in (r"<answer>\s*([A-D])\s*</answer>", r"<\s*([A-D])\s*/?\s*>"):
        tagged = re.search(pattern, text, re.IGNORECASE)
        if tagged:
            return tagged[1].upper()
    _, thought, tail = re.sub("(?i)</think>", "</think>", text).rpartition("</think>")
    alone = (_LETTER.findall(tail) if thought else []) or _LETTER.findall(text)
    return str(alone[-1]).upper() if alone else None


def read_skyra(paths: Sequence[Path]) -> dict[str, Prediction]:
    """JSON lists that Skyra's inference writes, by `video_id`.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is no such list, or a video is answered twice.
    """
    found: dict[str, Prediction] = {}
    for path in paths:
        for line, _, value in json_entries(path):
            try:
                check_texts(value)
                record = read_record("answer", value, None)
                name = read_string("video_id", record.get("video_id"))
                if not name or name in found:
                    raise ValueError(f"video_id must be there once, got {name!r} again")
                text = read_string("response", record.get("response"))
                judge = read_string("mllm_model_name", record.get("mllm_model_name"))
            except ValueError as error:
                raise ValueError(f"{path}: line {line}: {error}") from error
            found[name] = replace(read_inline(text), judge=judge)
    return found


def read_inline(text: str) -> Prediction:
    """An answer with `<type>..</type> in <t>[s,e]</t> at <bbox>[..]</bbox>` in its reasoning.

    A finding whose window is none is left out and counted; so is a box that is none. One box holds
    for its whole window and is kept at the window's middle; four zeros are no place. In a clip
    said to be real the tags are what was looked at and cleared.
    """
    verdict = _verdict(text, "fake", "real")
    failure = None if verdict is not None else f"no verdict in {text[-80:]!r}"
    found = Prediction(p_clean=verdict, failure=failure, located=verdict is not None, text=text)
    if verdict != 0:
        return found
    findings, lost, boxes, invalid = [], 0, 0, 0
    names = SOURCES["vif_cot_4k"]
    for kind, times, corners in _FAULT.findall(text):
        seconds, place = _numbers(times, 2), _numbers(corners, 4)
        if seconds is None or not 0 <= seconds[0] < seconds[1]:
            lost += 1
            continue
        window = TimeWindow(*seconds)
        given = bool(corners) and place != [0, 0, 0, 0]
        box = _box(sum(seconds) / 2, place)
        boxes, invalid = boxes + given, invalid + (given and box is None)
        name = one_line(names.get(kind.strip(), kind))[:64].strip() or UNSPECIFIED
        findings.append(Finding(name, window, () if box is None else (box,)))
    return replace(
        found,
        findings=tuple(findings),
        windows_unusable=lost,
        boxes_written=boxes,
        boxes_invalid=invalid,
    )


def _verdict(text: str, anomalous: str, clean: str) -> float | None:
    """0 or 1 by the word in `<answer>`, looked for in this order; None where neither is there."""
    tagged = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    said = tagged[1].lower() if tagged else ""
    return 0.0 if anomalous in said else 1.0 if clean in said else None


def _seconds(word: str) -> float | None:
    """Seconds of a number, m:s or h:m:s."""
    found = _TIME.fullmatch(word)
    if found is None:
        return None
    return 3600 * int(found[1] or 0) + 60 * int(found[2] or 0) + float(found[3])


def _numbers(text: str, count: int) -> list[float] | None:
    words = [word.strip().removesuffix("s") for word in text.split(",")]
    values = [_seconds(word) for word in words]
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) == count else None


def _box(time: float, place: list[float] | None) -> Box | None:
    """A box at a time; None where the numbers make none."""
    if place is None:
        return None
    x1, y1, x2, y2 = place
    if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
        return None
    return Box(time, x1, y1, x2, y2)


FORMATS: Mapping[str, Callable[[Sequence[Path]], dict[str, Prediction]]] = {
    "reports": read_reports,
    "vau_r1": read_vau_r1,
    "skyra": read_skyra,
    "answers": read_answered,
}
"""Readers by the name of the format."""
