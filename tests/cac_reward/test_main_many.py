"""The command line on many clips: nothing is lost, nothing is judged twice, the bad are named."""

import csv
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cac_reward.video as video_module
from cac_reward.__main__ import main
from cac_reward.records import RecordWriter, read_records
from cac_reward.report import AnomalyReport, Box, Finding, TimeWindow
from cac_reward.scorer import CaCScorer
from cac_reward.video import Video
from tests.cac_reward.test_video import long_mp4


class StubScorer:
    """Finds a fault in clips of at most four frames; can be stopped like a person would."""

    def __init__(self, judge: str, mode: str) -> None:
        self.judge = SimpleNamespace(name=judge, decoder="greedy")
        self.mode = mode
        self.settings = {"family": "stub", "scan.max_frames": 24}
        self.prompts: list[str] = []
        self.stop_before = -1

    def inspect(
        self, videos: Sequence[Video], prompts: Sequence[str] | None = None
    ) -> list[AnomalyReport]:
        reports = []
        for video, prompt in zip(videos, prompts or (), strict=True):
            if len(self.prompts) == self.stop_before:
                raise KeyboardInterrupt
            self.prompts.append(prompt)
            broken = video.num_frames <= 4
            box = Box(0.0, 0.25, 0.25, 0.75, 0.75)
            finding = Finding("jump", TimeWindow(0.0, 0.25), (box,), 3, "there; and back")
            reports.append(
                AnomalyReport(
                    score=0.125 if broken else 0.875,
                    judge_id=self.judge.name,
                    decoder=self.judge.decoder,
                    settings=self.settings,
                    fps=video.fps,
                    num_frames=video.num_frames,
                    findings=(finding,) if broken else (),
                    prompt=prompt,
                    mode=self.mode,
                )
            )
        return reports


class Scorers(list[StubScorer]):
    """Every scorer that the command line has made, and when the next one is to be stopped."""

    stop_before = -1


