"""Planted faults on a clip whose one moving thing is known, on bad clips, and through files."""

import builtins
import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cac_reward.__main__ import main
from cac_reward.data.checking import check_annotations
from cac_reward.data.storage import iterate_records, read_annotations
from cac_reward.taxonomy import LEAF_TYPES, SOURCES, leaf_type
from cac_reward.video import Video
from tests.conftest import REPOSITORY

pytest.importorskip("cv2", reason="opencv-python-headless is not installed")

from cac_reward.data.synthesis.blending import Canvas, membrane
from cac_reward.data.synthesis.faults import FAULTS
from cac_reward.data.synthesis.harmless import GLOBAL, LOCAL
from cac_reward.data.synthesis.making import (
    Source,
    SourceRecord,
    SynthesisSettings,
    random_for,
)
from cac_reward.data.synthesis.motion import import_cv2, measure_motion
from cac_reward.data.synthesis.planting import (
    NothingMovesError,
    PlantedFault,
    PlantSettings,
    finished,
    make_scene,
    plant_fault,
    plant_harmless,
)
from cac_reward.data.synthesis.running import Journal, finish, synthesize
from cac_reward.data.synthesis.sheet import write_sheet
from cac_reward.data.synthesis.targets import Rect, Scene

KINDS = ("faulty", "clean")
FPS, COUNT, HEIGHT, WIDTH, SIDE = 16.0, 33, 96, 128, 26


def thing_at(frame: int) -> Rect:
    """Where the thing is: it goes right, two pixels a frame, and a little up."""
    left, top = 14 + 2 * frame, 46 - frame // 2
    return Rect(left, top, left + SIDE, top + SIDE)


