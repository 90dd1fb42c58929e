"""Annotations come back from every kind of file exactly as they went in, one at a time."""

import io
import json
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cac_reward.data.annotations import AnnotatedClip, Caption, SchemaError
from cac_reward.data.shards import ShardLimits, read_shard
from cac_reward.data.storage import (
    SUFFIXES,
    annotation_writer,
    iterate_records,
    read_annotations,
    upgraded_annotations,
)
from cac_reward.exporting import export_clips
from cac_reward.exports.base import LabelledClip
from cac_reward.report import Box, Finding, TimeWindow

EVERY = pytest.mark.parametrize("suffix", SUFFIXES)

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
said = texts.filter(str.strip)
names = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=20)
maybe = lambda one: st.none() | one  # noqa: E731


@st.composite
def some_windows(draw: Any) -> TimeWindow:
    start = draw(st.floats(0, 1e4))
    return TimeWindow(start, start + draw(st.floats(0.01, 1e4)))


@st.composite
def some_findings(draw: Any) -> Finding:
    window = draw(some_windows())
    times = st.floats(window.start_seconds, window.end_seconds)
    boxes = []
    for _ in range(draw(st.integers(0, 3))):
        x1, y1 = draw(st.floats(0, 0.5)), draw(st.floats(0, 0.5))
        x2, y2 = draw(st.floats(0.51, 1)), draw(st.floats(0.51, 1))
        boxes.append(Box(draw(times), x1, y1, x2, y2))
    return Finding(draw(names.filter(str.strip)), window, tuple(boxes), draw(st.integers(1, 3)))


@st.composite
def some_clips(draw: Any) -> AnnotatedClip:
    size = draw(maybe(st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)))) or (None, None)
    findings = draw(st.lists(some_findings(), max_size=2))
    asked = {}
    if draw(st.booleans()):
        options = tuple(draw(st.lists(texts, min_size=2, max_size=5)))
        free = draw(st.booleans())
        asked = {
            "question": draw(said),
            "options": () if free else options,
            "answer": draw(said) if free else "ABCDE"[len(options) - 1],
        }
    return AnnotatedClip(
        path=draw(names.filter(lambda one: "://" not in one)),
        key=draw(maybe(names)),
        source=draw(names | st.just("")),
        source_video=draw(maybe(names)),
        split=draw(maybe(names)),
        prompt=draw(texts),
        fps=draw(maybe(st.floats(0.1, 240))),
        duration_seconds=draw(maybe(st.floats(0.01, 1e5))),
        width=size[0],
        height=size[1],
        verdict=None if findings else draw(st.sampled_from([None, "clean", "anomalous"])),
        category=draw(maybe(names)),
        findings=tuple(findings),
        description=draw(maybe(said)),
        captions=tuple(draw(st.lists(st.builds(Caption, some_windows(), said), max_size=2))),
        reasoning=draw(maybe(said)),
        first_answer=draw(maybe(said)),
        reflection=draw(maybe(said)),
        extra=draw(st.dictionaries(texts, texts, max_size=2)),
        **asked,
    )


def write(path: Path, clips: Any, **options: Any) -> None:
    with annotation_writer(path, **options) as add:
        for clip in clips:
            add(clip)


def written(path: Path) -> Path:
    """The file, or the folder of the shards."""
    return path.parent if path.suffix == ".tar" else path