@pytest.fixture
def scorers(monkeypatch: pytest.MonkeyPatch) -> Scorers:
    made = Scorers()

    def load(judge: str, *, mode: str, **_: Any) -> StubScorer:
        made.append(StubScorer(judge, mode))
        made[-1].stop_before = made.stop_before
        return made[-1]

    monkeypatch.setattr(CaCScorer, "from_pretrained", load)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    clips = tmp_path / "clips"
    (clips / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.mp4", "b.mp4", "c.mp4", "deep/d.mkv.mp4", "e.mp4")):
        frames = torch.zeros(3 + number, 3, 16, 32, dtype=torch.uint8)
        Video(frames, 8.0).save(clips / name)
    (clips / "c.mp4").write_bytes(b"")
    rows = [f"{name}.mp4,prompt {name}" for name in ("e", "deep/d.mkv", "c", "b", "a")]
    (tmp_path / "prompts.csv").write_text("path,prompt\n" + "\n".join(rows))
    return clips


def arguments(folder: Path, *more: object) -> list[str]:
    output = ["--output", folder.parent / "r.jsonl", "--prompts", folder.parent / "prompts.csv"]
    return ["score", *map(str, [folder, "--judge", "J", *output, "--batch", 2, *more])]


def test_a_folder_is_judged_and_its_bad_file_named(
    folder: Path, scorers: Scorers, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder.parent
    more = ["--html", root / "r.html", "--csv", "--overlays", root / "drawn"]
    assert main(arguments(folder, *more)) == 3
    printed = capsys.readouterr()
    assert f"4 of 5 clips have a score: {root / 'r.jsonl'}" in printed.out
    assert f"no score: {folder / 'c.mp4'}: video must be a readable video file" in printed.err
    assert f"1 without a score, first {folder / 'c.mp4'}: video must be" in printed.err
    assert "5/5" in printed.err
    assert scorers[0].prompts == ["prompt a", "prompt b", "prompt deep/d.mkv", "prompt e"]
    records = read_records(root / "r.jsonl")
    assert [Path(path).name for path in records] == [
        "a.mp4",
        "b.mp4",
        "c.mp4",
        "d.mkv.mp4",
        "e.mp4",
    ]
    page = (root / "r.html").read_text(encoding="utf-8")
    assert page.count("<article") == 5
    assert 'src="clips/deep/d.mkv.mp4"' in page
    with (root / "r.csv").open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["score"] for row in rows] == ["0.125", "0.125", "", "0.875", "0.875"]
    assert rows[0] == {
        **{"path": str(folder / "a.mp4"), "verdict": "anomalous", "score": "0.125", "error": ""},
        **{"findings": "1", "types": "jump", "worst_severity": "3", "windows": "0.00-0.25"},
        **{"prompt": "prompt a", "judge": "J", "mode": "full", "seconds": "0.375", "fps": "8.0"},
        **{"frames": "3", "width": "32", "height": "16"},
    }
    assert rows[2]["error"].startswith("video must be a readable video file")
    assert rows[4]["worst_severity"] == ""
    drawn = sorted(
        path.relative_to(root / "drawn").as_posix() for path in root.glob("drawn/**/*.*")
    )
    assert drawn == ["a.mp4", "b.mp4", "deep/d.mkv.mp4", "e.mp4"]
    overlay = Video.decode(root / "drawn" / "a.mp4").frames
    assert overlay[0].amax() > 60
    assert overlay[2].amax() < 10


def test_a_stopped_run_goes_on_where_it_was(
    folder: Path, scorers: Scorers, capsys: pytest.CaptureFixture[str]
) -> None:
    scorers.stop_before = 2
    assert main(arguments(folder)) == 130
    assert "stopped; the same command goes on from" in capsys.readouterr().err
    output = folder.parent / "r.jsonl"
    assert len(read_records(output)) == 2
    with output.open("a") as opened:
        opened.write('{"path": "torn')
    scorers.stop_before = -1
    assert main(arguments(folder)) == 3
    assert scorers[1].prompts == ["prompt deep/d.mkv", "prompt e"]
    resumed = read_records(output)
    output.unlink()
    assert main(arguments(folder)) == 3
    assert read_records(output) == resumed
    # What could not be read is tried again, the rest is not.
    Video(torch.zeros(9, 3, 16, 16, dtype=torch.uint8), 8.0).save(folder / "c.mp4")
    assert main(arguments(folder)) == 0
    assert scorers[3].prompts == ["prompt c"]
    assert main(arguments(folder)) == 0
    assert scorers[4].prompts == []


def test_shards_share_the_work(folder: Path, scorers: Scorers) -> None:
    found = []
    for shard in ("1/3", "2/3", "3/3"):
        output = folder.parent / f"r{shard[0]}.jsonl"
        main([*arguments(folder), "--output", str(output), "--shard", shard])
        found += list(read_records(output))
    assert sorted(found) == sorted(str(path) for path in folder.rglob("*.mp4"))
    assert sum(len(scorer.prompts) for scorer in scorers) == 4


def test_several_files_and_one_prompt(folder: Path, scorers: Scorers) -> None:
    output = folder.parent / "few.jsonl"
    files = [str(folder / "a.mp4"), str(folder / "e.mp4")]
    rest = ["--judge", "J", "--output", str(output), "--prompt", "p", "--mode", "fast"]
    assert main(["score", *files, *rest]) == 0
    assert scorers[0].prompts == ["p", "p"]
    assert list(read_records(output)) == files


def test_a_clip_of_four_hours_is_refused_and_the_others_go_on(
    folder: Path,
    scorers: Scorers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "c.mp4").write_bytes(long_mp4(4 * 3600))
    decoded: list[str] = []
    read = video_module._read_frames

    def count(container: Any, stream: Any, name: str, *rest: Any) -> Any:
        decoded.append(Path(name).name)
        return read(container, stream, name, *rest)

    monkeypatch.setattr(video_module, "_read_frames", count)
    assert main(arguments(folder)) == 3
    printed = capsys.readouterr()
    refused = f"no score: {folder / 'c.mp4'}: video must stay within max_frames=10000, got 14400"
    assert refused in printed.err
    assert "4 of 5 clips have a score" in printed.out
    assert decoded == ["a.mp4", "b.mp4", "d.mkv.mp4", "e.mp4"], "its header alone was read"
    assert len(scorers[0].prompts) == 4
    alone = ["score", str(folder / "c.mp4"), "--judge", "J"]
    assert main(alone) == 2
    assert "error: video must stay within max_frames=10000, got 14400" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["family", "scan.max_frames", "decoder"])
