"""What a person sees: outlines in the right frames, and clips of a size to look at."""

import base64
import io
from pathlib import Path

import pytest
import torch

from cac_reward.drawing import (
    COLOURS,
    draw_findings,
    fit_for_display,
    video_uri,
    write_overlay,
)
from cac_reward.report import Box, Finding, TimeWindow
from cac_reward.video import Video


def grey(num_frames: int = 8, height: int = 20, width: int = 30) -> torch.Tensor:
    return torch.full((num_frames, 3, height, width), 100, dtype=torch.uint8)


def colour(number: int) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(COLOURS[number][1:])), dtype=torch.uint8)


def test_boxes_are_outlined_in_their_window_only() -> None:
    finding = Finding("flicker", TimeWindow(0.25, 0.5), (Box(0.25, 0.2, 0.25, 0.6, 0.75),))
    frames = grey()
    drawn = draw_findings(frames, [finding], 8.0)
    changed = (drawn != frames).any(1)
    assert changed.flatten(1).any(1).tolist() == [False, False, True, True] + [False] * 4
    expected = torch.zeros(20, 30, dtype=torch.bool)
    expected[5:15, 6:18] = True
    expected[6:14, 7:17] = False
    assert torch.equal(changed[2], expected)
    assert torch.equal(drawn[2, :, 5, 6], colour(0))
    assert torch.equal(frames, grey())


def test_a_finding_without_boxes_outlines_the_frame_in_its_own_colour() -> None:
    first = Finding("flicker", TimeWindow(0, 0.125), (Box(0, 0.4, 0.4, 0.6, 0.6),))
    second = Finding("camera", TimeWindow(0, 0.125))
    drawn = draw_findings(grey(), [first, second], 8.0)
    for corner in ((0, 0), (19, 29), (0, 29), (19, 0)):
        assert torch.equal(drawn[0, :, corner[0], corner[1]], colour(1))
    assert torch.equal(drawn[0, :, 8, 12], colour(0))
    assert torch.equal(drawn[1], grey()[1])


@pytest.mark.parametrize("box", [(0.999, 0.999, 1, 1), (0, 0, 1e-6, 1e-6), (0, 0.5, 1, 0.5001)])
def test_the_smallest_boxes_stay_in_the_frame(box: tuple[float, ...]) -> None:
    finding = Finding("text", TimeWindow(0, 1), (Box(0, *box),))
    drawn = draw_findings(grey(), [finding], 8.0)
    assert (drawn != grey()).any(1).flatten(1).any(1).all()


def test_only_whole_uint8_clips_are_drawn_on() -> None:
    with pytest.raises(ValueError, match=r"frames must be uint8 \[frames, 3, height, width\], got"):
        draw_findings(torch.rand(2, 3, 8, 8), [], 8.0)


@pytest.mark.parametrize(("size", "stored"), [((20, 30), (20, 30)), ((21, 31), (22, 32))])
def test_a_clip_of_any_size_becomes_an_mp4(size: tuple, stored: tuple) -> None:
    kind, _, data = video_uri(Video(grey(4, *size), 8.0)).partition(",")
    assert kind == "data:video/mp4;base64"
    read = Video.decode(io.BytesIO(base64.b64decode(data)))
    assert ((read.height, read.width), read.num_frames, read.fps) == (stored, 4, 8.0)
    assert (read.frames.float() - 100).abs().max() < 4


def test_clips_are_brought_to_a_size_to_look_at() -> None:
    tiny = Video((torch.rand(2, 3, 32, 32) * 255).to(torch.uint8), 8.0)
    grown = fit_for_display(tiny)
    assert (grown.height, grown.width) == (192, 192)
    assert torch.equal(grown.frames[..., ::6, ::6], tiny.frames)
    assert torch.equal(grown.frames[..., 5::6, 5::6], tiny.frames)
    large = fit_for_display(Video(grey(2, 752, 1360), 8.0))
    assert (large.height, large.width) == (265, 480)
    assert large.frames.unique().tolist() == [100]
    for size in ((192, 300), (100, 480), (480, 480)):
        clip = Video(grey(2, *size), 8.0)
        assert fit_for_display(clip) is clip


@pytest.mark.parametrize("size", [(20, 30), (21, 31)])
def test_an_overlay_is_the_clip_with_its_outlines(tmp_path: Path, size: tuple) -> None:
    finding = Finding("flicker", TimeWindow(0.25, 0.5), (Box(0.25, 0.2, 0.25, 0.6, 0.75),))
    video = Video(grey(8, *size), 8.0)
    path = tmp_path / "deep" / "a.mp4"
    write_overlay(path, video, [finding])
    overlay = Video.decode(path)
    assert [one.name for one in path.parent.iterdir()] == ["a.mp4"]
    assert (overlay.num_frames, overlay.fps) == (8, 8.0)
    assert (overlay.height, overlay.width) == (20 + size[0] % 2 * 2, 30 + size[1] % 2 * 2)
    # Half the colour survives 4:2:0 in a line of one pixel.
    changed = ((overlay.frames.float() - 100).abs() > 20).any(1).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, True] + [False] * 4
