"""What `benchmarks.fuzz` reads: for each reader, how inputs are made and what must hold of them.

A reader's `read` raises an AssertionError where something was read that breaks a promise.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.damage import damage_bytes, damage_text, damage_tree
from benchmarks.fuzz_reports import (
    SECONDS,
    some_clip,
    some_findings,
    some_line,
    some_record,
    some_report,
)
from benchmarks.fuzz_videos import sound_video
from cac_reward.answers import (
    AnswerError,
    parse_findings,
    parse_scan_answer,
    write_findings,
    write_scan_answer,
)
from cac_reward.batch import PROMPT_FORMATS, Clip, read_prompts
from cac_reward.calibration import Calibration, read_labels
from cac_reward.exporting import FORMATS
from cac_reward.exports.base import EntryError
from cac_reward.exports.cvat import read_cvat, write_cvat
from cac_reward.frames import JUDGE_FILE, InspectSettings, JudgeSettings, ScanSettings
from cac_reward.records import RecordWriter, read_records
from cac_reward.report import AnomalyReport, Finding
from cac_reward.server.decoding import decode_clip
from cac_reward.server.settings import ServerLimits, ServerSettings
from cac_reward.server.wire import (
    WireError,
    flow_factory_clips,
    own_clips,
    parse_json,
    unirl_clips,
)
from cac_reward.video import Video, VideoLimits

LIMITS = VideoLimits(max_frames=300, max_pixels=512 * 512, max_bytes=2**26)
SERVER = ServerSettings(frames_fps=8.0)
DECODING = {
    **asdict(ServerLimits(max_frames=300, max_pixels=512 * 512, max_decoded_bytes=2**26)),
    "media_root": None,
}
SOUND_SHARE = 0.15
"""Of the inputs, those that are not damaged and must be read."""


@dataclass(frozen=True)
class Target:
    """A reader."""

    name: str
    count: int
    """Inputs tried where no other number is asked for."""
    make: Callable[[random.Random], tuple[Any, bool]]
    """An input, and whether it was damaged."""
    read: Callable[[Any, Path], None]
    """Reads an input and checks what was read; may write into the folder."""
    errors: tuple[type[BaseException], ...] = (ValueError,)
    """Exactly these kinds of error are documented."""


def is_sound(chance: random.Random) -> bool:
    return chance.random() < SOUND_SHARE


def damaged_json(chance: random.Random, text: str) -> str:
    """JSON whose values are others, or whose text is."""
    if chance.random() < 0.6:
        tree = damage_tree(chance, json.loads(text))
        return json.dumps(tree, ensure_ascii=chance.random() < 0.5)
    return damage_text(chance, text)


def make_text(
    write: Callable[[random.Random], str], as_bytes: bool = False
) -> Callable[[random.Random], tuple[Any, bool]]:
    """Inputs that are JSON as one of our writers writes it, whole or damaged."""

    def make(chance: random.Random) -> tuple[str | bytes, bool]:
        text = write(chance)
        damaged = not is_sound(chance)
        if damaged and as_bytes and chance.random() < 0.4:
            return damage_bytes(chance, text.encode()), True
        text = damaged_json(chance, text) if damaged else text
        return (text.encode("utf-8", "surrogatepass") if as_bytes else text), damaged

    return make


def make_answer(write: Callable[[random.Random], str]) -> Callable[..., tuple[str, bool]]:
    """Inputs that are a judge's answers, whole or damaged."""

    def make(chance: random.Random) -> tuple[str, bool]:
        text = write(chance)
        if is_sound(chance):
            return text, False
        start, end = text.find("{"), text.rfind("}") + 1
        if end and chance.random() < 0.5:
            return text[:start] + damaged_json(chance, text[start:end]) + text[end:], True
        return damage_text(chance, text), True

    return make


def read_call(text: str, _: Path) -> None:
    windows = parse_scan_answer(text, SECONDS)
    assert all(0 <= w.start_seconds < w.end_seconds <= SECONDS + 0.02 for w in windows)
    again = parse_scan_answer(write_scan_answer(windows), SECONDS)
    assert len(again) == len(windows)


def read_answer(text: str, _: Path) -> None:
    findings = parse_findings(text, SECONDS)
    assert all(finding.window.end_seconds <= SECONDS + 0.02 for finding in findings)
    assert all(Finding.from_json(finding.to_json()) == finding for finding in findings)
    written = write_findings(findings)
    assert write_findings(parse_findings(written, SECONDS)) == written