def moving_clip(count: int = COUNT, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A textured square over a textured ground."""
    random = np.random.default_rng(3)
    cv2 = import_cv2()
    ground = cv2.GaussianBlur(random.uniform(0, 255, (height, width, 3)), (0, 0), 4)
    ground = 90 + 4 * (ground - ground.mean())
    face = cv2.GaussianBlur(random.uniform(0, 255, (SIDE, SIDE, 3)), (0, 0), 1.5)
    face = np.array([190, 90, 60]) + 1.2 * (face - face.mean())
    frames = np.repeat(ground[None], count, axis=0)
    for frame in range(count):
        frames[frame][thing_at(frame).slices] = face
    return frames.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene(moving_clip(), FPS)


@pytest.fixture(scope="module", params=list(FAULTS))
def planted(request: pytest.FixtureRequest, scene: Scene) -> PlantedFault:
    return plant(scene, request.param)


def plant(scene: Scene, name: str, seed: int = 5) -> PlantedFault:
    return plant_fault(scene, PlantSettings(faults=(name,)), np.random.default_rng(seed))


def test_every_fault_has_a_leaf_type() -> None:
    assert set(FAULTS) == set(SOURCES["synthesis"])
    assert all(fault.type in LEAF_TYPES for fault in FAULTS.values())


def test_the_window_is_exactly_where_frames_differ(planted: PlantedFault) -> None:
    different = [k for k in range(COUNT) if (planted.frames[k] != planted.clean[k]).any()]
    window = planted.finding.window.frame_indices(COUNT, FPS)
    assert len(window) >= 3
    assert window.start > 0
    assert different[0] == window.start
    assert different[-1] == window.stop - 1
    assert sorted(planted.boxes)[0] == window.start
    assert sorted(planted.boxes)[-1] == window.stop - 1


def test_nothing_differs_outside_the_boxes_and_their_margin(
    planted: PlantedFault, scene: Scene
) -> None:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for frame in range(COUNT):
        allowed = np.zeros((HEIGHT, WIDTH), bool)
        for box in planted.boxes.get(frame, []):
            near_x = (columns >= box.left - scene.margin) & (columns < box.right + scene.margin)
            near_y = (rows >= box.top - scene.margin) & (rows < box.bottom + scene.margin)
            allowed |= near_x & near_y
        same = (planted.frames[frame] == planted.clean[frame]).all(axis=2)
        assert same[~allowed].all()


def test_inside_the_boxes_the_fault_can_be_seen(planted: PlantedFault) -> None:
    for frame, boxes in planted.boxes.items():
        for box in boxes:
            before = planted.clean[frame][box.slices].astype(float)
            after = planted.frames[frame][box.slices].astype(float)
            # A fifth of the box differs by 14 levels after a 3x3 blur.
            assert np.abs(after - before).max(axis=2).mean() > 2.5


def test_boxes_are_in_the_frame_and_the_same_in_both_forms(planted: PlantedFault) -> None:
    relative = [(round(box.time_seconds * FPS), *box.coordinates) for box in planted.finding.boxes]
    pixels = [
        (frame, one.left / WIDTH, one.top / HEIGHT, one.right / WIDTH, one.bottom / HEIGHT)
        for frame, boxes in sorted(planted.boxes.items())
        for one in boxes
    ]
    assert relative == pixels
    assert planted.finding.type == leaf_type(planted.name, "synthesis").name
    assert "{" not in planted.finding.why


def test_the_same_seed_plants_the_same(planted: PlantedFault, scene: Scene) -> None:
    again = plant(scene, planted.name)
    assert np.array_equal(again.frames, planted.frames)
    assert again.finding == planted.finding
    other = plant(scene, planted.name, seed=6)
    assert not np.array_equal(other.frames, planted.frames)


@pytest.mark.parametrize(
    "name", ["vanish", "deform", "texture_flicker", "freeze", "identity", "recolour", "blur"]
)
def test_faults_of_the_thing_lie_on_the_thing(scene: Scene, name: str) -> None:
    planted = plant(scene, name)
    for frame, (box, *_) in planted.boxes.items():
        true = thing_at(frame)
        assert box.meets(true)
        if name != "freeze":
            assert abs(box.centre[0] - true.centre[0]) < 0.4 * SIDE
            assert abs(box.centre[1] - true.centre[1]) < 0.4 * SIDE
    assert (planted.clean == scene.frames).all()


def test_what_vanished_leaves_the_ground_behind(scene: Scene) -> None:
    planted = plant(scene, "vanish")
    frame = max(planted.boxes) - 1
    inner = thing_at(frame).padded(-5)
    red = planted.clean[frame][inner.slices][..., 0].mean()
    assert red > 150
    assert planted.frames[frame][inner.slices][..., 0].mean() < 130


@pytest.mark.parametrize(("name", "remains"), [("duplicate", True), ("teleport", False)])
def test_a_second_thing_is_elsewhere(scene: Scene, name: str, remains: bool) -> None:
    planted = plant(scene, name)
    frame = sorted(planted.boxes)[len(planted.boxes) // 2]
    red = planted.frames[frame][..., 0].astype(int) - planted.frames[frame][..., 2]
    inner = thing_at(frame).padded(-6)
    assert (red[inner.slices].mean() > 60) == remains
    away = [box for box in planted.boxes[frame] if not box.meets(inner)]
    assert away or name == "teleport"
    red[thing_at(frame).padded(3).cut(HEIGHT, WIDTH).slices] = 0
    # Most of a thing's pixels are there a second time.
    assert (red > 60).sum() > 0.5 * SIDE * SIDE


def apart(one: np.ndarray, other: np.ndarray, box: Rect) -> float:
    """Mean difference in levels inside a box."""
    return float(np.abs(one[box.slices].astype(float) - other[box.slices]).mean())


def test_a_frozen_thing_stays_as_it_was(scene: Scene) -> None:
    planted = plant(scene, "freeze")
    first, last = min(planted.boxes), max(planted.boxes)
    for frame in (first, last):
        box = planted.boxes[frame][0]
        held = [apart(planted.frames[frame], scene.frames[k], box) for k in range(first)]
        # The last frame before anything is seen to be wrong, or the one before that.
        assert int(np.argmin(held)) >= first - 3
        assert min(held) < 0.3 * apart(planted.frames[frame], planted.clean[frame], box)


def test_a_jump_in_time_shows_what_comes_later(scene: Scene) -> None:
    planted = plant(scene, "time_jump")
    shown = []
    for frame, (box, *_) in planted.boxes.items():
        moments = [apart(planted.frames[frame], one, box) for one in scene.frames]
        shown.append(int(np.argmin(moments)) - frame)
        assert min(moments) < 0.3 * apart(planted.frames[frame], planted.clean[frame], box)
    assert set(shown) == {shown[0]}
    assert shown[0] >= 4


def test_scrambled_text_has_a_counterpart_with_the_same_text_in_order(scene: Scene) -> None:
    planted = plant(scene, "text_scramble")
    written = (planted.clean != scene.frames).any(axis=(0, 3))
    assert written.any()
    boxes = [box for listed in planted.boxes.values() for box in listed]
    rows, columns = np.flatnonzero(written.any(axis=1)), np.flatnonzero(written.any(axis=0))
    around = Rect(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert all(box.meets(around) for box in boxes)


def test_harmless_edits_leave_nothing_to_be_seen(scene: Scene) -> None:
    seen = set()
    for seed in range(24):
        name, edited = plant_harmless(scene, PlantSettings(), np.random.default_rng(seed))
        again = plant_harmless(scene, PlantSettings(), np.random.default_rng(seed))
        assert np.array_equal(edited, again[1])
        assert (edited != scene.frames).any()
        seen.add(name)
        if name in LOCAL:
            change = np.abs(edited.astype(float) - scene.frames).max(axis=3)
            assert change.mean(axis=(1, 2)).max() < 1.5
    assert seen & set(LOCAL)
    assert seen & set(GLOBAL)


def test_motion_finds_the_thing_and_not_the_ground(scene: Scene) -> None:
    residual = scene.motion.residual[10]
    true = thing_at(10).padded(-4)
    assert residual[true.slices].mean() > 1.2
    assert np.median(residual) < 0.3


def test_a_moving_camera_is_no_moving_thing() -> None:
    cv2 = import_cv2()
    random = np.random.default_rng(0)
    wide = cv2.GaussianBlur(random.uniform(0, 255, (96, 260, 3)), (0, 0), 3)
    wide = (120 + 5 * (wide - wide.mean())).clip(0, 255).astype(np.uint8)
    frames = np.stack([wide[:, 3 * k : 3 * k + 128] for k in range(20)])
    motion = measure_motion(frames)
    assert np.quantile(motion.residual, 0.8) < 0.5
    path = motion.background_path(4, 9)
    # Fifteen pixels in five frames, to the right of the picture.
    assert np.abs(path[:2, 2] - [-15, 0]).max() < 1.3


def test_a_membrane_keeps_what_is_known_and_joins_the_rest() -> None:
    difference = np.zeros((32, 32, 3), np.float32)
    difference[:] = np.linspace(-20, 20, 32)[None, :, None]
    known = np.ones((32, 32), np.float32)
    known[10:22, 10:22] = 0
    broken = difference * known[..., None]
    filled = membrane(broken, known)
    assert np.abs(filled - difference)[10:22, 10:22].max() < 8
    assert np.abs(filled - difference)[:8].max() < 2


def test_an_untouched_canvas_gives_back_the_very_frames(scene: Scene) -> None:
    canvas = Canvas(scene)
    rect = Rect(4, 4, 12, 12)
    canvas.blend(3, rect, canvas.part(3, rect), np.ones((8, 8), np.float32))
    assert canvas.settle(3) == []
    assert canvas.frames == {}


def test_what_is_too_small_to_be_seen_at_the_ends_is_taken_back(scene: Scene) -> None:
    canvas = Canvas(scene)
    for frame, side in ((9, 5), (10, 20), (11, 20), (12, 20), (13, 5)):
        rect = Rect(60, 8, 60 + side, 8 + side)
        content = 255 - canvas.part(frame, rect).round(-2)
        canvas.blend(frame, rect, content, np.ones((side, side), np.float32))
    planted = finished(canvas, FAULTS["recolour"], 9, 14)
    assert planted is not None
    assert sorted(planted.boxes) == [10, 11, 12]
    assert np.array_equal(planted.frames[[9, 13]], scene.frames[[9, 13]])
    assert planted.finding.window.to_json() == [10 / FPS, 13 / FPS]


def test_random_numbers_depend_on_seed_name_and_take_alone() -> None:
    kinds = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a", 0)]
    drawn = [random_for(*kind).integers(0, 2**60) for kind in kinds]
    assert len(set(drawn)) == 4
    assert drawn[0] == drawn[-1]


@pytest.mark.parametrize(
    ("frames", "match"),
    [
        (moving_clip()[:7], "at least 8 frames, got 7"),
        (moving_clip()[:1], "at least 8 frames, got 1"),
        (moving_clip()[:, :20], "at least 32 pixels wide and high, got 128x20"),
    ],
)
def test_clips_that_are_too_small_are_refused(frames: np.ndarray, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_scene(np.ascontiguousarray(frames), FPS)


def test_a_still_clip_has_nothing_to_plant_in() -> None:
    still = make_scene(np.repeat(moving_clip()[:1], 20, axis=0), FPS)
    with pytest.raises(NothingMovesError, match="region that moves by itself"):
        plant_fault(still, PlantSettings(faults=("vanish",)), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PlantSettings(faults=("vanish", "explode")), "faults must be some of .* explode"),
        (lambda: PlantSettings(faults=()), "got none"),
        (lambda: PlantSettings(faults=("blur", "blur")), "named once"),
        (lambda: PlantSettings(window_seconds=(1.0, 0.5)), "shortest <= longest"),
        (lambda: PlantSettings(area=(0.2, 0.1)), "area must be"),
        (lambda: SynthesisSettings(num_frames=7), "num_frames must be at least 8, got 7"),
        (lambda: SynthesisSettings(takes=0), "takes must be at least 1, got 0"),
        (lambda: SynthesisSettings(crf=(30, 20)), "crf must be"),
        (lambda: SynthesisSettings(preset="quick"), "preset must be one of"),
    ],
)
def test_settings_are_checked(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_a_missing_opencv_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **options: object) -> object:
        if name == "cv2":
            raise ImportError("no cv2")
        return real(name, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"cac-reward\[synthesis\]"):
        import_cv2()


# Through files.


def folder_of_clips(root: Path, good: int = 2) -> Path:
    """Some good clips, one of odd size, and bad ones."""
    clips = root / "in"
    clips.mkdir()
    for number in range(good):
        frames = torch.from_numpy(moving_clip()[:, :, number * 2 :].copy()).permute(0, 3, 1, 2)
        Video(frames, FPS).save(clips / f"good{number}.mp4", crf=10)
    Video(torch.from_numpy(moving_clip()[:5]).permute(0, 3, 1, 2), FPS).save(clips / "short.mp4")
    still = np.repeat(moving_clip()[:1], 12, axis=0)
    Video(torch.from_numpy(still).permute(0, 3, 1, 2), FPS).save(clips / "still.mp4")
    (clips / "broken.mp4").write_bytes(b"no video at all")
    return clips


def files_of(output: Path) -> dict[str, bytes]:
    """Everything that is output; the journal's order is that of the workers."""
    return {
        str(one.relative_to(output)): one.read_bytes()
        for one in sorted(output.rglob("*"))
        if one.is_file() and one.name != "journal.jsonl"
    }


def command(clips: Path, output: Path, *more: str) -> list[str]:
    faults = "vanish,recolour,deform,blur"
    words = ["synthesize", str(clips), "--output", str(output), "--takes", "2", "--frames", "16"]
    return [*words, "--faults", faults, "--preset", "ultrafast", *more]


def test_a_folder_becomes_annotated_clips_and_bad_ones_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips, output = folder_of_clips(tmp_path), tmp_path / "out"
    sheet = tmp_path / "sheet.html"
    assert main(command(clips, output, "--sheet", str(sheet), "--split", "train")) == 3
    said = capsys.readouterr()
    assert "left out: broken.mp4" in said.err
    assert "left out: short.mp4: take 0: clip must have at least 8 frames, got 5" in said.err
    assert "left out: still.mp4: take 1: clip must have a region that moves" in said.err
    skipped = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == 5
    annotated = list(read_annotations(output / "annotations.jsonl"))
    assert len(annotated) == 2 * 2 * 3
    report = check_annotations(output, iterate_records(output / "annotations.jsonl"), videos=output)
    assert not report.has_faults
    for clip in annotated:
        video = Video.decode(output / clip.path)
        assert (video.num_frames, video.fps) == (16, FPS)
        assert (video.width, video.height) == (clip.width, clip.height)
        assert (clip.category == "faulty") == bool(clip.findings) == (clip.verdict == "anomalous")
        assert (clip.split, clip.source) == ("train", "synthesis")
    takes = {clip.extra["take"] for clip in annotated}
    assert len(takes) == 4
    for take in takes:
        three = [clip for clip in annotated if clip.extra["take"] == take]
        assert sorted(str(clip.category) for clip in three) == ["clean", "faulty", "harmless"]
        assert len({clip.extra["crf"] for clip in three}) == 1
        faulty, clean = (one for kind in KINDS for one in three if one.category == kind)
        shown = [Video.decode(output / one.path).frames.float() for one in (faulty, clean)]
        frames = faulty.findings[0].window.frame_indices(16, FPS)
        moved = (shown[0] - shown[1]).abs().amax(dim=(1, 2, 3))
        outside = [moved[k].item() for k in range(16) if k not in frames]
        assert moved[frames.start : frames.stop].mean() > 2 * max(outside)
    page = sheet.read_text()
    assert page.count("<section") == 4
    assert "http" not in page.replace("http-equiv", "")
    before = files_of(output)
    stamps = {one: one.stat().st_mtime_ns for one in (output / "clips").iterdir()}
    assert main(command(clips, output, "--split", "train")) == 3
    assert files_of(output) == before
    assert {one: one.stat().st_mtime_ns for one in (output / "clips").iterdir()} == stamps
    assert main(command(clips, output, "--seed", "1")) == 2
    assert "seed must be as in" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_gone_on_in_parallel_it_is_the_same(tmp_path: Path) -> None:
    clips = folder_of_clips(tmp_path, good=3)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command(clips, whole)) == 3
    words = [sys.executable, "-m", "cac_reward", *command(clips, killed, "--workers", "2")]
    child = subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    journal = killed / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (killed / "annotations.jsonl").exists()
    with journal.open("ab") as opened:
        opened.write(b'{"name": "torn')
    assert main(command(clips, killed)) == 3
    mine, theirs = files_of(killed), files_of(whole)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []


