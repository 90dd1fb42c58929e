"""Thousands of clips: found, named, shared out and judged, whatever some of them are."""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from cac_reward.batch import Clip, find_clips, in_shard, judge_clips, read_prompts
from cac_reward.report import AnomalyReport
from cac_reward.video import Video


class Counter:
    """An inspector that says how many frames a clip has, and refuses some clips."""

    def __init__(self, refuses: int = 0) -> None:
        self.batches: list[list[str]] = []
        self.refuses = refuses

    def inspect(
        self, videos: Sequence[Video], prompts: Sequence[str] | None = None
    ) -> list[AnomalyReport]:
        self.batches.append(list(prompts or ()))
        if any(video.num_frames == self.refuses for video in videos):
            raise ValueError("too short for the judge")
        return [
            AnomalyReport(score=0.5, judge_id="c", fps=v.fps, num_frames=v.num_frames, prompt=p)
            for v, p in zip(videos, prompts or (), strict=True)
        ]


def save(path: Path, num_frames: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = torch.zeros(num_frames, 3, 16, 32, dtype=torch.uint8)
    Video(frames, 8.0).save(path)
    return path


def test_clips_are_found_in_order_and_once(tmp_path: Path) -> None:
    names = (
        "b.MP4",
        "a/c.webm",
        "a/b.mov",
        ".hidden/x.mp4",
        ".x.mp4",
        "notes.txt",
        "d.mp4.partial",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    clips = find_clips([tmp_path, tmp_path])
    assert [clip.name for clip in clips] == ["a/b.mov", "a/c.webm", "b.MP4"]
    assert [clip.path for clip in clips] == [(tmp_path / c.name).as_posix() for c in clips]
    single = find_clips([tmp_path / "notes.txt", tmp_path / "notes.txt"])
    assert [clip.name for clip in single] == [(tmp_path / "notes.txt").as_posix()]


def test_clips_that_cannot_be_found_or_told_apart(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"clip must be an existing file or folder, got .*x"
    ):
        find_clips([tmp_path / "x"])
    with pytest.raises(ValueError, match=r"folder must hold video files \(\.mp4, .*\), got "):
        find_clips([tmp_path])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c.mp4").touch()
    with pytest.raises(ValueError, match=r"different names, got c.mp4 in .*a/c.mp4 and .*b/c.mp4"):
        find_clips([tmp_path / "a", tmp_path / "b"])


CLIPS = [Clip("/v/a/1.mp4", "a/1.mp4"), Clip("/v/b/1.mp4", "b/1.mp4"), Clip("/v/2.mp4", "2.mp4")]
WANTED = {"a/1.mp4": "caf\u00e9, at\u2028night", "b/1.mp4": 'a "b"', "2.mp4": "c"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", 'caf\u00e9, at\u2028night\n\na "b"\r\nc'),
        (
            "p.json",
            '{"a/1.mp4": "caf\u00e9, at\u2028night", "./b/1.mp4": "a \\"b\\"", "x/2.mp4": "c"}',
        ),
        (
            "p.jsonl",
            '{"path": "a/1.mp4", "prompt": "caf\u00e9, at\u2028night"}\n'
            '{"path": "b/1.mp4", "prompt": "a \\"b\\"", "seed": 3}\n\n'
            '{"prompt": "c", "path": "2.mp4"}\n{"path": "no.mp4", "prompt": "d"}',
        ),
        (
            "p.csv",
            '\ufeffseed,path,prompt\n1,a/1.mp4,"caf\u00e9, at\u2028night"\n2,b/1.mp4,"a ""b"""\n'
            "3,2.mp4,c\n3,2.mp4,c\n",
        ),
    ],
)
def test_prompts_are_read_in_every_form(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / name, CLIPS) == WANTED


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "a\nb", "one line for each of 3 clips, got 2; name the clips in a"),
        ("p.yaml", "", r"prompts must be in one of \('.txt', .*, got .*p.yaml"),
        ("p.csv", "path,text\n", r"must have the columns path and prompt, got \['path', 'text'\]"),
        ("p.csv", "", "must have the columns path and prompt, got None"),
        ("p.csv", "path,prompt\n2.mp4\n", "must be texts, got None for '2.mp4'"),
        ("p.csv", "path,prompt\n2.mp4,a\n./2.mp4,b\n", "one prompt each, got two for './2.mp4'"),
        ("p.json", "[]", "must be JSON that gives each path its prompt, got .*list"),
        ("p.json", "{", "must be JSON that gives each path its prompt, got JSONDecodeError"),
        ("p.json", '{"2.mp4": 1}', "must be texts, got 1 for '2.mp4'"),
        ("p.jsonl", '{"path": "a"}', "must be JSON that gives each path its prompt, got KeyError"),
        ("p.jsonl", "3", "must be JSON that gives each path its prompt, got TypeError"),
        # The bare name 1.mp4 could be either clip's, so it is neither's.
        ("p.json", '{"1.mp4": "a", "2.mp4": "b"}', r"none for 'a/1.mp4' \(2 of 3 clips\)"),
    ],
)
def test_wrong_prompts_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name, CLIPS)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", b"", "one line for each of 3 clips, got 0; name the clips"),
        ("p.json", b"", "must be JSON that gives each path its prompt, got JSONDecodeError"),
        ("p.jsonl", b"", r"must name every clip, got none for 'a/1.mp4' \(3 of 3 clips\)"),
        (
            "p.txt",
            b"a cup\xff\nb\nc",
            r"must be text in UTF-8, got byte 0xff at 5 in .*p\.txt; sav",
        ),
        (
            "p.csv",
            "path,prompt\n".encode("utf-16"),
            r"text in UTF-8, got byte 0xff at 0 in .*p\.csv",
        ),
        ("p.json", b"[" * 100_000, "must be JSON that gives each path its prompt, got Recursion"),
        ("p.csv", b"path,prompt\na," + b"x" * 200_000, "must be CSV, got text of another form: f"),
    ],
)
def test_empty_and_damaged_prompt_files_are_named(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(tmp_path / name, CLIPS)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("num_shards", [1, 2, 16])
def test_shards_hold_every_clip_once_and_are_even(num_shards: int) -> None:
    names = [f"clips/{number:05}.mp4" for number in range(1600)]
    homes = [[in_shard(n, s, num_shards) for s in range(1, num_shards + 1)] for n in names]
    assert all(sum(home) == 1 for home in homes)
    sizes = [sum(column) for column in zip(*homes, strict=True)]
    # Of a binomial spread: six standard deviations.
    assert max(sizes) - 1600 / num_shards <= 6 * (1600 / num_shards) ** 0.5


@pytest.mark.parametrize("shard", [(0, 4), (5, 4), (1, 0)])
def test_a_shard_must_exist(shard: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"within 1/{shard[1]} .*, got {shard[0]}/{shard[1]}"):
        in_shard("a", *shard)


def test_every_clip_has_a_record_and_bad_files_do_not_stop_it(tmp_path: Path) -> None:
    clips = []
    for number in range(7):
        path = tmp_path / f"{number}.mp4"
        save(path, num_frames=3 + number)
        clips.append(Clip(str(path), path.name, f"prompt {number}"))
    (tmp_path / "0.mp4").write_bytes(b"")
    (tmp_path / "4.mp4").unlink()
    counter = Counter()
    records = list(judge_clips(clips, counter, batch=3))
    assert [record.path for record in records] == [clip.path for clip in clips]
    assert [number for number, record in enumerate(records) if record.error] == [0, 4]
    assert "video must be a readable video file" in str(records[0].error)
    assert "video must be an existing file" in str(records[4].error)
    for number in (1, 2, 3, 5, 6):
        report = records[number].report
        assert report is not None
        assert (report.num_frames, report.prompt) == (3 + number, f"prompt {number}")
        assert (records[number].width, records[number].height) == (32, 16)
    assert counter.batches == [
        ["prompt 1", "prompt 2"],
        ["prompt 3", "prompt 5"],
        ["prompt 6"],
    ]


def test_a_clip_that_the_judge_refuses_spares_its_batch(tmp_path: Path) -> None:
    clips = [Clip(str(save(tmp_path / f"{n}.mp4", 2 + n)), f"{n}.mp4") for n in range(3)]
    records = list(judge_clips(clips, Counter(refuses=3), batch=3))
    assert [record.error for record in records] == [None, "too short for the judge", None]


def test_a_rate_can_be_believed_over_the_files(tmp_path: Path) -> None:
    clips = [Clip(str(save(tmp_path / "a.mp4")), "a.mp4")]
    (record,) = judge_clips(clips, Counter(), fps=30.0)
    assert record.report is not None
    assert record.report.fps == 30.0


def test_stopping_half_way_ends_the_decoding_thread(tmp_path: Path) -> None:
    clips = [Clip(str(save(tmp_path / f"{n}.mp4")), f"{n}.mp4") for n in range(6)]
    running = judge_clips(clips, Counter(), batch=1)
    next(running)
    running.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("decode")]


def test_a_batch_has_a_clip() -> None:
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        list(judge_clips([], Counter(), batch=0))
