"""Annotated clips by number: equal from every kind of file, 12 bytes each, named if broken."""

import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cac_reward.__main__ import main
from cac_reward.data.annotations import AnnotatedClip, SchemaError
from cac_reward.data.parquet import SCHEMA
from cac_reward.training.clips import ClipStore
from tests.training_clips import square_clip, write_clips

COUNT = 5


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), COUNT)


@pytest.fixture(scope="module")
def files(lines: Path) -> dict[str, Path]:
    """The same clips in every kind of file, as `annotate convert` writes them."""
    folder = lines.parent
    for name, more in (
        ("table.parquet", []),
        ("bare.tar", []),
        ("packed.tar", ["--videos", str(folder), "--max-clips", "2"]),
    ):
        (folder / name).mkdir()
        arguments = ["annotate", "convert", str(lines), "--output", str(folder / name / name)]
        assert main([*arguments, *more]) == 0
    return {
        "lines": lines,
        "table": folder / "table.parquet" / "table.parquet",
        "bare": folder / "bare.tar",
        "packed": folder / "packed.tar",
    }


@pytest.mark.parametrize("kind", ["lines", "table", "bare", "packed"])
def test_every_kind_of_file_gives_equal_clips_and_videos(files: dict[str, Path], kind: str) -> None:
    store = ClipStore([files[kind]], videos=files["lines"].parent, split=None)
    assert len(store) == COUNT
    if kind == "packed":
        assert len(store.files) == 3
        store = ClipStore([files[kind]], split=None)
    for number in (3, 0, 4, 1, 2, 3):
        true = square_clip(number)
        clip = store.annotation(number)
        assert clip == true.annotation
        video = store.video(number, clip)
        assert video.fps == clip.fps
        assert np.array_equal(video.frames.permute(0, 2, 3, 1).numpy(), true.frames)


def test_videos_are_looked_for_beside_their_file(lines: Path, tmp_path: Path) -> None:
    store = ClipStore([lines], split=None)
    assert store.video(1, store.annotation(1)).num_frames == 13
    moved = tmp_path / lines.name
    moved.write_bytes(lines.read_bytes())
    store = ClipStore([moved], split=None)
    with pytest.raises(FileNotFoundError, match=r"video must be an existing file, got .*0001.mkv"):
        store.video(1, store.annotation(1))


def test_files_follow_one_another_and_splits_are_kept_apart(tmp_path: Path) -> None:
    first = write_clips(tmp_path / "a", 3, split="train")
    second = write_clips(tmp_path / "b", 4, seed=1, split="val")
    both = ClipStore([first, second], split=None)
    assert len(both) == 7
    for number in range(7):
        own = number - 3 * (number >= 3)
        true = square_clip(own, seed=int(number >= 3), split="val" if number >= 3 else "train")
        assert both.annotation(number) == true.annotation
        video = both.video(number, both.annotation(number))
        assert torch.equal(video.frames.permute(0, 2, 3, 1), torch.from_numpy(true.frames))
    for split, count in (("train", 3), ("val", 4), ("test", 0)):
        chosen = ClipStore([first, second], split=split)
        assert len(chosen) == count
        assert {chosen.annotation(i).split for i in range(count)} <= {split}


def test_folders_hold_files_of_one_kind(files: dict[str, Path], tmp_path: Path) -> None:
    assert len(ClipStore([files["table"].parent], split=None)) == COUNT
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(files["lines"].read_bytes())
    (tmp_path / "notes.txt").write_text("no clips")
    assert len(ClipStore([tmp_path], split=None)) == 2 * COUNT
    (tmp_path / "c.parquet").write_bytes(files["table"].read_bytes())
    with pytest.raises(ValueError, match=r"must hold files of one kind.* got .jsonl and .parquet"):
        ClipStore([tmp_path], split=None)


def test_clips_take_twelve_bytes_each(tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    line = json.dumps(AnnotatedClip(path="a.mp4", prompt="x" * 40, split="train").to_dict()) + "\n"
    count = 100_000
    file.write_text(line * count)
    tracemalloc.start()
    try:
        store = ClipStore([file], split=None)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(store) == count
    assert now < 14 * count + 100_000
    # Arrays grow by copying: a little above twice.
    assert peak < 30 * count + 200_000
    assert store.annotation(count - 1).prompt == "x" * 40


def test_shards_take_no_more(tmp_path: Path) -> None:
    line = json.dumps(AnnotatedClip(path="a.mp4").to_dict()).encode()
    count = 4000
    file = tmp_path / "many.tar"
    with tarfile.open(file, "w") as tar:
        for number in range(count):
            member = tarfile.TarInfo(f"{number:09}.json")
            member.size = len(line)
            tar.addfile(member, io.BytesIO(line))
    tracemalloc.start()
    try:
        store = ClipStore([file], split=None)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(store) == count
    assert now < 14 * count + 50_000
    assert peak < 30 * count + 100_000


def test_parquet_of_many_groups_is_read_in_any_order(tmp_path: Path) -> None:
    file = tmp_path / "groups.parquet"
    rows = [{"schema_version": 1, "path": f"{i}.mp4", "findings": None} for i in range(23)]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, row_group_size=5)
    store = ClipStore([file], split=None)
    order = [22, 0, 4, 5, 19, 20, 21, 9, 10, 0]
    assert [store.annotation(i).path for i in order] == [f"{i}.mp4" for i in order]


