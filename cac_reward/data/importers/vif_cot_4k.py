"""ViF-CoT-4K (Skyra): chats over frames, with `<type>` in `<t>` at `<bbox>` inside the reasoning.

A chat is one clip: the user shows frames as `[T=1.23s] <image>`, the assistant thinks and answers
Fake or Real. Boxes are relative to the frame; all zeros mean no place, as for a camera's motion.
One box holds for its whole window and is kept at the window's middle.

Source: https://github.com/JoeLeelyf/Skyra (arXiv:2512.15693), the chats that its LLaMA-Factory
training reads; data under CC BY 4.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.importers.base import (
    ImportSettings,
    Outcome,
    check_texts,
    in_column,
    json_entries,
    one_line,
    read_entries,
)
from cac_reward.exports.base import make_box
from cac_reward.plain import read_sequence, read_string
from cac_reward.report import Finding, TimeWindow
from cac_reward.taxonomy import leaf_type

VERDICTS = {"Real": "clean", "Fake": "anomalous"}
_SPEAKERS = {"assistant": "assistant", "gpt": "assistant", "user": "user", "human": "user"}
_NUMBER = r"\s*(-?[0-9]+(?:\.[0-9]+)?)\s*"
_FAULT = re.compile(
    rf"<type>([^<]*)</type>\s*in\s*<t>\s*\[{_NUMBER},{_NUMBER}\]\s*</t>\s*at\s*"
    rf"<bbox>\s*\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]\s*</bbox>"
)
_TAG = re.compile(r"</?(?:type|t|bbox)>")
_STAMP = re.compile(r"\[T=([0-9]+(?:\.[0-9]+)?)s\]\s*<image>")
_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n")


def read_vif_cot_4k(path: Path, settings: ImportSettings) -> Iterator[Outcome]:
    """Every chat of a JSON list, in order.

    Raises:
        ValueError: If the file is no JSON list, with line and column.
    """
    entries = ((line, value) for line, _, value in json_entries(path))
    return read_entries(path, entries, lambda chat: _clip(chat, settings))


def _clip(chat: object, settings: ImportSettings) -> AnnotatedClip:
    if not isinstance(chat, Mapping):
        raise ValueError(f"chat must be an object, got {type(chat).__name__}")
    check_texts(chat)
    said = _said(chat)
    with in_column("'images'"):
        folder = _folder(chat)
    stamps = [float(one) for one in _STAMP.findall(said["user"])]
    with in_column("text of user"):
        if len(stamps) != len(chat["images"]):
            raise ValueError(
                f"text must have a time [T=...s] for each image, got {len(stamps)} times and "
                f"{len(chat['images'])} images"
            )
    with in_column("text of assistant"):
        answer = _only(said["assistant"], "answer").strip()
        if answer not in VERDICTS:
            raise ValueError(f"answer must be Real or Fake, got {answer[:80]!r}")
        reasoning = _only(said["assistant"], "think").strip()
        # In a real clip the tagged regions are those that were looked at and cleared.
        findings = _findings(reasoning, stamps) if answer == "Fake" else ()
    with in_column("'images'"):
        fields = settings.clip(folder.as_posix(), folder.name)
    return AnnotatedClip(
        **fields,
        source=f"vif_cot_4k/{folder.parent.name}",
        # A generated clip and the real one that it was made after share their name.
        source_video=folder.name,
        split="train" if settings.split is None else settings.split,
        verdict=VERDICTS[answer],
        findings=findings,
        reasoning=reasoning or None,
    )


def _said(chat: Mapping[str, Any]) -> dict[str, str]:
    """What user and assistant say, in either of the layouts that LLaMA-Factory reads."""
    name = "messages" if "messages" in chat else "conversations"
    said: dict[str, str] = {}
    with in_column(f"'{name}'"):
        for message in read_sequence(name, chat.get(name)):
            if not isinstance(message, Mapping):
                raise ValueError(f"message must be an object, got {type(message).__name__}")
            speaker = _SPEAKERS.get(str(message.get("role", message.get("from"))))
            text = read_string("message", message.get("content", message.get("value")))
            if speaker is not None and speaker in said:
                raise ValueError(f"chat must have one message of the {speaker}, got more")
            if speaker is not None:
                said[speaker] = text
        for speaker in ("user", "assistant"):
            if speaker not in said:
                raise ValueError(f"chat must have a message of the {speaker}, got none")
    return said


def _folder(chat: Mapping[str, Any]) -> PurePosixPath:
    """The folder of the frames, which is the clip."""
    images = read_sequence("images", chat.get("images"))
    folders = {PurePosixPath(read_string("image", one)).parent for one in images}
    if len(folders) != 1:
        raise ValueError(f"images must be in one folder, got {len(folders)}")
    return folders.pop()


def _only(text: str, tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    if len(found) != 1:
        raise ValueError(f"text must have one <{tag}>...</{tag}>, got {len(found)}")
    return str(found[0])


def _findings(reasoning: str, stamps: list[float]) -> tuple[Finding, ...]:
    findings = []
    for tag in re.finditer("<type>", reasoning):
        place = tag.start()
        with in_column(f"text of assistant, character {place + 1} of the reasoning"):
            fault = _FAULT.match(reasoning, place)
            if fault is None:
                raise ValueError(
                    "fault must be <type>name</type> in <t>[start, end]</t> at <bbox>[x1, y1, x2, "
                    f"y2]</bbox>, got {reasoning[place : place + 120]!r}"
                )
            kind = leaf_type(fault[1].strip(), "vif_cot_4k").name
            start, end, x1, y1, x2, y2 = (float(one) for one in fault.groups()[1:])
            window = _window(start, end, stamps)
            middle = (window.start_seconds + window.end_seconds) / 2
            nowhere = (x1, y1, x2, y2) == (0, 0, 0, 0)
            boxes = () if nowhere else (make_box(middle, (x1, y1, x2, y2)),)
            why = _sentence(reasoning, fault.start(), fault.end())
            findings.append(Finding(kind, window, boxes, why=why))
    return tuple(findings)


def _window(start: float, end: float, stamps: list[float]) -> TimeWindow:
    """A window; one that names a single frame lasts until the next frame that was shown."""
    if start != end or len(stamps) < 2:
        return TimeWindow(start, end)
    later = [one for one in stamps if one > start + 0.005]
    return TimeWindow(start, later[0] if later else start + stamps[-1] - stamps[-2])


def _sentence(text: str, start: int, end: int) -> str:
    """The sentence around a fault, without its tags."""
    ends = [one.end() for one in _SENTENCE_END.finditer(text)]
    begin = max((one for one in ends if one <= start), default=0)
    stop = min((one for one in ends if one >= end), default=len(text))
    return one_line(_TAG.sub("", text[begin:stop]))