def test_a_judge_asked_in_another_way_does_not_go_on(
    folder: Path, scorers: Scorers, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    main(arguments(folder))
    output = folder.parent / "r.jsonl"
    was, now = {
        "family": ('"family": "stub"', '"family": "other"'),
        "scan.max_frames": ('"scan.max_frames": 24', '"scan.max_frames": 25'),
        "decoder": ('"decoder": "greedy"', '"decoder": "8 votes"'),
    }[kind]
    output.write_text(output.read_text().replace(was, now))
    assert main(arguments(folder)) == 2
    assert f"error: {kind} must be as in {output}, where it is " in capsys.readouterr().err
    # What older reports do not say is no reason to refuse them.
    old = output.read_text().replace(now, was)
    output.write_text(old.replace('"decoder": "greedy"', '"decoder": "not recorded"'))
    assert main(arguments(folder)) == 3
    assert scorers[-1].prompts == []


@pytest.mark.usefixtures("scorers")
def test_one_output_holds_answers_to_one_question(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(folder))
    (folder.parent / "others.txt").write_text("a\nb\nc\nd\ne")
    for more, message in (
        (
            ["--judge", "K"],
            "judge must be as in .*r.jsonl, where it is 'J' for .*a.mp4, got 'K'; n",
        ),
        (["--mode", "fast"], "mode must be as in .*, where it is 'full' for .*, got 'fast'"),
        (["--fps", "9"], "fps must be as in .*, where it is 8.0 for .*, got 9.0"),
        (["--prompts", str(folder.parent / "others.txt")], "prompt must be as in .*'prompt a'"),
    ):
        capsys.readouterr()
        before = (folder.parent / "r.jsonl").read_bytes()
        assert main([*arguments(folder), *more]) == 2
        with pytest.raises(ValueError, match=f"error: {message}"):
            raise ValueError(capsys.readouterr().err)
        assert (folder.parent / "r.jsonl").read_bytes() == before


@pytest.mark.usefixtures("scorers")
def test_wrong_use_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(folder.parent / "x.jsonl")]
    absent = str(folder / "no" / "x")
    many, one = ["score", str(folder), "--judge", "J"], ["score", str(folder / "a.mp4")]
    for given, message in (
        (many, "output must be given for a folder or several clips; add --output FILE"),
        ([*many, *output, "--json", "x"], "json must be left out for many clips; --output has"),
        ([*many, *output, "--batch", "0"], "batch must be at least 1, got 0"),
        ([*many, "--output", absent], "folder of .* must exist; make it first"),
        ([*many, *output, "--csv", absent], "folder of .* must exist; make it first"),
        ([*many, *output, "--fps", "3", "--videos", "link"], "videos must be 'embed' with --fps"),
        ([*many, *output, "--overlays", str(folder)], "overlays must go to a folder without the"),
        ([*one, "--judge", "J", "--csv"], "csv must name a file where --output does not"),
        (["score", absent, "x", "--judge", "J", *output], "clip must be an existing file or"),
    ):
        assert main(given) == 2
        assert "Traceback" not in (printed := capsys.readouterr().err)
        with pytest.raises(ValueError, match=f"error: {message}"):
            raise ValueError(printed)
    with (
        RecordWriter(folder.parent / "x.jsonl"),
    ):
        assert main([*many, *output]) == 2
    assert "output must be written by one process, got" in capsys.readouterr().err


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "1/0", "-1/2", "a/b"])
def test_a_shard_is_one_of_several(shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["score", "x", "--judge", "J", f"--shard={shard}"])
    assert f"shard must be K/N with 1 <= K <= N, got '{shard}'" in capsys.readouterr().err
