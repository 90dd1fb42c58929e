"""Toy clips as files: what they hold is what the renderer knows, and nothing is lost on the way."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cac_reward.answers import parse_findings, write_findings
from cac_reward.data.storage import read_annotations
from cac_reward.frames import scan_indices
from cac_reward.judges.local import LocalJudge
from cac_reward.training.clips import ClipStore
from cac_reward.training.task_answers import Task, parse_task_answer, write_task_answer
from cac_reward.training.tasks import task_answer
from examples.toy_world import judge_bank
from examples.toy_world.annotated_clips import (
    HELD_OUT,
    UNSEEN_FAULT,
    captions,
    finding,
    held_out,
    main,
    mixed,
    redrawn,
    snap,
    wrong_prompt,
)
from examples.toy_world.base_judge import (
    build_base,
    judge_settings,
    number_tokens,
    protocol_corpus,
)
from examples.toy_world.scales import SCALES, Scale
from examples.toy_world.training_state import render_batch
from examples.toy_world.world import render_clip, split_of

NUM_FRAMES = 13


def test_boxes_lie_on_the_pixel_grid() -> None:
    assert snap((0.1, 0.2, 0.11, 0.9), 32) == (0.09375, 0.1875, 0.125, 0.90625)
    assert snap((0.999, 0, 1, 0.001), 32) == (0.96875, 0.0, 1.0, 0.03125)
    random = np.random.default_rng(0)
    for _ in range(100):
        x, y = np.sort(random.random((2, 2)), axis=1)
        for grid in (32, 64):
            box = snap((x[0], y[0], x[1], y[1]), grid)
            assert box[0] < box[2]
            assert box[1] < box[3]
            assert all(value * grid == round(value * grid) for value in box)


def test_a_fault_is_stated_with_its_window_and_a_box_on_each_of_its_frames() -> None:
    for seed in range(20):
        clip = render_clip(seed)
        for fault in clip.faults:
            stated = finding(fault, clip.frames.shape[1])
            frames = range(fault.first_frame, fault.last_frame + 1)
            assert stated.type == fault.type
            assert stated.window.frame_indices(NUM_FRAMES, clip.fps) == frames
            times = {round(box.time_seconds * clip.fps) for box in stated.boxes}
            assert times <= set(frames)
            # It survives the judge's own way of writing, at the precision of its tokens.
            (again,) = parse_findings(write_findings([stated]), NUM_FRAMES / clip.fps)
            assert again.type == stated.type
            assert again.window.start_seconds == pytest.approx(
                stated.window.start_seconds, abs=0.006
            )


def test_captions_name_what_each_frame_shows() -> None:
    """Every object on each frame of a clean clip; one that has vanished is not named meanwhile."""
    for seed in range(12):
        clip = render_clip(seed, fault="vanish" if seed % 2 else "none")
        objects = [part.removeprefix("a ").split()[:2] for part in clip.prompt.split(" and a ")]
        said = captions(clip)
        for number, one in enumerate(said):
            assert one.window.frame_indices(NUM_FRAMES, clip.fps) == range(number, number + 1)
        assert len(said) == NUM_FRAMES
        gone = {
            (fault.target, frame)
            for fault in clip.faults
            for frame in range(fault.first_frame, fault.last_frame + 1)
        }
        for colour, shape in objects:
            for frame, one in enumerate(said):
                there = (f"{colour} {shape}", frame) not in gone
                assert (f"{colour} {shape}" in one.text) == there


def test_wrong_prompts_are_wrong() -> None:
    random = np.random.default_rng(0)
    for seed in range(60):
        clip = render_clip(seed)
        wrong = wrong_prompt(clip, random)
        assert wrong != clip.prompt
        assert wrong.startswith("a ")


def test_files_give_back_every_pixel_and_every_word(tmp_path: Path) -> None:
    words = ["--output", str(tmp_path), "--sets", "rendered", "held_out"]
    words += ["--count", "5", "--held-out", "4"]
    main(words)
    for name, split, count in (("rendered", "train", 5), ("held_out", "val", 4)):
        store = ClipStore([tmp_path / f"{name}.jsonl"], split=split)
        assert len(store) == count
        for number in range(count):
            clip = store.annotation(number)
            video = store.video(number, clip)
            made = render_clip(
                int(clip.source_video.removeprefix("seed ")),
                split="train" if split == "train" else "evaluation",
            )
            assert torch.equal(video.frames, torch.from_numpy(made.frames).permute(0, 3, 1, 2))
            assert len(clip.findings) == len(made.faults)
            assert (clip.verdict == "anomalous") == bool(clip.findings)
    # A second call changes nothing.
    before = {one: one.read_bytes() for one in tmp_path.rglob("*.*")}
    main(words)
    assert {one: one.read_bytes() for one in tmp_path.rglob("*.*")} == before


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_sets_are_what_they_are_called(name: str, scale: Scale) -> None:
    clips = [one.clip for one in held_out(name, 24, scale)]
    shape = (scale.world.num_frames, scale.world.size, scale.world.size, 3)
    assert {clip.frames.shape for clip in clips} == {shape}
    faults = [fault for clip in clips for fault in clip.faults]
    assert {split_of(clip.prompt) for clip in clips} == {"evaluation"}
    assert 4 < len(faults)
    kinds = {fault.type for fault in faults}
    if name == "held_out_faults":
        assert kinds == {UNSEEN_FAULT}
    elif name != "held_out":
        assert UNSEEN_FAULT not in kinds
    lengths = {(one.type, one.last_frame - one.first_frame + 1) for one in faults}
    # A stop is seen in two frames, a jump in the one before and the one behind it.
    short = {"freeze": 2, "teleport": 3}
    assert all(length <= short.get(kind, 1) for kind, length in lengths) == (
        name == "held_out_small"
    )


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_mixed_clips_leave_one_fault_out_and_make_every_other_small(scale: Scale) -> None:
    clips = [one.clip for one in mixed(40, scale)]
    assert all(fault.type != UNSEEN_FAULT for clip in clips for fault in clip.faults)
    areas = [
        [
            (x2 - x1) * (y2 - y1)
            for clip in half
            for fault in clip.faults
            for _, (x1, y1, x2, y2) in fault.boxes
        ]
        for half in (clips[1::2], clips[::2])
    ]
    assert areas[0]
    # Of the boxes; the shapes in them cover less.
    assert max(areas[0]) < 0.06 < max(areas[1])


def test_reflected_clips_know_what_is_wrong_with_their_first_answer(tmp_path: Path) -> None:
    """The rule by which `mixed.jsonl` gets its first answers, read back from what is taught."""
    main(["--output", str(tmp_path), "--sets", "mixed", "reflected", "--count", "80"])
    clips = list(read_annotations(tmp_path / "reflected.jsonl"))
    plain = list(read_annotations(tmp_path / "mixed.jsonl"))
    task = Task(kind="grounding", thinking=False, reflection=True, wording="brief")
    said = Counter()
    for clip, before in zip(clips, plain, strict=True):
        assert replace(clip, first_answer=None, reflection=None) == before
        answer = parse_task_answer(task, write_task_answer(task, task_answer(task, clip)), clip)
        first, final = answer.first.value, answer.value
        said[answer.reflection] += 1
        match answer.reflection:
            case "right":
                assert first == final
            case "nothing is broken":
                assert first
                assert not final
            case "something is broken":
                assert final
                assert not first
            case "too early":
                assert first[0].start_seconds <= final[0].start_seconds
                assert first != final
            case "too late":
                assert first[-1].end_seconds >= final[-1].end_seconds
                assert first != final
    assert len(said) == 5
    assert 0.3 < said["right"] / len(clips) < 0.7


def test_redrawn_clips_come_from_the_bank_where_truth_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = torch.randint(0, 255, (3, NUM_FRAMES, 32, 32, 3), dtype=torch.uint8)
    bank = {"kept": torch.tensor([True, False, True]), "decoded": decoded, "redrawn": 255 - decoded}
    torch.save(bank, tmp_path / "bank.pt")
    made = list(redrawn(tmp_path / "bank.pt"))
    assert [one.path for one in made] == [
        "decoded/000000.mkv",
        "redrawn/000000.mkv",
        "decoded/000001.mkv",
        "decoded/000002.mkv",
        "redrawn/000002.mkv",
    ]
    assert np.array_equal(made[4].frames, 255 - decoded[2].numpy())
    assert made[0].clip.seed == render_batch(judge_bank.STAGE, 0, 1)[0].seed


def test_the_bank_must_be_named_for_redrawn_clips(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--sets", "redrawn"])
    assert "--bank must name the bank" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--sets", "redrawn", "--scale", "large"])
    assert "--scale must be small for the set 'redrawn'" in capsys.readouterr().err


def test_both_turns_see_about_as_much_as_one_turn_does() -> None:
    """And no more, so that what two turns gain is not for their pixels."""
    for scale in SCALES.values():
        world = scale.world
        two = world.num_frames * scale.scan_side**2 + scale.inspect_frames * scale.inspect_side**2
        assert 0.8 * two < world.num_frames * scale.whole_side**2 <= two
        settings = judge_settings(scale)
        assert len(scan_indices(world.num_frames, world.fps, settings.scan)) == world.num_frames


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_the_base_judge_has_a_token_for_every_time_and_place(scale: Scale, tmp_path: Path) -> None:
    # As wide as the tests have patience for; the words are those of the scale.
    judge = LocalJudge.from_pretrained(
        build_base(tmp_path, scale=replace(scale, hidden_size=64, heads=2))
    )
    tokenizer = judge._tokenizer
    for text in number_tokens(scale.world):
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1, text
    for text in protocol_corpus():
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
