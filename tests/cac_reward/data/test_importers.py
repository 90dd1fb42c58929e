"""Annotations of other projects, from small files of the published layouts."""

import csv
import json
import pickle
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cac_reward.data.annotations import AnnotatedClip, Caption
from cac_reward.data.importers.base import ImportSettings, Problem, VideoFolder, json_entries
from cac_reward.data.importers.vau_bench import COLUMNS
from cac_reward.data.importing import IMPORTERS, import_annotations
from cac_reward.data.videos import open_video
from cac_reward.exports.base import LabelledClip
from cac_reward.exports.coco import write_coco
from cac_reward.exports.cvat import write_cvat
from cac_reward.report import Box, Finding, TimeWindow
from cac_reward.video import Video

VAU_BENCH = Path(__file__).resolve().parents[4] / "shared" / "data" / "vau_bench"
NONE = ImportSettings()


def outcomes(kind: str, path: Path, settings: ImportSettings = NONE) -> list[Any]:
    return list(import_annotations(kind, [path], settings))


def problems(found: Iterable[Any]) -> list[tuple[int | None, str | None]]:
    """Line and column of each problem."""
    return [(one.line, one.column) for one in found if isinstance(one, Problem)]


def save_video(path: Path, frames: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Video(torch.zeros(frames, 3, 16, 32, dtype=torch.uint8), 4.0).save(path)


# VAU-Bench


def vau_row(**cells: str) -> dict[str, str]:
    row = dict.fromkeys(COLUMNS, "-1")
    row |= {"Video Name": "Fire_2.mp4", "Start Time": "1.5", "End Time": "4.0"}
    return row | {"Anomaly Class": "Fire"} | {k.replace("_", " "): v for k, v in cells.items()}


def write_vau(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as opened:
        table = csv.DictWriter(opened, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    return path


ASKED = {
    **{"Question": "What?", "Option_1": "a", "Option_2": "b", "Option_3": "c", "Option_4": "d"},
    **{"Correct_Option": "C", "Key_Object": "cup", "Description": "two\nlines", "Reasoning": "so"},
}


def test_vau_bench_row(tmp_path: Path) -> None:
    path = write_vau(tmp_path / "test_msad.csv", [vau_row(**ASKED)])
    assert outcomes("vau_bench", path) == [
        AnnotatedClip(
            path="Fire_2.mp4",
            source="vau_bench",
            source_video="msad/Fire_2",
            split="test",
            verdict="anomalous",
            category="Fire",
            findings=(Finding("fire", TimeWindow(1.5, 4.0)),),
            description="two\nlines",
            question="What?",
            options=("a", "b", "c", "d"),
            answer="C",
            reasoning="so",
            extra={"key_object": "cup"},
        )
    ]


@pytest.mark.parametrize(
    ("cells", "verdict", "windows"),
    [
        ({}, "anomalous", 1),
        ({"Start_Time": "0.0"}, "anomalous", 1),
        ({"Anomaly_Class": "-1"}, "anomalous", 1),
        ({"Start_Time": "-1.0", "End_Time": "-1.0"}, "anomalous", 0),
        ({"Start_Time": "0.0", "End_Time": "0.0", "Anomaly_Class": "Normal"}, "clean", 0),
        ({"Start_Time": "0.0", "End_Time": "0.0", "Anomaly_Class": "-1"}, "clean", 0),
        ({"Start_Time": "-1", "End_Time": "-1", "Anomaly_Class": "Normal"}, "clean", 0),
        ({"Start_Time": "-1", "End_Time": "-1", "Anomaly_Class": "-1"}, None, 0),
    ],
)
def test_vau_bench_times(cells: dict[str, str], verdict: str, windows: int, tmp_path: Path) -> None:
    (clip,) = outcomes("vau_bench", write_vau(tmp_path / "val.csv", [vau_row(**cells)]))
    assert (clip.verdict, len(clip.findings)) == (verdict, windows)
    assert (clip.question, clip.options, clip.answer, clip.description) == (None, (), None, None)


@pytest.mark.parametrize(
    ("cells", "column", "why"),
    [
        ({"End_Time": "x"}, "'End Time'", "time must be seconds, 0 or -1, got 'x'"),
        ({"Start_Time": "nan"}, "'Start Time'", "time must be seconds from 0 on, or -1, got 'nan'"),
        ({"Start_Time": "-2"}, "'Start Time'", "time must be seconds from 0 on"),
        ({"Start_Time": "-1"}, "'End Time'", "times must be missing together, got -1.0 and 4.0"),
        ({"Start_Time": "5"}, "'End Time'", r"window must have 0 <= start < end .* \[5.0, 4.0\]"),
        (
            {"Anomaly_Class": "Normal"},
            "'Anomaly Class'",
            "class must not be 'Normal' with a window",
        ),
        ({"Anomaly_Class": "Fier"}, "'Anomaly Class'", "did you mean 'Fire'"),
        (
            {"Start_Time": "0", "End_Time": "0"},
            "'Anomaly Class'",
            "class must be 'Normal' where both times are 0, got 'Fire'",
        ),
        ({**ASKED, "Correct_Option": "E"}, "'Correct Option'", "a letter from A to D, got 'E'"),
        (
            {**ASKED, "Correct_Option": "C. d"},
            "'Correct Option'",
            "must be the option of its letter",
        ),
        ({"Video_Name": " "}, "'Video Name'", "name must be that of a video, got ''"),
    ],
)
def test_vau_bench_faults_name_line_and_column(
    cells: dict[str, str], column: str, why: str, tmp_path: Path
) -> None:
    # The first row takes lines 2 and 3, so the second begins on line 4.
    rows = [vau_row(**ASKED), vau_row(**cells), vau_row()]
    first, bad, last = outcomes("vau_bench", write_vau(tmp_path / "val.csv", rows))
    assert isinstance(first, AnnotatedClip)
    assert isinstance(last, AnnotatedClip)
    assert (bad.line, bad.column) == (4, column)
    with pytest.raises(ValueError, match=why):
        raise ValueError(bad.why)
    assert str(bad).startswith(f"{tmp_path}/val.csv: line 4")


def test_vau_bench_files_of_another_form(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("Video Name,Question\n")
    with pytest.raises(ValueError, match=r"a.csv: line 1 must have the column 'Option 1', got"):
        outcomes("vau_bench", path)
    path.write_text(",".join(COLUMNS) + "\na,b\n")
    (bad,) = outcomes("vau_bench", path)
    assert str(bad).endswith("line 2: row must have 13 cells, got 2")
    path.write_text(",".join(COLUMNS).lower() + '\na,"b" c\n')
    with pytest.raises(ValueError, match="line 2 must be CSV"):
        outcomes("vau_bench", path)


@pytest.mark.skipif(not VAU_BENCH.is_dir(), reason=f"{VAU_BENCH} is not here")
def test_every_row_of_vau_bench_is_imported() -> None:
    counted = {}
    for name in ("test_msad", "test_ucf_crime", "val"):
        path = VAU_BENCH / f"{name}.csv"
        found = outcomes("vau_bench", path)
        assert problems(found) == []
        with path.open(encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened))
        assert [clip.path for clip in found] == [row["Video Name"] for row in rows]
        for clip, row in zip(found, rows, strict=True):
            times = float(row["Start Time"]), float(row["End Time"])
            windows = [one.window.to_json() for one in clip.findings]
            assert windows == ([list(times)] if times[1] > 0 else [])
            assert (clip.verdict == "clean") == (times == (0, 0))
            assert (clip.answer or "-1") == row["Correct Option"].split(".")[0]
        counted[name] = (
            len(found),
            sum(clip.verdict == "clean" for clip in found),
            sum(bool(clip.findings) for clip in found),
            sum(clip.verdict == "anomalous" and not clip.findings for clip in found),
            sum(clip.question is not None for clip in found),
        )
    assert counted == {
        "test_msad": (240, 120, 120, 0, 240),
        "test_ucf_crime": (290, 150, 124, 16, 251),
        "val": (734, 214, 339, 181, 734),
    }


# ViF-CoT-4K


def vif_chat(think: str, answer: str = "Fake", *, layout: str = "messages") -> dict[str, Any]:
    stamps = (0.0, 0.5, 1.0, 1.75)
    user = "Frames:\n" + "\n".join(f"[T={t:.2f}s] <image>" for t in stamps) + "\nReal or fake?"
    said = f"<think>\n{think}\n</think>\n<answer>{answer}</answer>"
    names = ("role", "content") if layout == "messages" else ("from", "value")
    speakers = (
        ("system", "user", "assistant") if layout == "messages" else ("system", "human", "gpt")
    )
    return {
        layout: [dict(zip(names, one)) for one in zip(speakers, ("You are.", user, said))],
        "images": [f"/data/parsed_frames/Fake/Wan2.1/gdy-0/{n}.png" for n in range(1, 5)],
    }


def write_json(path: Path, plain: object) -> Path:
    path.write_text(json.dumps(plain, indent=2))
    return path


THINK = (
    "A street. The cup <type>Abnormal Object Disappearance</type> in <t>[0.50, 1.00]</t> at "
    "<bbox>[0.2, 0.4, 0.4, 0.9]</bbox> is gone! Then a "
    "<type>Camera Motion Inconsistency</type> in <t>[1.75, 1.75]</t> at <bbox>[0.0, 0.0, 0.0, 0.0]"
    "</bbox> shows. Also <type>Text Distortion</type> in <t>[0.5, 0.50]</t> at "
    "<bbox>[0,0,1,0.5]</bbox>."
)


@pytest.mark.parametrize("layout", ["messages", "conversations"])
def test_vif_cot_4k_chat(layout: str, tmp_path: Path) -> None:
    path = write_json(tmp_path / "sft.json", [vif_chat(THINK, layout=layout)])
    (clip,) = outcomes("vif_cot_4k", path)
    assert (clip.path, clip.source, clip.source_video, clip.split) == (
        *("/data/parsed_frames/Fake/Wan2.1/gdy-0", "vif_cot_4k/Wan2.1", "gdy-0", "train"),
    )
    assert clip.reasoning == THINK
    assert clip.findings == (
        Finding(
            "disappearance",
            TimeWindow(0.5, 1.0),
            (Box(0.75, 0.2, 0.4, 0.4, 0.9),),
            why="The cup Abnormal Object Disappearance in [0.50, 1.00] at [0.2, 0.4, 0.4, 0.9] is "
            "gone!",
        ),
        # One frame: until the next one, for the last as long as the one before.
        Finding(
            "camera",
            TimeWindow(1.75, 2.5),
            why="Then a Camera Motion Inconsistency in [1.75, 1.75] at [0.0, 0.0, 0.0, 0.0] shows.",
        ),
        Finding(
            "text",
            TimeWindow(0.5, 1.0),
            (Box(0.75, 0, 0, 1, 0.5),),
            why="Also Text Distortion in [0.5, 0.50] at [0,0,1,0.5].",
        ),
    )


def test_vif_cot_4k_real_clips_have_no_faults(tmp_path: Path) -> None:
    think = (
        f"I looked at <t>[0.5, 1.0]</t> at <bbox>[0.1, 0.1, 0.5, 0.5]</bbox>: fine. {FAULT}? No."
    )
    (clip,) = outcomes("vif_cot_4k", write_json(tmp_path / "a.json", [vif_chat(think, "Real")]))
    assert (clip.verdict, clip.findings, clip.reasoning) == ("clean", (), think)


FAULT = "<type>Text Distortion</type> in <t>[0, 1]</t> at <bbox>[0, 0, 1, 1]</bbox>"


@pytest.mark.parametrize(
    ("chat", "column", "why"),
    [
        (
            vif_chat("ok. " + FAULT.replace("Text", "Txt")),
            "5 of the reasoning",
            "did you mean 'Text",
        ),
        (vif_chat(FAULT.replace("</t>", "")), "1 of the reasoning", "fault must be <type>name"),
        (vif_chat(FAULT.replace("[0, 1]", "[2, 1]")), "1 of the reasoning", "0 <= start < end"),
        (vif_chat(FAULT.replace("[0, 0, 1", "[1.2, 0, 2")), "1 of the reasoning", "box must have"),
        (vif_chat(FAULT, "Maybe"), "text of assistant", "answer must be Real or Fake, got 'Maybe'"),
        (vif_chat(FAULT) | {"images": ["a/1.png"]}, "text of user", "got 4 times and 1 images"),
        (vif_chat(FAULT) | {"images": ["a/1.png", "b/2.png"]}, "'images'", "in one folder, got 2"),
        (vif_chat(FAULT) | {"messages": []}, "'messages'", "a message of the user, got none"),
        (vif_chat(FAULT) | {"messages": [{"role": "user"}]}, "'messages'", "message must be text"),
        ([], None, "chat must be an object, got list"),
    ],
)
def test_vif_cot_4k_faults(chat: Any, column: str, why: str, tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [vif_chat(FAULT), chat])
    good, bad = outcomes("vif_cot_4k", path)
    assert isinstance(good, AnnotatedClip)
    line = len(json.dumps([vif_chat(FAULT)], indent=2).splitlines())
    assert bad.line == line
    assert (bad.column or "").endswith(column or "")
    assert why in bad.why


# DeepTraceReward


def trace(**values: Any) -> dict[str, Any]:
    return {
        "video_id": "v1",
        "video_path": "videos/v1.mp4",
        "video_type": "fake_video",
        "video_source": "Pika1.5",
        "video_prompt": "a cup",
        "split": "train",
        "video_width": 200,
        "video_height": 100,
        "video_frame_rate": 8.0,
        "video_duration": 5.0,
        "faketrace_bbox": {"left": 20, "top": 10, "width": 100, "height": 50},
        "faketrace_first_frame": 8,
        "faketrace_duration": 2.0,
        "faketrace_explanations": "The cup\n melts. ",
        "faketrace_check_applies": ["shape_distortion"],
    } | values


def real(**values: Any) -> dict[str, Any]:
    row = trace(
        video_id="r1", video_path="real_videos/r1.mp4", video_type="real_video", split="test"
    )
    return {name: one for name, one in row.items() if not name.startswith("faketrace")} | values


def test_vif_bench_pairs_generated_clips_with_real_ones(tmp_path: Path) -> None:
    index = {
        "real": ["/data/test_normalized/real/v1", "frames/real/v2"],
        "kling-v1": ["/data/test_normalized/kling-v1/v1", "/data/full-videos/kling-v1/v1", "v3", 7],
    }
    real, other, fake, short, number = outcomes(
        "vif_bench", write_json(tmp_path / "test_index.json", index)
    )
    assert real == AnnotatedClip(
        path="real/v1",
        source="vif_bench/real",
        source_video="v1",
        split="test",
        verdict="clean",
    )
    assert other == replace(real, path="real/v2", source_video="v2")
    assert fake == replace(
        real, path="kling-v1/v1", source="vif_bench/kling-v1", verdict="anomalous"
    )
    assert "line 6, column 'kling-v1': folder must be below the one of its generator" in str(short)
    assert "folder must be text, got 7" in str(number)
    with pytest.raises(ValueError, match="line 2: folders of 'real' must be a list, got 3"):
        outcomes("vif_bench", write_json(tmp_path / "other.json", {"real": 3}))


def test_deeptrace_reward_videos(tmp_path: Path) -> None:
    rows = [
        trace(),
        real(),
        trace(
            faketrace_first_frame=24.0,
            faketrace_duration=9.0,
            faketrace_bbox={"left": -20, "top": 50, "width": 40, "height": 80},
            faketrace_explanations=None,
            faketrace_check_applies=["Something", "Object merging"],
        ),
        trace(video_id="v2", faketrace_bbox=None, faketrace_check_applies=None),
    ]
    first, clean, second = outcomes(
        "deeptrace_reward", write_json(tmp_path / "all_data.json", rows)
    )
    assert first == AnnotatedClip(
        path="videos/v1.mp4",
        source="deeptrace_reward/Pika1.5",
        source_video="v1",
        split="train",
        prompt="a cup",
        fps=8.0,
        duration_seconds=5.0,
        width=200,
        height=100,
        findings=(
            Finding(
                "deformation",
                TimeWindow(1.0, 3.0),
                (Box(1.0, 0.1, 0.1, 0.6, 0.6),),
                why="The cup melts.",
            ),
            # Cut at the end of the clip and at the edge of the frame.
            Finding("merging", TimeWindow(3.0, 5.0), (Box(3.0, 0, 0.5, 0.1, 1),)),
        ),
        extra={"tags 1": "shape_distortion", "tags 2": "Something, Object merging"},
    )
    assert (clean.path, clean.verdict, clean.split) == ("real_videos/r1.mp4", "clean", "test")
    assert (second.findings[0].type, second.findings[0].boxes) == ("unspecified", ())


@pytest.mark.parametrize(
    ("values", "column", "why"),
    [
        ({"video_type": "odd"}, "'video_type'", "video_type must be one of"),
        ({"faketrace_duration": float("nan")}, "'faketrace_duration'", "must be finite"),
        ({"faketrace_duration": 0}, "'faketrace_duration'", "must be above 0"),
        ({"faketrace_first_frame": 40}, "'faketrace_first_frame'", "must be in the clip of 5.0 s"),
        ({"faketrace_first_frame": 10**400}, "'faketrace_first_frame'", "must be finite"),
        ({"faketrace_first_frame": 0.5}, "'faketrace_first_frame'", "must be an integer"),
        ({"faketrace_bbox": {"left": 1}}, "'faketrace_bbox'", "must have 'top'"),
        (
            {"faketrace_bbox": {"left": 300, "top": 0, "width": 9, "height": 9}},
            "'faketrace_bbox'",
            "box must have 0 <= x1 < x2 <= 1",
        ),
        ({"video_frame_rate": None}, "'video_frame_rate'", "must be a number"),
    ],
)
def test_deeptrace_reward_faults_keep_the_video_out(
    values: dict[str, Any], column: str, why: str, tmp_path: Path
) -> None:
    path = write_json(tmp_path / "all_data.json", [trace(), trace(**values), real()])
    sibling, bad, clip = outcomes("deeptrace_reward", path)
    assert isinstance(clip, AnnotatedClip)
    line = len(json.dumps([trace()], indent=2).splitlines())
    assert (bad.line, bad.column) == (line, column)
    assert why in bad.why
    assert (sibling.line, sibling.why) == (
        2,
        f"left out with line {line}, which is of the same video",
    )
    (lost,) = outcomes("deeptrace_reward", write_json(path, [{"video_id": 3}]))
    assert (lost.line, lost.column) == (2, "'video_id'")


# UCF-Crime and UCA

UCF = (
    "Abuse028_x264.mp4  Abuse  165  240  -1  -1  \n"
    "Arson011_x264.mp4  Arson  150  420  680  1267\t\n"
    "Normal_Videos_003_x264.mp4  Normal  -1  -1  -1  -1  \n"
)
UCA = {
    "Abuse028_x264": {
        "duration": 47.04,
        "timestamps": [[1.2, 8.2], [4.0, 10.0]],
        "sentences": ["A man walks in. ", " He hits the dog."],
    },
    "Normal_Videos218_x264": {"duration": 9.5, "timestamps": [], "sentences": []},
}


def test_ucf_crime_with_sentences(tmp_path: Path) -> None:
    path = tmp_path / "Temporal_Anomaly_Annotation_for_Testing_Videos.txt"
    path.write_text(UCF)
    sentences = write_json(tmp_path / "UCFCrime_Test.json", UCA)
    settings = ImportSettings(fps=30.0, sentences=(sentences,))
    abuse, arson, normal = outcomes("ucf_crime", path, settings)
    assert abuse == AnnotatedClip(
        path="Abuse028_x264.mp4",
        source="ucf_crime",
        source_video="ucf_crime/Abuse028_x264",
        split="test",
        fps=30.0,
        duration_seconds=47.04,
        verdict="anomalous",
        category="Abuse",
        findings=(Finding("abuse", TimeWindow(5.5, 8.0)),),
        captions=(
            Caption(TimeWindow(1.2, 8.2), "A man walks in."),
            Caption(TimeWindow(4.0, 10.0), "He hits the dog."),
        ),
    )
    assert [one.window for one in arson.findings] == [
        TimeWindow(5.0, 14.0),
        TimeWindow(680 / 30, 1267 / 30),
    ]
    assert (normal.verdict, normal.findings, normal.duration_seconds) == ("clean", (), None)


@pytest.mark.parametrize(
    ("line", "column", "why"),
    [
        ("a.mp4 Abuse 1 2 -1", None, "line must be name, class and four frames, got 5 words"),
        ("a.mp4  Abuse  1x  2 -1 -1", "3 (character 15)", "frame must be a number from 0 on"),
        ("a.mp4  Abuse  1 " + "9" * 400 + " -1 -1", "4 (character 17)", "frame must be a number"),
        ("a.mp4  Abuse  -1  2 -1 -1", "3 (character 15)", "frame must be a number from 0 on"),
        ("a.mp4 Abuse 9 2 -1 -1", "4 (character 15)", "frames must be first before last, got 9"),
        ("a.mp4 Abuze 1 2 -1 -1", "2 (character 7)", "did you mean 'Abuse'"),
        ("a.mp4 Normal 1 2 -1 -1", "2 (character 7)", "Normal exactly where there is no frame"),
        ("a.mp4 Abuse -1 -1 -1 -1", "2 (character 7)", "Normal exactly where there is no frame"),
    ],
)
def test_ucf_crime_faults(line: str, column: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(UCF + "\n" + line + "\n")
    *good, bad = outcomes("ucf_crime", path, ImportSettings(fps=30.0))
    assert len(good) == 3
    assert (bad.line, bad.column) == (5, column)
    assert why in bad.why


def test_ucf_crime_needs_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(UCF)
    first, second, normal = outcomes("ucf_crime", path)
    assert "fps must be known to turn frames into seconds" in first.why
    assert isinstance(second, Problem)
    assert normal.verdict == "clean"
    twice = write_json(tmp_path / "b.json", UCA)
    with pytest.raises(ValueError, match="sentences must describe a video once, got Abuse028"):
        outcomes("ucf_crime", path, ImportSettings(fps=30.0, sentences=(twice, twice)))


def test_uca_alone(tmp_path: Path) -> None:
    path = write_json(tmp_path / "UCFCrime_Val.json", UCA)
    abuse, normal = outcomes("uca", path)
    assert (abuse.verdict, abuse.category, abuse.split) == ("anomalous", "Abuse", "val")
    assert (len(abuse.captions), abuse.findings) == (2, ())
    assert (normal.verdict, normal.category, normal.duration_seconds) == ("clean", "Normal", 9.5)
    assert normal.source_video == "ucf_crime/Normal_Videos218_x264"


@pytest.mark.parametrize(
    ("name", "values", "column", "why"),
    [
        ("Abuse1_x264", {"timestamps": [[0, 1], [2, 2]]}, "'timestamps'[1]", "0 <= start < end"),
        ("Abuse1_x264", {"sentences": ["a"]}, "'sentences'", "as many as windows, got 1"),
        ("Abuse1_x264", {"sentences": ["a", " "]}, "'sentences'[1]", "caption must say something"),
        ("Abuse1_x264", {"duration": "9"}, "'duration'", "duration must be a number"),
        ("Abuze1_x264", {}, "name of the video", "did you mean 'Abuse'"),
        ("Abuse1_x264", {"more": 1}, None, "Abuse1_x264 must have no key but"),
    ],
)
def test_uca_faults(
    name: str, values: dict[str, Any], column: str, why: str, tmp_path: Path
) -> None:
    whole = {"duration": 9, "timestamps": [[0, 1], [1, 2]], "sentences": ["a", "b"]}
    path = write_json(tmp_path / "a.json", {"Normal1": whole, name: whole | values})
    good, bad = outcomes("uca", path)
    assert isinstance(good, AnnotatedClip)
    assert bad.line == len(json.dumps({"Normal1": whole}, indent=2).splitlines())
    assert bad.column == column
    assert why in bad.why


# XD-Violence


def test_xd_violence(tmp_path: Path) -> None:
    path = tmp_path / "annotations.txt"
    path.write_text(
        "Bad.Boys.1995__#01-33-51_01-34-37_label_B2-0-0.mp4 24 48 96 240\n"
        "v=abc__#1_label_G-B2-B6 12 36\n"
        "A.Film__#0_label_A\n"
    )
    shooting, several, clean = outcomes("xd_violence", path, ImportSettings(fps=24.0))
    assert shooting.path == "Bad.Boys.1995__#01-33-51_01-34-37_label_B2-0-0.mp4"
    assert (shooting.source_video, shooting.split) == ("xd_violence/Bad.Boys.1995", "test")
    assert shooting.findings == (
        Finding("shooting", TimeWindow(1.0, 2.0)),
        Finding("shooting", TimeWindow(4.0, 10.0)),
    )
    assert (several.category, several.findings[0].type) == ("G-B2-B6", "unspecified")
    assert several.source_video == "xd_violence/v=abc"
    assert (clean.verdict, clean.category, clean.split) == ("clean", "A", None)


def test_xd_violence_takes_in_the_videos_that_are_not_listed(tmp_path: Path) -> None:
    for name in ("a__#1_label_B1-0-0", "b__#1_label_A", "c__#1_label_G-0-0", "odd"):
        save_video(tmp_path / "videos" / f"{name}.mp4")
    path = tmp_path / "annotations.txt"
    path.write_text("a__#1_label_B1-0-0 0 4\n")
    settings = ImportSettings(videos=VideoFolder(tmp_path / "videos"))
    listed, clean, weak, odd = outcomes("xd_violence", path, settings)
    # Frames count at the video's own rate, 4 a second.
    assert listed.findings == (Finding("fighting", TimeWindow(0.0, 1.0)),)
    assert (listed.fps, listed.duration_seconds, listed.width, listed.height) == (4, 2, 32, 16)
    assert (clean.verdict, weak.verdict, weak.findings) == ("clean", "anomalous", ())
    assert odd.file.endswith("odd.mp4")
    assert "name must end in its classes" in odd.why


@pytest.mark.parametrize(
    ("line", "column", "why"),
    [
        ("a_label_B1-0-0 1 2 3", None, "frames in pairs, got 3"),
        ("a_label_B1-0-0 5 x", "3 (character 18)", "frame must be a number"),
        ("a_label_B9-0-0 1 2", "1 (character 1)", "class of xd_violence must be a known name"),
        ("a_label_A 1 2", None, "must have no violent frames"),
    ],
)
def test_xd_violence_faults(line: str, column: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n" + line)
    (bad,) = outcomes("xd_violence", path, ImportSettings(fps=24.0))
    assert (bad.line, bad.column) == (2, column)
    assert why in bad.why


# ShanghaiTech


def test_shanghaitech_frame_masks(tmp_path: Path) -> None:
    np.save(tmp_path / "01_0014.npy", np.array([0, 1, 1, 0, 0, 1], np.int8))
    np.save(tmp_path / "01_0015.npy", np.zeros(4, np.int8))
    marked, clean = outcomes("shanghaitech", tmp_path, ImportSettings(fps=2.0))
    assert marked == AnnotatedClip(
        path="01_0014",
        source="shanghaitech",
        source_video="shanghaitech/01_0014",
        split="test",
        fps=2.0,
        duration_seconds=3.0,
        findings=(
            Finding("unspecified", TimeWindow(0.5, 1.5)),
            Finding("unspecified", TimeWindow(2.5, 3.0)),
        ),
    )
    assert (clean.verdict, clean.duration_seconds) == ("clean", 2.0)


def test_shanghaitech_pixel_masks_give_boxes(tmp_path: Path) -> None:
    mask = np.zeros((3, 10, 20), bool)
    mask[1, 2:5, 4:10] = True
    mask[1, 8, 19] = True
    np.save(tmp_path / "a.npy", mask)
    (clip,) = outcomes("shanghaitech", tmp_path / "a.npy", ImportSettings(fps=1.0))
    assert (clip.width, clip.height) == (20, 10)
    (finding,) = clip.findings
    assert finding.window == TimeWindow(1, 2)
    assert finding.boxes == (Box(1, 0.2, 0.2, 0.5, 0.5), Box(1, 0.95, 0.8, 1.0, 0.9))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("a pickle was opened",))


def test_shanghaitech_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, mask in (
        ("a", np.array([Bomb()], object)),
        ("b", np.array([0, 2])),
        ("c", np.zeros((2, 2))),
        ("d", np.array(["x"])),
        ("e", np.zeros(0)),
    ):
        np.save(tmp_path / f"{name}.npy", mask, allow_pickle=True)
    (tmp_path / "f.npy").write_bytes(pickle.dumps(Bomb()))
    found = outcomes("shanghaitech", tmp_path, ImportSettings(fps=24.0))
    assert "a pickle was opened" not in capsys.readouterr().out
    for bad, name, why in zip(
        found,
        "abcdef",
        (
            "without pickles",
            "mask must be of 0 and 1, got 2",
            "must be [frames] or [frames, height, width], got (2, 2)",
            "mask must hold numbers, got <U1",
            "got (0,)",
            "without pickles",
        ),
        strict=True,
    ):
        assert bad.file == str(tmp_path / f"{name}.npy")
        assert why in bad.why
    assert found[1].column == "frame 1"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="folder must hold masks"):
        outcomes("shanghaitech", tmp_path / "empty")
    np.save(tmp_path / "empty" / "f.npy", np.ones(2))
    (bad,) = outcomes("shanghaitech", tmp_path / "empty")
    assert "fps must be known" in bad.why


# Annotation tools

DRAWN = LabelledClip(
    path="a.mp4",
    width=64,
    height=48,
    fps=8.0,
    num_frames=16,
    findings=(Finding("jump", TimeWindow(0.5, 1.5), (Box(0.75, 0.1, 0.2, 0.3, 0.4),), 3, "why"),),
)
EMPTY = LabelledClip(path="b.mp4", width=64, height=48, fps=8.0, num_frames=16)


def test_coco_and_cvat(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(write_coco([DRAWN, EMPTY]))
    drawn, empty = outcomes("coco", tmp_path / "c.json", ImportSettings(split="train"))
    assert (drawn.findings, drawn.duration_seconds, drawn.split) == (DRAWN.findings, 2.0, "train")
    assert (drawn.verdict, empty.verdict) == ("anomalous", None)
    settings = ImportSettings(empty_is_clean=True)
    drawn, empty = outcomes("coco", tmp_path / "c.json", settings)
    assert (drawn.verdict, empty.verdict) == ("anomalous", "clean")
    (tmp_path / "c.xml").write_text(write_cvat(DRAWN))
    settings = ImportSettings(path="x.mp4", fps=4.0)
    (clip,) = outcomes("cvat", tmp_path / "c.xml", settings)
    assert (clip.path, clip.fps, clip.duration_seconds) == ("x.mp4", 4.0, 4.0)
    (clip,) = outcomes("cvat", tmp_path / "c.xml")
    assert (clip.path, clip.findings) == ("a.mp4", DRAWN.findings)
    (tmp_path / "c.xml").write_text("<a><b></a>")
    with pytest.raises(ValueError, match=r"c.xml: .* line 1, column"):
        outcomes("cvat", tmp_path / "c.xml")
    (tmp_path / "c.json").write_text("{\n,")
    with pytest.raises(ValueError, match=r"c.json: .* line 2 column 1"):
        outcomes("coco", tmp_path / "c.json")


def test_a_shape_that_is_no_box_keeps_its_file_out_and_no_other(tmp_path: Path) -> None:
    text = write_cvat(DRAWN).replace("<box", "<mask").replace("</box", "</mask")
    (tmp_path / "a.xml").write_text(text)
    (tmp_path / "b.xml").write_text(write_cvat(EMPTY))
    files = [tmp_path / "a.xml", tmp_path / "b.xml"]
    bad, good = import_annotations("cvat", files, ImportSettings(empty_is_clean=True))
    assert (bad.line, bad.column) == (text.split("<mask")[0].count("\n") + 1, "5")
    assert "shape must be one of box, polygon" in bad.why
    assert (good.path, good.verdict) == ("b.mp4", "clean")


def test_one_path_is_not_that_of_several_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must be left out for several files, got 'x' for 2"):
        import_annotations("cvat", [tmp_path, tmp_path], ImportSettings(path="x"))


def two_videos() -> dict[str, Any]:
    """The tables of a COCO file: a.mp4 with annotations 1 to 4, other.mp4 with 5 and 6."""
    other = replace(DRAWN, path="other.mp4", findings=(Finding("flicker", TimeWindow(0, 1)),))
    plain: dict[str, Any] = json.loads(write_coco([DRAWN, other]))
    return plain


@pytest.mark.parametrize(
    ("table", "row", "changes", "why"),
    [
        ("annotations", 1, {"bbox": [5, 5, 0, 3]}, "box must have 0 <= x1 < x2 <= 1"),
        ("annotations", 1, {"bbox": [1]}, "bbox of annotation 2 must be 4 numbers, got [1]"),
        ("annotations", 1, {"category_id": 9}, "category_id must be in its table, got 9"),
        ("annotations", 1, {"category_id": [1]}, "category_id must be in its table, got [1]"),
        ("annotations", 1, {"track_id": 9}, "track_id must be in its table, got 9"),
        ("annotations", 1, {"image_id": 9}, "image_id must be in its table, got 9"),
        ("annotations", 1, {"id": 1}, "annotations must have different ids, got 1 twice"),
        ("annotations", 1, {"id": True}, "id must be a number or text, got True"),
        ("images", 1, {"frame_index": "z"}, "frame_index must be a whole number from 0 to 15 in a"),
        ("images", 1, {"frame_index": True}, "frame_index must be a whole number from 0 to 15"),
        ("images", 1, {"frame_index": -3}, "of 16 frames, got -3"),
        ("images", 1, {"frame_index": 16}, "of 16 frames, got 16"),
        ("tracks", 0, {"stop_frame": 17}, "stop_frame must be a whole number from 0 to 16"),
        ("tracks", 0, {"first_frame": 12}, "first_frame must be before stop_frame, got 12 and 12"),
        ("tracks", 0, {"note": "x"}, None),
        ("videos", 0, {"fps": None}, "fps of a.mp4 must be a number above 0, got None"),
        ("videos", 0, {"width": 0}, "width of a.mp4 must be a number above 0, got 0"),
        ("videos", 0, {"name": "B@D"}, "column 'name': text must be UTF-8, got byte 0xe9"),
    ],
)
def test_a_bad_entry_of_coco_keeps_its_own_video_out(
    table: str, row: int, changes: dict[str, Any], why: str | None, tmp_path: Path
) -> None:
    plain = two_videos()
    plain[table][row] |= changes
    text = json.dumps(plain, indent=1)
    (tmp_path / "c.json").write_bytes(text.encode().replace(b"@", b"\xe9"))
    bad, good = outcomes("coco", tmp_path / "c.json", ImportSettings(empty_is_clean=True))
    assert (good.path, good.verdict, len(good.findings)) == ("other.mp4", "anomalous", 1)
    if why is None:
        table, row, why = "videos", 0, "note must be as it was exported"
    before = {**plain, table: [*plain[table][:row], 0]}
    keys = list(plain)
    ahead = json.dumps({key: before[key] for key in keys[: keys.index(table) + 1]}, indent=1)
    assert (bad.line, bad.column) == (len(ahead.splitlines()) - 2, f"{table}[{row}]")
    assert why in bad.why


def test_entries_of_coco_without_a_video_or_rate(tmp_path: Path) -> None:
    plain = two_videos()
    for video in plain["videos"]:
        del video["fps"]
    plain["images"][0]["video_id"] = 7
    plain["annotations"].append(3)
    path = write_json(tmp_path / "c.json", plain)
    no_rate, also, *_ = outcomes("coco", path)
    assert no_rate.why == also.why
    assert "fps must be stated by the video or given, got none" in also.why
    image, row, first, second = outcomes("coco", path, ImportSettings(fps=4.0))
    assert (image.column, row.column) == (
        "images[0]",
        f"annotations[{len(plain['annotations']) - 1}]",
    )
    assert "video_id must be in its table, got 7" in image.why
    assert "entry of annotations must be an object with 'id', got int" in row.why
    assert (first.fps, second.duration_seconds) == (4.0, 4.0)


def test_coco_without_tracks_joins_boxes_by_their_track(tmp_path: Path) -> None:
    plain = two_videos()
    del plain["tracks"]
    (clip, _) = outcomes("coco", write_json(tmp_path / "c.json", plain))
    (finding,) = clip.findings
    assert finding.window == TimeWindow(0.5, 1.5)
    assert len(finding.boxes) == 3


def standard(*names: str, **changes: Any) -> dict[str, Any]:
    """COCO's standard file with a box on the first image of these names."""
    images = [
        {"id": number, "file_name": name, "width": 64, "height": 48}
        for number, name in enumerate(names, 1)
    ]
    box = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [16, 12, 32, 24], "iscrowd": 0}
    categories = [{"id": 3, "name": "jump"}]
    return {"images": images, "annotations": [box], "categories": categories} | changes


def test_images_of_a_folder_are_frames_of_a_clip(tmp_path: Path) -> None:
    names = ("x/f10.png", "x/f9.png", "y/0.jpg", "y/1.jpg", "x/f2.png")
    path = write_json(tmp_path / "c.json", standard(*names))
    with pytest.raises(ValueError, match=r"c.json: fps must be given .* give it with --fps"):
        outcomes("coco", path)
    drawn, empty = outcomes("coco", path, ImportSettings(fps=2.0, empty_is_clean=True))
    # Frame 10 comes behind 9 and 2, as the trainer reads them.
    assert drawn == AnnotatedClip(
        path="x",
        source="c",
        fps=2.0,
        duration_seconds=1.5,
        width=64,
        height=48,
        findings=(Finding("jump", TimeWindow(1.0, 1.5), (Box(1.0, 0.25, 0.25, 0.75, 0.75),)),),
    )
    assert (empty.path, empty.verdict, empty.duration_seconds) == ("y", "clean", 1.0)


def test_a_folder_that_is_here_says_what_its_frames_are(tmp_path: Path) -> None:
    (tmp_path / "v" / "x").mkdir(parents=True)
    save_video(tmp_path / "v" / "deep" / "x.mp4")
    for number in range(4):
        Image.new("RGB", (64, 48), (number, 0, 0)).save(tmp_path / "v" / "x" / f"{number}.png")
    settings = ImportSettings(fps=2.0, videos=VideoFolder(tmp_path / "v"))
    path = write_json(tmp_path / "c.json", standard("x/2.png", "x/3.png"))
    (clip,) = outcomes("coco", path, settings)
    assert (clip.path, clip.duration_seconds) == ("x", 2.0)
    assert clip.findings[0].window == TimeWindow(1.0, 1.5)
    video = open_video(clip, tmp_path / "v")
    assert len(video.frames) == 4
    assert int(video.frames[2].max()) == 2
    (bad,) = outcomes("coco", write_json(path, standard("x/2.png", "x/9.png")), settings)
    assert (bad.line, bad.column) == (9, "images[1]")
    assert bad.why == "file_name must be a picture of its folder, got 'x/9.png'"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"file_name": "x/1.txt"}, "file_name must be a picture of its folder, got 'x/1.txt'"),
        ({"file_name": "x/0.png"}, "file_name must be there once, got 'x/0.png' more often"),
        ({"file_name": 3}, "image must have a file_name, got {"),
        ({"width": 65}, "images of a folder must state one size, got {'width': 65, 'height': 48}"),
        ({"width": None}, "images of a folder must state one size, got {'width': None"),
    ],
)
def test_an_image_that_is_no_frame_keeps_its_folder_out(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    plain = standard("y/0.png", "y/1.png", "x/0.png", "x/1.png", "x/2.png")
    plain["images"][3] |= changes
    *bad, good = outcomes("coco", write_json(tmp_path / "c.json", plain), ImportSettings(fps=2.0))
    if changes == {"file_name": 3}:
        bad, good = bad[:1], bad[1]
    assert good.path == "y"
    assert (bad[-1].line, bad[-1].column) == (21, "images[3]")
    assert why in bad[-1].why


def test_a_folder_of_one_image_is_no_clip(tmp_path: Path) -> None:
    path = write_json(tmp_path / "c.json", standard("x/0.png"))
    (bad,) = outcomes("coco", path, ImportSettings(fps=2.0))
    assert "folder must hold at least 2 frames, got 1 in 'x'" in bad.why


# What they share


def test_videos_fill_in_what_files_do_not_say(tmp_path: Path) -> None:
    save_video(tmp_path / "v" / "deep" / "Fire_2.mp4")
    save_video(tmp_path / "v" / "17.mp4", frames=4)
    rows = [vau_row(), vau_row(Video_Name="ecva_17.mp4"), vau_row(Video_Name="gone.mp4")]
    path = write_vau(tmp_path / "val.csv", rows)
    folder = VideoFolder(tmp_path / "v")
    found = outcomes("vau_bench", path, ImportSettings(videos=folder, split="train"))
    assert [(one.path, one.fps, one.duration_seconds) for one in found] == [
        ("deep/Fire_2.mp4", 4.0, 2.0),
        ("17.mp4", 4.0, 1.0),
        ("gone.mp4", None, None),
    ]
    assert {one.split for one in found} == {"train"}
    assert found[1].source_video == "ecva/17"
    save_video(tmp_path / "v" / "other" / "Fire_2.mp4")
    assert VideoFolder(tmp_path / "v").find(["frames/Deep/Fire_2"]) == (
        tmp_path / "v" / "deep" / "Fire_2.mp4"
    )
    (bad, *_) = outcomes("vau_bench", path, ImportSettings(videos=VideoFolder(tmp_path / "v")))
    assert bad.column == "'Video Name'"
    assert "video must be there once" in bad.why
    with pytest.raises(FileNotFoundError, match="videos must be an existing folder"):
        VideoFolder(tmp_path / "nowhere")


def test_settings_that_are_not_used_are_refused(tmp_path: Path) -> None:
    assert set(IMPORTERS) == {
        *("vau_bench", "vif_cot_4k", "vif_bench", "deeptrace_reward", "ucf_crime", "uca"),
        *("xd_violence", "shanghaitech", "cvat", "coco"),
    }
    with pytest.raises(ValueError, match="sentences must be left out for vau_bench"):
        import_annotations("vau_bench", [], ImportSettings(sentences=(tmp_path,)))
    with pytest.raises(ValueError, match="fps must be left out for deeptrace_reward"):
        import_annotations("deeptrace_reward", [], ImportSettings(fps=8.0))
    with pytest.raises(ValueError, match="format must be one of vau_bench, .* got 'vau'"):
        import_annotations("vau", [], NONE)
    with pytest.raises(FileNotFoundError, match="file must exist to be imported, got .*gone"):
        import_annotations("coco", [tmp_path / "gone"], NONE)


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("[]", []),
        (" {} \n", []),
        ('[1,\n "a",\n\n{"b": [2]}]', [(1, "0", 1), (2, "1", "a"), (4, "2", {"b": [2]})]),
        ('{"x": 1,\n"y" : {"z":\n null}}', [(1, "x", 1), (2, "y", {"z": None})]),
    ],
)
def test_json_entries(text: str, entries: list[Any], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    assert list(json_entries(tmp_path / "a.json")) == entries


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("3", "line 1 column 1"),
        ("[1\n2]", "line 2 column 1"),
        ("[1,]", "line 1 column 4"),
        ('{"a" 1}', "line 1 column 6"),
        ("[1] x", "line 1 column 5"),
        ("[1", "line 1 column 3"),
        ("", "line 1 column 1"),
        ("[1,\n" + "[" * 100_000, "line 2 must be JSON of a few levels"),
    ],
)
def test_json_that_is_none(text: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=place):
        list(json_entries(tmp_path / "a.json"))