@EVERY
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(clips=st.lists(some_clips(), max_size=4))
def test_what_is_written_is_read(
    suffix: str, clips: list[AnnotatedClip], tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("out") / f"clips{suffix}"
    write(path, clips)
    if clips or suffix != ".tar":
        assert list(read_annotations(written(path))) == clips


@EVERY
def test_a_stopped_run_leaves_no_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"clips{suffix}"
    with pytest.raises(ValueError, match="path must be a local file"):
        write(path, (AnnotatedClip(path=one) for one in ("a.mp4", "http://b")))
    assert list(tmp_path.iterdir()) == []


@EVERY
def test_clips_are_not_held_in_memory(suffix: str, tmp_path: Path) -> None:
    """Three times as many clips take no more memory, in writing and in reading."""

    def many(count: int) -> Iterator[AnnotatedClip]:
        return (AnnotatedClip(path=f"{n}.mp4", reasoning="why " * 250) for n in range(count))

    peaks = []
    for count in (1000, 3000):
        folder = tmp_path / str(count)
        folder.mkdir()
        write(folder / f"clips{suffix}", many(count), **_shards_of(suffix, 500))
        tracemalloc.start()
        assert sum(1 for _ in read_annotations(folder)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 100_000
    assert peaks[1] < 3000 * 1000


def _shards_of(suffix: str, count: int) -> dict[str, Any]:
    return {"limits": ShardLimits(max_clips=count)} if suffix == ".tar" else {}


def test_hf_datasets_streams_the_same_clips(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    clips = [
        AnnotatedClip(
            path=f"{n}.mp4",
            fps=8.0,
            findings=(Finding("jump", TimeWindow(0, n + 1), (Box(0.5, 0, 0, 1, 0.5),), 1, "why"),),
            extra={"key object": "cup"},
        )
        for n in range(3)
    ]
    path = tmp_path / "clips.parquet"
    write(path, clips)
    rows = datasets.load_dataset(
        "parquet",
        data_files=str(path),
        split="train",
        streaming=True,
        cache_dir=str(tmp_path / "c"),
    )
    seen = [(row["path"], row["findings"][0]["boxes"][0]["box"], row["extra"]) for row in rows]
    assert seen == [
        (f"{n}.mp4", [0, 0, 1, 0.5], [{"name": "key object", "value": "cup"}]) for n in range(3)
    ]
    # And back: a file that datasets wrote is read as ours.
    again = tmp_path / "again.parquet"
    datasets.Dataset.from_list(list(rows), features=rows.features).to_parquet(str(again))
    assert list(read_annotations(again)) == clips


def test_a_shard_is_a_plain_webdataset(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    clips = [AnnotatedClip(path=f"in/{n}.MP4", split="train") for n in range(3)]
    for n in range(3):
        (tmp_path / f"in/{n}.MP4").write_bytes(bytes([n]) * 700)
    write(tmp_path / "s.tar", clips, videos=tmp_path, limits=ShardLimits(max_bytes=1400))
    assert sorted(one.name for one in tmp_path.glob("*.tar*")) == ["s-000000.tar", "s-000001.tar"]
    with tarfile.open(tmp_path / "s-000000.tar") as shard:
        assert shard.getnames() == [f"{n:09}.{kind}" for n in (0, 1) for kind in ("json", "mp4")]
    samples = [*read_shard(tmp_path / "s-000000.tar"), *read_shard(tmp_path / "s-000001.tar")]
    assert [one.members["mp4"] for one in samples] == [bytes([n]) * 700 for n in range(3)]
    assert [AnnotatedClip.from_dict(one.annotation()) for one in samples] == clips


def test_packing_goes_on_where_it_stopped_and_makes_the_same_bytes(tmp_path: Path) -> None:
    clips = [AnnotatedClip(path=f"{n}.mp4") for n in range(5)]
    for n in range(5):
        (tmp_path / f"{n}.mp4").write_bytes(bytes([n]))
    limits = ShardLimits(max_clips=2)
    write(tmp_path / "whole.tar", clips, videos=tmp_path, limits=limits)
    (tmp_path / "4.mp4").rename(tmp_path / "gone.mp4")
    with pytest.raises(FileNotFoundError, match="video must be an existing file to be packed"):
        write(tmp_path / "cut.tar", clips, videos=tmp_path, limits=limits)
    assert len(list(tmp_path.glob("cut-*"))) == 2
    first = (tmp_path / "cut-000000.tar").stat().st_mtime_ns
    (tmp_path / "gone.mp4").rename(tmp_path / "4.mp4")
    write(tmp_path / "cut.tar", clips, videos=tmp_path, limits=limits)
    assert (tmp_path / "cut-000000.tar").stat().st_mtime_ns == first
    for number in range(3):
        shards = [tmp_path / f"{name}-{number:06}.tar" for name in ("whole", "cut")]
        assert shards[0].read_bytes() == shards[1].read_bytes()
    with pytest.raises(ValueError, match="cut-000000.tar must hold clip 1 of this run"):
        write(tmp_path / "cut.tar", clips[::-1], videos=tmp_path, limits=limits)
    with pytest.raises(ValueError, match="shards must hold no more clips than this run has, 3"):
        write(tmp_path / "cut.tar", clips[:3], videos=tmp_path, limits=limits)


def test_what_cannot_be_packed(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    for clip in (AnnotatedClip(path="frames"), AnnotatedClip(path="a.tar", key="0")):
        with pytest.raises(ValueError, match="clip must be a video file to be packed"):
            write(tmp_path / "s.tar", [clip], videos=tmp_path)
    with pytest.raises(ValueError, match="videos must be packed into .tar"):
        annotation_writer(tmp_path / "a.jsonl", videos=tmp_path)
    with pytest.raises(ValueError, match=r"output must end in one of .jsonl, .parquet, .tar, got"):
        annotation_writer(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="max_clips must be at least 1, got 0"):
        ShardLimits(max_clips=0)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", r"line 2: clip must be JSON, got .* at column 2"),
        ("", r"line 2: line must hold a clip, got an empty one"),
        ("[" * 100_000, r"line 2: clip must be JSON"),
        ("3", r"line 2: clip must be an object, got 3"),
        ("{}", r"line 2: clip must state its schema_version, 1, got the keys \[\]"),
        ('{"schema_version": 1}', r"line 2: clip must have 'path', got only"),
        (
            '{"schema_version": 1, "path": "a", "finding": []}',
            r"line 2: .* did you mean 'findings'?",
        ),
        ('{"schema_version": 1, "path": "a", "zzz": 1}', r"line 2: .* put what has no field into"),
        ('{"schema_version": "1", "path": "a"}', r"line 2: schema_version must be an integer"),
        (
            '{"schema_version": 2, "path": "a"}',
            r"line 2: schema_version must be 1, got 2; a newer cac_reward wrote it; update",
        ),
        (
            '{"path":"a","width":4,"height":4,"fps":8,"num_frames":8,"findings":[]}',
            r"line 2: schema_version must be 1, got 0; convert it with: "
            r"cac-reward annotate convert .*/c.jsonl --output .*/c.v1.jsonl",
        ),
    ],
)
def test_a_bad_line_is_named(line: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"schema_version": 1, "path": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=match):
        list(read_annotations(path))
    records = list(iterate_records(path))
    assert [one.place for one in records] == ["line 1", "line 2"]


def test_what_export_writes_is_converted(tmp_path: Path) -> None:
    finding = Finding("jump", TimeWindow(0.5, 1.0), (), 3, "it jumps")
    old = LabelledClip(
        path="a.mp4", width=64, height=48, fps=8.0, num_frames=16, findings=(finding,)
    )
    export_clips([old], "findings", tmp_path / "f.jsonl")
    with pytest.raises(SchemaError, match="annotate convert"):
        list(read_annotations(tmp_path / "f.jsonl"))
    (new,) = upgraded_annotations(tmp_path / "f.jsonl")
    assert (new.path, new.fps, new.num_frames, new.width, new.height) == ("a.mp4", 8, 16, 64, 48)
    assert new.findings == (finding,)
    write(tmp_path / "new.jsonl", [new])
    assert list(upgraded_annotations(tmp_path / "new.jsonl")) == [new]


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="annotations must be an existing file or folder"):
        list(read_annotations(tmp_path / "gone.jsonl"))
    with pytest.raises(ValueError, match="folder of annotations must hold files of one kind.*none"):
        list(read_annotations(tmp_path))
    for name in ("a.parquet", "a.tar"):
        (tmp_path / name).write_bytes(b"no such thing" * 100)
        with pytest.raises(ValueError, match="must be a (parquet|whole tar) file"):
            list(read_annotations(tmp_path / name))
    with pytest.raises(ValueError, match=r"got .parquet and .tar"):
        list(read_annotations(tmp_path))
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ValueError, match="annotations must end in one of"):
        list(read_annotations(tmp_path / "a.csv"))
    table = pa.table({"extra": [[{"name": "a"}]]})
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="row 1: entry of extra must have 'value'"):
        list(read_annotations(tmp_path / "b.parquet"))


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("0.mp4", b"x", tarfile.REGTYPE)], r"sample 0: sample must have 0.json, got \[\]"),
        ([("0.json", b"", tarfile.SYMTYPE)], "must hold plain files, got '0.json'"),
        ([("0.json", b"{}", tarfile.REGTYPE)] * 2, "must hold each file once, got '0.json' twice"),
    ],
)
def test_shards_of_others(members: list[Any], match: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        for name, content, kind in members:
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content), kind
            shard.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match=match):
        list(read_annotations(tmp_path / "s.tar"))


def test_samples_of_a_shard_in_folders(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as shard:
        folder = tarfile.TarInfo("a.b")
        folder.type = tarfile.DIRTYPE
        shard.addfile(folder)
        for name in ("a.b/0.json", "a.b/0.left.png", "c/0.json"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            shard.addfile(member, io.BytesIO(name.encode()))
    samples = list(read_shard(tmp_path / "s.tar.gz"))
    assert [(one.key, sorted(one.members)) for one in samples] == [
        ("a.b/0", ["json", "left.png"]),
        ("c/0", ["json"]),
    ]
    assert samples[1].members["json"] == b"c/0.json"


def test_a_line_is_json_that_anyone_reads(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [AnnotatedClip(path="caf\u00e9.mp4", verdict="clean")])
    line = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    assert json.loads(line) == {"schema_version": 1, "path": "caf\u00e9.mp4", "verdict": "clean"}
    assert "\u00e9" in line