def test_shards_of_others_are_read_by_the_names_of_their_members(tmp_path: Path) -> None:
    """In folders, with dots in their names and long ones, as `tar` packs a folder."""
    file = tmp_path / "other.tar"
    stems = ["./v1.0/000", "./v1.0/001", "deep/" + "x" * 150 + "/002"]
    with tarfile.open(file, "w") as tar:
        tar.addfile(_folder("./v1.0"))
        for number, stem in enumerate(stems):
            clip = json.dumps(AnnotatedClip(path=f"{number}.mkv").to_dict()).encode()
            for suffix, content in (("json", clip), ("mkv", b"v%d" % number)):
                member = tarfile.TarInfo(f"{stem}.{suffix}")
                member.size = len(content)
                if number != 1 or suffix == "json":
                    tar.addfile(member, io.BytesIO(content))
    store = ClipStore([file], split=None)
    assert [store.annotation(i).path for i in range(3)] == ["0.mkv", "1.mkv", "2.mkv"]
    (reader,) = store._readers
    packed = [reader.video(store._where[i]) for i in range(3)]
    assert packed == [b"v0", None, b"v2"]


def _folder(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.DIRTYPE
    return member


def test_broken_lines_are_named_by_file_and_place(lines: Path, tmp_path: Path) -> None:
    good = lines.read_text().splitlines()
    file = tmp_path / "broken.jsonl"
    for bad, message in (
        ("{", r"broken.jsonl: line 4: clip must be JSON, got .* at column 2"),
        ("[]", r"broken.jsonl: line 4: clip must be"),
        ('{"schema_version": 1}', r"broken.jsonl: line 4: clip must have 'path'"),
        (good[0].replace('"fps": 8.0', '"fps": -1'), r"line 4: fps must be above 0, got -1"),
        (good[0].replace('"fps"', '"fsp"'), r"line 4: clip must have no key 'fsp'; did you mean"),
        ("\ud800", r"line 4: .*can't decode byte"),
    ):
        text = "\n".join([good[0], "", good[1], bad, good[2]])
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        store = ClipStore([file], split=None)
        assert len(store) == 4
        assert store.annotation(3).path == "videos/0002.mkv"
        with pytest.raises(ValueError, match=message):
            store.annotation(2)
        # With a split every line is read at once.
        with pytest.raises(ValueError, match=message):
            ClipStore([file], split="train")


def test_other_schema_versions_name_the_converting_command(
    files: dict[str, Path], tmp_path: Path
) -> None:
    old = {"path": "a.mp4", "width": 8, "height": 8, "fps": 8.0, "num_frames": 9, "findings": []}
    new = {"schema_version": 7, "path": "a.mp4"}
    for record, hint in (
        (old, r"convert it with: cac-reward annotate convert .*x.jsonl --output"),
        (new, r"a newer cac_reward wrote it; update with: pip install"),
    ):
        file = tmp_path / "x.jsonl"
        file.write_text(json.dumps(record) + "\n")
        with pytest.raises(SchemaError, match=rf"x.jsonl: line 1: .*{hint}"):
            ClipStore([file], split=None).annotation(0)
    table = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([new], schema=SCHEMA), table)
    with pytest.raises(SchemaError, match=r"x.parquet: row 1: schema_version must be 1, got 7"):
        ClipStore([table], split=None).annotation(0)
    shard = tmp_path / "x.tar"
    line = json.dumps(new).encode()
    with tarfile.open(shard, "w") as tar:
        member = tarfile.TarInfo("000.json")
        member.size = len(line)
        tar.addfile(member, io.BytesIO(line))
    with pytest.raises(SchemaError, match=r"x.tar: sample /?000: schema_version must be 1, got 7"):
        ClipStore([shard], split=None).annotation(0)


def test_files_that_are_none_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"annotations must be an existing file or folder"):
        ClipStore([tmp_path / "none.jsonl"], split=None)
    other = tmp_path / "clips.csv"
    other.write_text("a")
    with pytest.raises(ValueError, match=r"must end in one of .jsonl, .parquet, .tar, got .*csv"):
        ClipStore([other], split=None)
    for suffix, message in (
        (".parquet", r"bad.parquet must be a parquet file, got one of another kind"),
        (".tar", r"bad.tar must be a whole tar file, not compressed, got one that is not"),
    ):
        bad = tmp_path / f"bad{suffix}"
        bad.write_text("nothing of the kind" * 100)
        with pytest.raises(ValueError, match=message):
            ClipStore([bad], split=None)
    whole = min(files["packed"].iterdir()).read_bytes()
    cut = tmp_path / "cut.tar"
    for length in (600, 1600, 2000, 3000, whole.index(bytes(1024)) // 512 * 512):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut.tar must be a whole tar file"):
            ClipStore([cut], split=None)


def test_a_row_with_broken_extras_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    row = {"schema_version": 1, "path": "a", "extra": [{"name": None, "value": "x"}]}
    pq.write_table(pa.Table.from_pylist([row], schema=SCHEMA), file)
    with pytest.raises(ValueError, match=r"x.parquet: row 1: name in extra must be"):
        ClipStore([file], split=None).annotation(0)