CHAT = vif_chat(FAULT)


@pytest.mark.parametrize(
    ("kind", "plain", "bad", "column"),
    [
        ("vif_bench", {"real": ["a/b", "a/B@D"]}, "B@D", "'real'"),
        ("vif_bench", {"real": ["a/b"], "B@D": ["a/c"]}, "B@D", "'B\\udce9D'"),
        ("vif_cot_4k", [CHAT, {**CHAT, "more": [{"x": "B@D"}]}], "B@D", "'more'[0]['x']"),
        ("vif_cot_4k", [CHAT, {**CHAT, "B@D": 1}], "B@D", "'B\\udce9D'"),
        ("deeptrace_reward", [real(), real(video_id="r2", video_prompt="B@D")], "B@D", "'video_"),
        ("uca", UCA | {"Abuse1B@D": UCA["Abuse028_x264"]}, "B@D", "name of the video"),
        (
            "uca",
            UCA | {"Abuse1": {"duration": 1, "timestamps": [[0, 1]], "sentences": ["B@D"]}},
            "B@D",
            "'sentences'[0]",
        ),
    ],
)
def test_a_byte_that_is_not_utf8_keeps_out_its_json_entry_only(
    kind: str, plain: Any, bad: str, column: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    text = json.dumps(plain, indent=2)
    path.write_bytes(text.encode().replace(b"@", b"\xe9"))
    *good, left_out = outcomes(kind, path)
    assert good
    assert all(isinstance(one, AnnotatedClip) for one in good)
    assert isinstance(left_out, Problem)
    assert (left_out.column or "").startswith(column)
    assert "text must be UTF-8, got byte 0xe9 at character" in left_out.why
    assert left_out.line is not None
    # The same text in UTF-8 is taken whole.
    path.write_text(text.replace("@", "\u00e9"), encoding="utf-8")
    assert problems(outcomes(kind, path)) == []


@pytest.mark.parametrize(
    ("kind", "text", "column"),
    [
        ("ucf_crime", UCF + "Caf@ Normal -1 -1 -1 -1\n" + UCF, "1 (character 1)"),
        ("xd_violence", "a_label_B1-0-0 1 2\n\n\nCaf@_label_A 1\na_label_B1 1 2\n", "1 (character"),
        ("vau_bench", "", "'Description'"),
    ],
)
def test_a_byte_that_is_not_utf8_keeps_out_its_line_only(
    kind: str, text: str, column: str, tmp_path: Path
) -> None:
    if kind == "vau_bench":
        write_vau(
            tmp_path / "a.txt", [vau_row(), vau_row(), vau_row(Description="Caf@"), vau_row()]
        )
        text = (tmp_path / "a.txt").read_text()
    (tmp_path / "a.txt").write_bytes(text.encode().replace(b"@", b"\xe9"))
    found = outcomes(kind, tmp_path / "a.txt", ImportSettings(fps=30.0))
    assert isinstance(found[-1], AnnotatedClip)
    (bad,) = [one for one in found if isinstance(one, Problem)]
    assert bad.line == 4
    assert (bad.column or "").startswith(column)
    assert bad.why.startswith("text must be UTF-8, got byte 0xe9 at character 4")


def test_a_drawn_file_that_is_not_utf8_is_left_out_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_bytes(write_cvat(DRAWN).encode().replace(b"why<", b"\xe9<"))
    (tmp_path / "b.xml").write_text(write_cvat(EMPTY))
    bad, good = import_annotations("cvat", [tmp_path / "a.xml", tmp_path / "b.xml"], NONE)
    assert isinstance(good, AnnotatedClip)
    assert isinstance(bad, Problem)
    line = (tmp_path / "a.xml").read_bytes().split(b"\xe9")[0].count(b"\n") + 1
    assert bad.line == line
    assert "text must be UTF-8, got byte 0xe9" in bad.why
