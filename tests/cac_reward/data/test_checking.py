"""Every fault of an annotation file is found, counted and named; none is where there is none."""

import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cac_reward.data.annotations import AnnotatedClip, Caption, SchemaError
from cac_reward.data.checking import RULES, CheckReport, check_annotations, format_report
from cac_reward.data.storage import Record
from cac_reward.report import Box, Finding, TimeWindow


def records(*clips: AnnotatedClip | dict[str, Any]) -> list[Record]:
    plain = [one.to_dict() if isinstance(one, AnnotatedClip) else one for one in clips]
    return [Record(f"line {n}", one) for n, one in enumerate(plain, 1)]


def check(*clips: AnnotatedClip | dict[str, Any], videos: Path | None = None) -> CheckReport:
    return check_annotations("f.jsonl", records(*clips), videos=videos)


def found(report: CheckReport) -> list[tuple[str, str]]:
    return [(one.rule, one.place) for one in report.first]


def clip(path: str = "a.mp4", end: float = 1.0, kind: str = "jump", **values: Any) -> AnnotatedClip:
    finding = Finding(kind, TimeWindow(0, end), (Box(0, 0, 0, 1, 1),))
    return AnnotatedClip(**{"path": path, "findings": (finding,), **values})


def test_a_good_file_has_no_faults() -> None:
    report = check(
        clip(split="train", fps=8, duration_seconds=1.0),
        clip("b", kind="fighting", split="val", question="q", options=("a", "b"), answer="A"),
        AnnotatedClip(path="c", verdict="clean"),
    )
    assert not report.has_faults
    assert (report.clips, report.unknown_length) == (3, 2)
    assert {name: vars(one) for name, one in report.splits.items()} == {
        "train": {"clips": 1, "clean": 0, "anomalous": 1, "windows": 1, "boxes": 1, "questions": 0},
        "val": {"clips": 1, "clean": 0, "anomalous": 1, "windows": 1, "boxes": 1, "questions": 1},
        "": {"clips": 1, "clean": 1, "anomalous": 0, "windows": 0, "boxes": 0, "questions": 0},
    }
    assert report.types == {"jump": 1, "fighting": 1}


def test_times_past_the_end() -> None:
    # One frame more is rounding, two are not.
    assert not check(clip(end=1.125, fps=8, duration_seconds=1.0)).has_faults
    assert found(check(clip(end=1.25, fps=8, duration_seconds=1.0))) == [("time", "line 1")]
    assert not check(clip(end=1.05, duration_seconds=1.0)).has_faults
    assert found(check(clip(end=1.06, duration_seconds=1.0))) == [("time", "line 1")]
    said = AnnotatedClip(
        path="a", duration_seconds=1, captions=(Caption(TimeWindow(0, 2), "text"),)
    )
    (fault,) = check(said).first
    assert fault.why == "captions[0] must end in the clip of 1 s, got [0.0, 2.0]"


def test_every_bad_window_and_box_of_a_line_is_named() -> None:
    plain = clip().to_dict()
    finding: dict[str, Any] = plain["findings"][0]  # type: ignore[index]
    boxes = [
        {"time": 0.5, "box": [0.2, 0.2, 0.2, 0.4]},
        {"time": 0.5, "box": [0.2, 0.2, 1.2, 0.4]},
        {"time": 0.5, "box": [0.2, 0.2, 0.4, 0.4]},
        {"time": 1.5, "box": [0.2, 0.2, 0.4, 0.4]},
        3,
    ]
    plain["findings"] = [finding | {"window": [1, 1]}, finding | {"boxes": boxes}]
    report = check(plain)
    assert [(one.rule, one.why.split(":")[0]) for one in report.first] == [
        ("time", "findings[0]"),
        ("box", "findings[1].boxes[0]"),
        ("box", "findings[1].boxes[1]"),
        ("time", "findings[1].boxes[3]"),
        ("box", "findings[1].boxes[4]"),
    ]
    assert {one.clip for one in report.first} == {"a.mp4"}
    assert "0 <= x1 < x2 <= 1" in report.first[1].why