def read_report(text: str, _: Path) -> None:
    report = AnomalyReport.from_json(text)
    assert AnomalyReport.from_json(report.to_json()) == report
    assert report.duration_seconds > 0
    for finding in report.findings:
        frames = finding.window.frame_indices(report.num_frames, report.fps)
        assert 0 <= frames.start <= frames.stop <= report.num_frames


def read_record_file(data: bytes, folder: Path) -> None:
    path = folder / "records.jsonl"
    path.write_bytes(data)
    records = read_records(path)
    path.write_bytes(b"")
    with RecordWriter(path) as writer:
        for record in records.values():
            writer.write(record)
    assert read_records(path) == records


def write_settings(chance: random.Random) -> str:
    settings = JudgeSettings(
        wording=chance.choice(("brief", "full")),
        scan=ScanSettings(fps=chance.randint(1, 30), pixels=chance.randint(1, 10**6)),
        inspect=InspectSettings(max_frames=chance.randint(2, 64)),
    )
    return json.dumps({"schema_version": 1, **asdict(settings)})


def read_settings(data: bytes, folder: Path) -> None:
    (folder / JUDGE_FILE).write_bytes(data)
    settings = JudgeSettings.load(folder)
    settings.save(folder)
    assert JudgeSettings.load(folder) == settings


def write_calibration(chance: random.Random) -> str:
    temperature = chance.uniform(0.1, 10)
    return json.dumps(
        {"version": 1, **asdict(Calibration(temperature=temperature, num_clips=20))}
    ).replace("NaN", "0.1")


def read_calibration(data: bytes, folder: Path) -> None:
    (folder / "calibration.json").write_bytes(data)
    p_clean = Calibration.load(folder).apply(0.25)
    assert 0 <= p_clean <= 0.5


def make_table(chance: random.Random) -> tuple[bytes, bool]:
    """Labels as CSV."""
    rows = [f"clips/{row}.mp4,{chance.randint(0, 1)}" for row in range(chance.randint(0, 5))]
    data = "\n".join(["path,clean", *rows, ""]).encode()
    return (data, False) if is_sound(chance) else (damage_bytes(chance, data), True)


def read_table(data: bytes, folder: Path) -> None:
    (folder / "labels.csv").write_bytes(data)
    labels = read_labels(folder / "labels.csv")
    assert all(
        isinstance(path, str) and isinstance(is_clean, bool) for path, is_clean in labels.items()
    )


CLIPS = [Clip("clips/a.mp4", "a.mp4"), Clip("clips/b/a.mp4", "b/a.mp4")]


def make_prompts(chance: random.Random) -> tuple[tuple[str, bytes], bool]:
    """A name that ends in one of the forms, and the file's bytes."""
    suffix = chance.choice(PROMPT_FORMATS)
    prompts = {clip.name: "a red square " + some_line(chance).replace('"', "") for clip in CLIPS}
    if suffix == ".txt":
        text = "\n".join(prompts.values())
    elif suffix == ".json":
        text = json.dumps(prompts)
    elif suffix == ".jsonl":
        text = "\n".join(json.dumps({"path": a, "prompt": b}) for a, b in prompts.items())
    else:
        text = "\n".join(["path,prompt", *(f'{a},"{b}"' for a, b in prompts.items())])
    if is_sound(chance):
        return (suffix, text.encode()), False
    return (suffix, damage_bytes(chance, text.encode())), True


def read_prompt_file(made: tuple[str, bytes], folder: Path) -> None:
    path = folder / f"prompts{made[0]}"
    path.write_bytes(made[1])
    prompts = read_prompts(path, CLIPS)
    assert set(prompts) == {clip.name for clip in CLIPS}
    assert all(isinstance(prompt, str) for prompt in prompts.values())


def write_request(chance: random.Random) -> str:
    kind = chance.randint(0, 2)
    if kind == 0:
        video = {chance.choice(("mp4", "path")): "AAAA", "prompt": some_line(chance), "fps": 8}
        return json.dumps({"videos": [video] * chance.randint(0, 3), "reports": False})
    if kind == 1:
        turn = {"text": some_line(chance), "video_b64": "AAAA"}
        request = {"history": [turn], "required_rewards": ["cac"], "metadata": {"fps": 8}}
        return json.dumps({"requests": [request], "protocol_version": "1"})
    return json.dumps({"prompt": [some_line(chance)], "video": [["AAAA", "AAAA"]]})