def test_records_round_trip_and_other_lines_are_named(tmp_path: Path) -> None:
    record = SourceRecord(name="a", num_bytes=3, failures=("no",))
    assert SourceRecord.from_json(record.to_json()) == record
    (tmp_path / "journal.jsonl").write_text('{"name": "a"}\n')
    with pytest.raises(ValueError, match="line 1: line must be what became of a source"):
        Journal(tmp_path)


def test_what_is_asked_wrongly_is_refused(tmp_path: Path) -> None:
    source = Source("a.mp4", "a")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        next(synthesize([source], tmp_path, SynthesisSettings(), workers=0))
    with pytest.raises(ValueError, match="different names"):
        next(synthesize([source, source], tmp_path, SynthesisSettings()))
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(ValueError, match="must all be done, got none of a"):
        finish([source], tmp_path)
    with pytest.raises(ValueError, match="at least one to show"):
        write_sheet(tmp_path / "a.html", [], tmp_path)
    with pytest.raises(ValueError, match="examples must be at least 1, got 0"):
        write_sheet(tmp_path / "a.html", [], tmp_path, examples=0)
    with pytest.raises(FileNotFoundError, match="must exist"):
        write_sheet(tmp_path / "no" / "a.html", [], tmp_path)
    changed = dataclasses.replace(SynthesisSettings(), crf=(20, 20))
    assert changed.to_json() != SynthesisSettings().to_json()