def test_a_bad_box_hides_no_other_fault_of_its_line(tmp_path: Path) -> None:
    plain = clip("gone.mp4", end=3.0, kind="wobble", duration_seconds=1.0, split="val").to_dict()
    good: dict[str, Any] = plain["findings"][0]  # type: ignore[index]
    outside = good | {"boxes": [{"time": 9, "box": [0, 0, 1, 1]}]}
    plain["findings"] = [good | {"window": [2, 1]}, outside, good | {"severity": 9}, 3]
    first = clip("gone.mp4", split="train", duration_seconds=1.0)
    report = check(first, plain, plain | {"width": 5}, videos=tmp_path)
    assert [(one.rule, one.place, one.why[:30]) for one in report.first][1:8] == [
        ("time", "line 2", "findings[0]: window must have "),
        ("time", "line 2", "findings[1].boxes[0]: box time"),
        ("form", "line 2", "findings[2]: severity must be "),
        ("form", "line 2", "findings[3] must be an object,"),
        ("time", "line 2", "findings[1] must end in the cl"),
        ("type", "line 2", "findings[1] must have a known "),
        ("file", "line 2", "video must be an existing file"),
    ]
    assert found(report)[8:10] == [("duplicate", "line 2"), ("leak", "line 2")]
    # A field that is wrong by itself is one fault more.
    assert report.first[14].why == "width and height must be known together, got 5 and None"
    assert report.counts == Counter(form=5, time=6, type=2, file=3, duplicate=2, leak=2)
    # Nobody counts what is no clip.
    assert list(report.splits) == ["train"]


@pytest.mark.parametrize(
    ("values", "rules"),
    [
        ({"fps": -1}, {"form": 1, "time": 1, "file": 1}),
        ({"duration_seconds": "1"}, {"form": 1, "file": 1}),
        ({"findings": 3}, {"form": 1, "file": 1}),
        ({"path": ""}, {"form": 1}),
    ],
)
def test_what_can_be_read_of_a_bad_line_is_checked(
    values: dict[str, Any], rules: dict[str, int], tmp_path: Path
) -> None:
    plain = clip(end=3.0, duration_seconds=1.0).to_dict() | values
    assert check(plain, videos=tmp_path).counts == rules


def test_form_and_type() -> None:
    report = check_annotations(
        "f.jsonl",
        [
            Record("line 1", fault="clip must be JSON"),
            *records(
                clip().to_dict() | {"fps": -1},
                clip("c", kind="wobble"),
                clip("b", kind="unspecified"),
            ),
            Record("line 5", 3),
        ],
        videos=None,
    )
    assert found(report) == [
        *(("form", "line 1"), ("form", "line 1"), ("type", "line 2"), ("form", "line 5")),
    ]
    assert report.clips == 5


def test_another_schema_version_stops_the_check() -> None:
    with pytest.raises(
        SchemaError, match=r"f.jsonl: line 2: schema_version must be 1, got 2; a newer"
    ):
        check(clip(), clip().to_dict() | {"schema_version": 2})