def read_request(body: bytes, _: Path) -> None:
    plain = parse_json(body)
    read = (
        (lambda: own_clips(plain, SERVER)[0])
        if "videos" in plain and "prompt" not in plain
        else (lambda: unirl_clips(plain, SERVER))
        if "requests" in plain
        else (lambda: flow_factory_clips(plain, SERVER))
    )
    for clip in read():
        assert isinstance(clip.prompt, str)
        assert clip.fps is None or clip.fps > 0


def make_export(chance: random.Random) -> tuple[tuple[str, str], bool]:
    """A format's name and a file of it."""
    name = chance.choice(["cvat", *FORMATS])
    clip = some_clip(chance)
    text = write_cvat(clip) if name == "cvat" else FORMATS[name][0]([clip])
    if is_sound(chance):
        return (name, text), False
    damage = damage_text if name == "cvat" else damaged_json
    return (name, damage(chance, text)), True


def read_export(made: tuple[str, str], _: Path) -> None:
    name, text = made
    write, read = FORMATS.get(name, (lambda clips: write_cvat(clips[0]), lambda t: [read_cvat(t)]))
    for clip in read(text):
        assert clip.num_frames > 0
        assert read(write([clip])) == [clip]


def make_video(chance: random.Random) -> tuple[bytes, bool]:
    data = sound_video(chance)
    return (data, False) if is_sound(chance) else (damage_bytes(chance, data), True)


def read_video(data: bytes, _: Path) -> None:
    video = Video.decode(io.BytesIO(data), limits=LIMITS)
    assert 2 <= video.num_frames <= LIMITS.max_frames
    assert 0 < video.fps < float("inf")
    assert video.frames.nbytes <= LIMITS.max_bytes


def make_upload(chance: random.Random) -> tuple[tuple[str, list[bytes]], bool]:
    """What the server's decoder is sent: a kind and the bytes of its parts."""
    from PIL import Image
    from safetensors.torch import save

    kind = chance.choice(("mp4", "frames", "safetensors"))
    if kind == "mp4":
        parts = [sound_video(chance)]
    elif kind == "safetensors":
        parts = [save({"frames": torch.zeros(3, 3, 8, 12, dtype=torch.uint8)})]
    else:
        parts = []
        form = chance.choice(("PNG", "JPEG", "WEBP"))
        for shade in range(3):
            buffer = io.BytesIO()
            Image.fromarray(np.full((8, 12, 3), 40 * shade, np.uint8)).save(buffer, form)
            parts.append(buffer.getvalue())
    damaged = not is_sound(chance)
    if damaged:
        place = chance.randrange(len(parts))
        parts[place] = damage_bytes(chance, parts[place])
    return (kind, parts), damaged


def read_upload(made: tuple[str, list[bytes]], folder: Path) -> None:
    kind, parts = made
    source, output = folder / "clip.in", folder / "clip.raw"
    source.write_bytes(b"".join(parts))
    message = {"name": "videos[0]", "kind": kind, "input": str(source), "output": str(output)}
    message |= {"fps": None if kind == "mp4" else 8.0, "lengths": [len(part) for part in parts]}
    reply = decode_clip(message, DECODING)
    if "error" in reply:
        raise ValueError(reply["error"])
    num_frames, channels, height, width = reply["shape"]
    assert output.stat().st_size == num_frames * channels * height * width


TARGETS = (
    Target(
        "tool calls",
        4000,
        make_answer(lambda c: write_scan_answer([one.window for one in some_findings(c)])),
        read_call,
        (AnswerError,),
    ),
    Target(
        "findings",
        4000,
        make_answer(lambda c: write_findings(some_findings(c))),
        read_answer,
        (AnswerError,),
    ),
    Target("reports", 3000, make_text(lambda c: some_report(c).to_json()), read_report),
    Target(
        "records",
        2500,
        make_text(lambda c: some_record(c).to_json() + "\n", as_bytes=True),
        read_record_file,
    ),
    Target("judge settings", 2000, make_text(write_settings, as_bytes=True), read_settings),
    Target("calibrations", 1500, make_text(write_calibration, as_bytes=True), read_calibration),
    Target("labels", 1000, make_table, read_table),
    Target("prompts", 2000, make_prompts, read_prompt_file),
    Target("requests", 3000, make_text(write_request, as_bytes=True), read_request, (WireError,)),
    Target("exports", 3000, make_export, read_export, (ValueError, EntryError)),
    Target("videos", 3000, make_video, read_video),
    Target("uploads", 2000, make_upload, read_upload),
)
