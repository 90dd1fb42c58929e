"""Which lesson comes when: by seed and number alone, in whole rounds, around unreadable clips."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.storage import annotation_writer
from cac_reward.frames import InspectSettings, JudgeSettings, ScanSettings
from cac_reward.judges.families import FAMILIES
from cac_reward.report import Finding, TimeWindow
from cac_reward.training.clips import ClipStore
from cac_reward.training.lessons import LessonOptions, View, Words
from cac_reward.training.source import LessonPlan, LessonSource, compress
from tests.training_clips import FRAMES, square_clip, write_clips

CLIPS = 12
SHARES = {"inspect": 2.0, "frame": 1.0, "alignment": 1.0, "qa": 0.0}
VIEW = View(
    JudgeSettings(
        wording="brief",
        scan=ScanSettings(fps=4.0, pixels=1024),
        inspect=InspectSettings(pixels=1024),
    ),
    FAMILIES["qwen3_vl"],
    8,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ClipStore:
    return ClipStore([write_clips(tmp_path_factory.mktemp("clips"), CLIPS)], split=None)


def source(store: ClipStore, shares: dict[str, float] = SHARES, **more: Any) -> LessonSource:
    options = LessonOptions.build(more.pop("options", {}))
    plan = LessonPlan(shares=shares, **{"count": 50, "seed": 3} | more)
    return LessonSource(store, VIEW, plan, options)


def plain(number: int, one: LessonSource) -> list[object]:
    """All that a lesson shows and teaches."""
    lesson = one.draw(number).write()
    parts: list[object] = [lesson.frame_labels, lesson.clip_label]
    for message in lesson.messages:
        if isinstance(message, Words):
            parts.append(message)
        else:
            parts += [part if isinstance(part, str) else part.tolist() for part in message.content]
    return parts


def test_lessons_of_a_kind_follow_each_other_within_an_update(store: ClipStore) -> None:
    update, count = 8, 45
    mixed, sorted_ = source(store, count=count), source(store, count=count, update=update)
    for first in range(0, count, update):
        window = slice(first, first + update)
        assert sorted_.kinds[window].tolist() == sorted(mixed.kinds[window].tolist())
    assert mixed.kinds.tolist() != sorted_.kinds.tolist()
    for kind in range(3):
        # The clips of a kind come in whole rounds as before.
        np.testing.assert_array_equal(
            np.sort(mixed.clips[mixed.kinds == kind]), np.sort(sorted_.clips[sorted_.kinds == kind])
        )


def test_a_lesson_is_a_function_of_seed_and_number(store: ClipStore) -> None:
    options = {"compressed": 0.5, "verdict_only": 0.5}
    one, same = (source(store, options=options) for _ in range(2))
    other = source(store, options=options, seed=4)
    numbers = [7, 0, 7, 31, 8]
    lessons = [plain(number, one) for number in numbers]
    assert lessons[0] == lessons[2]
    assert [plain(number, same) for number in reversed(numbers)] == lessons[::-1]
    assert [plain(number, other) for number in numbers] != lessons
    assert len({str(lesson) for lesson in lessons}) == 4
    # The dice are the seed's and the number's, not the clip's alone.
    dice = [
        each.draw(number).seen.random.random()
        for each, number in ((one, 7), (same, 7), (other, 7), (one, 8))
    ]
    assert dice[0] == dice[1]
    assert len(set(dice)) == 3
    assert not np.array_equal(one.clips, other.clips)
    assert np.array_equal(one.clips, same.clips)


def test_every_clip_comes_once_in_a_round(store: ClipStore) -> None:
    count = 5 * CLIPS + 3
    one = source(store, {"alignment": 1.0}, count=count)
    assert len(one) == count
    rounds = [one.clips[first : first + CLIPS].tolist() for first in range(0, count, CLIPS)]
    assert all(sorted(each) == list(range(CLIPS)) for each in rounds[:-1])
    assert len(set(rounds[-1])) == 3
    assert len({tuple(each) for each in rounds[:-1]}) == 5
    # Each kind of lesson has rounds of its own.
    both = source(store, {"alignment": 1.0, "inspect": 1.0}, count=count)
    for kind in (0, 1):
        mine = both.clips[both.kinds == kind]
        assert sorted(mine[:CLIPS].tolist()) == list(range(CLIPS))


def test_shares_are_kept(store: ClipStore) -> None:
    count = 20_000
    one = source(store, count=count)
    found = Counter(one.names[kind] for kind in one.kinds)
    assert set(found) == {"inspect", "frame", "alignment"}
    for name, share in (("inspect", 0.5), ("frame", 0.25), ("alignment", 0.25)):
        # Five standard deviations.
        assert abs(found[name] / count - share) < 5 * (share * (1 - share) / count) ** 0.5
    kinds = [one.draw(number).kind for number in range(8)]
    assert kinds == [one.names[kind] for kind in one.kinds[:8]]


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_the_share_of_anomalous_clips_is_kept(store: ClipStore, share: float) -> None:
    count = 4000
    one = source(store, count=count, anomalous_share=share)
    broken = one.clips % 2 == 1
    assert abs(broken.mean() - share) <= 5 * (share * (1 - share) / count) ** 0.5
    for kind in range(3):
        mine = one.clips[(one.kinds == kind) & broken]
        if share:
            assert sorted(mine[: CLIPS // 2].tolist()) == list(range(1, CLIPS, 2))


def test_clips_come_as_they_are_without_a_share(store: ClipStore) -> None:
    one = source(store, {"alignment": 1.0}, count=10 * CLIPS)
    assert (one.clips % 2).mean() == 0.5


def written(folder: Path, clips: list[AnnotatedClip]) -> ClipStore:
    with annotation_writer(folder / "some.jsonl") as write:
        for clip in clips:
            write(clip)
    return ClipStore([folder / "some.jsonl"], split=None)


def annotations(count: int) -> list[AnnotatedClip]:
    return [square_clip(number).annotation for number in range(count)]


def test_only_clips_that_fit_are_taken(store: ClipStore, tmp_path: Path) -> None:
    clips = annotations(6)
    clips[3] = replace(clips[3], findings=(), verdict="anomalous")
    clips[4] = AnnotatedClip(path="videos/0004.mkv")
    some = written(tmp_path, clips)
    one = source(some, {"inspect": 1.0}, count=40)
    assert set(one.clips.tolist()) == {0, 1, 2, 5}
    with pytest.raises(ValueError, match=r"lessons.caption must fit at least one clip, got none"):
        source(written(tmp_path, clips[4:5]), {"caption": 1.0})
    with pytest.raises(ValueError, match=r"got none among 0 in .*some.jsonl"):
        source(written(tmp_path, []), {"inspect": 1.0})
    alike = written(tmp_path, clips[0:3:2])
    message = (
        r"data.anomalous_share must be null or have both kinds of clips for lessons.inspect, "
        r"got no anomalous one"
    )
    with pytest.raises(ValueError, match=message):
        source(alike, {"inspect": 1.0}, anomalous_share=0.5)
    # No kind is missed that has no share.
    assert len(source(alike, {"inspect": 1.0}, anomalous_share=0.0)) == 50


def test_unreadable_clips_are_replaced_by_the_next_and_reported(tmp_path: Path) -> None:
    file = write_clips(tmp_path, 6)
    (tmp_path / "videos/0001.mkv").unlink()
    (tmp_path / "videos/0002.mkv").write_bytes(b"no video")
    (tmp_path / "videos/0005.mkv").unlink()
    one = source(ClipStore([file], split=None), {"frame": 1.0}, count=30)
    taken = {}
    for number in range(30):
        drawn = one.draw(number)
        taken[int(one.clips[number])] = (
            int(Path(drawn.seen.clip.path).stem),
            [(Path(skipped.name).stem, skipped.reason) for skipped in drawn.skipped],
        )
        assert drawn.write() is not None
    assert {wanted: got for wanted, (got, _) in taken.items()} == {
        0: 0,
        1: 3,
        2: 3,
        3: 3,
        4: 4,
        5: 0,
    }
    assert [name for name, _ in taken[1][1]] == ["0001", "0002"]
    missing, broken = (reason for _, reason in taken[1][1])
    assert "video must be an existing file" in missing
    assert "0002.mkv" in broken
    assert taken[4][1] == []


def test_a_lesson_without_a_clip_says_so(tmp_path: Path) -> None:
    file = write_clips(tmp_path, 20)
    for video in (tmp_path / "videos").iterdir():
        video.unlink()
    drawn = source(ClipStore([file], split=None), {"frame": 1.0}).draw(0)
    assert drawn.seen is None
    assert drawn.write() is None
    assert len(drawn.skipped) == len({one.name for one in drawn.skipped}) == 16


def test_a_video_shorter_than_its_annotation_is_cut_or_left_out(tmp_path: Path) -> None:
    write_clips(tmp_path, 2)
    clip = square_clip(1).annotation
    late = Finding("vanish", TimeWindow(5, 6))
    over = Finding("vanish", TimeWindow(1, 6))
    some = written(
        tmp_path,
        [
            replace(clip, findings=(late,)),
            replace(clip, findings=(late, over)),
        ],
    )
    for kind in ("inspect", "verdict"):
        drawn = source(some, {kind: 1.0}, count=2).draw(0)
        one = source(some, {kind: 1.0}, count=2)
        for number in range(2):
            drawn = one.draw(number)
            (finding,) = drawn.seen.clip.findings
            assert finding.window == TimeWindow(1, FRAMES / 8)
            reasons = [skipped.reason for skipped in drawn.skipped]
            assert len(reasons) == (one.clips[number] == 0)
            assert all("video must be as long as its annotation says" in why for why in reasons)


def test_prompts_of_other_clips(store: ClipStore) -> None:
    one = source(store, {"alignment": 1.0}, count=60, options={"wrong_prompts": 1.0})
    prompts = {clip.prompt for clip in annotations(CLIPS)}
    for number in range(20):
        seen = one.draw(number).seen
        assert seen.other_prompt in {*prompts, ""} - {seen.clip.prompt}
        lesson = one.draw(number).write()
        asked = seen.other_prompt or seen.clip.prompt
        assert asked in lesson.messages[0].text


def test_frames_through_jpeg(store: ClipStore) -> None:
    frames = store.video(1, store.annotation(1)).frames
    for share in (0.0, 0.5, 1.0):
        one = source(store, {"frame": 1.0}, count=60, options={"compressed": share})
        changed = [
            not torch.equal(one.draw(number).seen.frames, _original(store, one, number))
            for number in range(30)
        ]
        assert (sum(changed) == 30 * share) if share != 0.5 else (5 < sum(changed) < 25)
    rough, fine = (compress(frames, quality).float() for quality in (5, 95))
    assert rough.shape == frames.shape
    assert compress(frames, 50).dtype == torch.uint8
    assert (rough - frames).abs().mean() > (fine - frames).abs().mean() > 0
    assert (fine - frames).abs().mean() < 8


def _original(store: ClipStore, one: LessonSource, number: int) -> torch.Tensor:
    at = int(one.clips[number])
    return store.video(at, store.annotation(at)).frames


def test_broken_lines_stop_the_run_before_it_begins(tmp_path: Path) -> None:
    file = write_clips(tmp_path, 3)
    record = json.loads(file.read_text().splitlines()[0])
    file.write_text(file.read_text() + json.dumps(record | {"fps": "fast"}) + "\n")
    with pytest.raises(ValueError, match=r"clips.jsonl: line 4: fps must be a number"):
        source(ClipStore([file], split=None))