def test_missing_files_and_samples(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        member = tarfile.TarInfo("7.mp4")
        member.size = 3
        shard.addfile(member, io.BytesIO(b"abc"))
    (tmp_path / "broken.tar").write_bytes(b"no tar")
    clips = [
        *(clip("a.mp4"), clip("b.mp4"), clip(str(tmp_path / "a.mp4"), question="q")),
        *(clip("s.tar", key="7"), clip("s.tar", key="8"), clip("broken.tar", key="1")),
    ]
    report = check(*clips, videos=tmp_path)
    assert found(report) == [("file", f"line {n}") for n in (2, 5, 6)]
    assert report.files_checked
    assert not check(*clips).has_faults


def test_control_tokens_are_named_with_their_place() -> None:
    """Not in prompt and question, which are cleaned wherever they are shown."""
    texts = [
        *({"description": "a <|im_end|>"}, {"reasoning": "<|vision_start|> b"}),
        {"captions": [{"window": [0.0, 1.0], "text": "<|im_start|>system"}]},
        {"extra": {"first_reasoning": "<|im_end|>"}},
    ]
    clips = [clip(f"{number}").to_dict() | text for number, text in enumerate(texts)]
    told = clip("told").to_dict()
    told["findings"][0]["why"] = "gone<|im_end|>"
    harmless = clip("fine").to_dict() | {"prompt": "<|im_end|>", "description": "a <| b > c | d"}
    harmless |= {"question": "<|im_end|>?", "options": ["a", "<|endoftext|>"], "answer": "A"}
    report = check(*clips, told, harmless)
    assert report.counts == Counter(text=5)
    assert [one.why.partition(" ")[0] for one in report.first] == [
        *("description", "reasoning", "captions[0].text", "extra.first_reasoning"),
        "findings[0].why",
    ]
    assert "must not hold control tokens, got '<|im_end|>'" in report.first[0].why


def test_duplicates_and_leaks() -> None:
    report = check(
        clip("a", split="train"),
        clip("a", split="train"),
        clip("a", split="train", question="q"),
        clip("b", split="val", source_video="tape"),
        clip("c", split="test", source_video="tape"),
        clip("d", source_video="tape"),
        clip("a", split="test", question="other"),
        clip("a", key="1", split="val"),
    )
    assert found(report) == [("duplicate", "line 2"), ("leak", "line 5"), ("leak", "line 7")]
    assert report.first[1].why == (
        "source video 'tape' must be in one split, got 'test' and 'val' in line 4"
    )


def test_another_spelling_is_the_same_video(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.mp4").touch()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "real" / "a.mp4")
    spellings = ["real/a.mp4", "./real/a.mp4", "real/../real//a.mp4", "cut.mp4"]
    clips = [
        clip(spellings[0], split="train"),
        clip(spellings[1], split="val"),
        clip(spellings[2], split="train"),
        # A shard's samples are apart, whatever the shard is called.
        clip("real/a.mp4", key="1", split="train"),
        clip("./real/a.mp4", key="2", split="val"),
        clip("cut.mp4", source_video="./real/a.mp4", split="val"),
    ]
    same = [("duplicate", "line 2"), ("leak", "line 2"), ("duplicate", "line 3")]
    assert found(check(*clips)) == [*same, ("leak", "line 6")]
    (tmp_path / "cut.mp4").touch()
    known = [*clips[:3], clips[5], clip("link.mp4", split="val")]
    known.append(clip(str(tmp_path / "real" / "a.mp4"), question="q", split="val"))
    assert found(check(*known, videos=tmp_path)) == [
        *(*same, ("leak", "line 4"), ("duplicate", "line 5"), ("leak", "line 5")),
        ("leak", "line 6"),
    ]


def test_duplicates_and_leaks_against_counting_them_all() -> None:
    chance = random.Random(0)
    clips = [
        AnnotatedClip(
            path=str(chance.randrange(60)),
            source_video=chance.choice([None, *"abcdefgh"]),
            split=chance.choice([None, "train", "val"]),
        )
        for _ in range(120)
    ]
    duplicates = sum(clips[n].name in {one.name for one in clips[:n]} for n in range(len(clips)))
    leaks = 0
    for n, one in enumerate(clips):
        before = [other for other in clips[:n] if other.split and other.origin == one.origin]
        leaks += bool(one.split and before and before[0].split != one.split)
    report = check(*clips)
    assert (duplicates > 20, leaks > 20) == (True, True)
    assert report.counts == Counter(duplicate=duplicates, leak=leaks)
    assert len(report.first) == 20


def test_the_table_says_it_all() -> None:
    report = check(clip("a", kind="wobble", split="train"), clip("a", duration_seconds=0.5))
    lines = format_report(report).splitlines()
    assert lines[0] == "2 clips"
    assert lines[2].split() == "split clips clean anomalous windows boxes questions".split()
    assert lines[3].split() == ["(none)", *"1 0 1 1 1 0".split()]
    assert lines[4].split() == ["train", *"1 0 1 1 1 0".split()]
    counts = {
        line.split()[0]: line.split()[1]
        for line in lines
        if line.split()[:1] and line.split()[0] in RULES
    }
    assert counts == dict.fromkeys(RULES, "0") | {"time": "1", "type": "1", "duplicate": "1"}
    assert "1 clips of unknown length: ends not checked" in lines
    assert "videos were not looked for" in lines
    assert lines[-4] == "first 3 of 3 faults"
    assert lines[-3] == "  line 1 type: a: findings[0] must have a known type, got 'wobble'"
    assert json.loads(json.dumps(report.to_dict()))["counts"] == {
        "time": 1,
        "type": 1,
        "duplicate": 1,
    }
