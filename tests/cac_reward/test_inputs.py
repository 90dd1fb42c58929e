"""What users hand in: every layout, range and form comes out as one, or is refused by name."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cac_reward.inputs import (
    VALUE_RANGES,
    check_videos,
    frames_to_clip,
    open_clip,
    to_batch,
    to_clip,
)
from cac_reward.video import Video

# Three frames of three pixels' height with three channels: sizes tell nothing about the layout.
BATCH = torch.rand(2, 3, 3, 3, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", ["".join(one) for one in itertools.permutations("BFCHW")][::7])
def test_every_order_of_axes_is_brought_into_one(layout: str) -> None:
    given = torch.einsum(f"bfchw->{layout.lower()}", BATCH)
    assert torch.equal(to_batch(given, layout, "0..1"), BATCH)
    assert torch.equal(to_batch(given.numpy(), layout, "0..1"), BATCH)
    single = layout.replace("B", "")
    assert torch.equal(to_clip(given.select(layout.index("B"), 1), single, "0..1"), BATCH[1])
    assert torch.equal(to_clip(given.select(layout.index("B"), 1), layout, "0..1"), BATCH[1])


def test_every_range_is_brought_into_one() -> None:
    torch.testing.assert_close(to_batch(BATCH * 2 - 1, "BFCHW", "-1..1"), BATCH)
    torch.testing.assert_close(to_batch(BATCH * 255, "BFCHW", "0..255"), BATCH)
    whole = (BATCH * 255).to(torch.uint8)
    torch.testing.assert_close(to_batch(whole, "BFCHW", "0..255"), whole.float() / 255)
    assert set(VALUE_RANGES) == {"0..1", "-1..1", "0..255"}


def test_rounding_beyond_the_range_is_cut_off() -> None:
    over = BATCH.clone()
    over[0, 0, 0, 0, 0], over[1, 2, 2, 2, 4] = -5e-4, 1.0005
    result = to_batch(over, "BFCHW", "0..1")
    assert (result.min(), result.max()) == (0, 1)


@pytest.mark.parametrize(
    ("videos", "layout", "value_range", "message"),
    [
        (BATCH, "BFCH", "0..1", "layout must hold the letters of BFCHW in some order, got 'BFCH'"),
        (BATCH, "BFCHH", "0..1", "got 'BFCHH'"),
        (BATCH[0], "BFCHW", "0..1", r"one axis for each letter .* got shape \(3, 3, 3, 5\)"),
        (BATCH, "BFWHC", "0..1", r"3 channels where layout 'BFWHC' says C, got 5"),
        (BATCH, "BFCHW", "0-1", r"value_range must be one of \['0..1', .*, got '0-1'"),
        (BATCH.byte(), "BFCHW", "0..1", r"'0..255' for torch.uint8, got '0..1'"),
        (BATCH * 255, "BFCHW", "0..1", "videos must be in 0..1, got values from .* to 25"),
        (BATCH * 2 - 1, "BFCHW", "0..1", "videos must be in 0..1, got values from -"),
        (
            BATCH * torch.nan,
            "BFCHW",
            "0..1",
            r"videos must hold no NaN, got \d+ NaN values in (\d+) of \1 videos",
        ),
    ],
)
def test_what_the_words_do_not_fit_is_refused(
    videos: torch.Tensor, layout: str, value_range: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        to_batch(videos, layout, value_range)


def test_pictures_become_a_clip() -> None:
    pixels = (BATCH[0] * 255).to(torch.uint8)
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
    assert torch.equal(frames_to_clip(pictures), pixels)
    assert torch.equal(open_clip(pictures, 8.0)[0], pixels)
    grey = [Image.new("L", (4, 4), 7), Image.new("RGBA", (4, 4), (7, 7, 7, 0))]
    assert (frames_to_clip(grey) == 7).all()
    with pytest.raises(ValueError, match=r"pictures of one size, got sizes \[\(4, 4\), \(5, 3\)\]"):
        frames_to_clip([*grey, pictures[0]])
    with pytest.raises(ValueError, match="pictures of one size, got no frames"):
        frames_to_clip([])


def test_a_clip_opens_in_every_form() -> None:
    video = Video(frames=(BATCH[0] * 255).to(torch.uint8), fps=8.0)
    for form in (BATCH[0], BATCH[0].numpy(), np.asarray(BATCH[0])):
        frames, fps = open_clip(form, 8)
        assert torch.equal(frames, BATCH[0])
        assert fps == 8.0
    assert torch.equal(open_clip(video, None)[0], video.frames)


@pytest.mark.parametrize(
    ("form", "fps", "message"),
    [
        (BATCH[0], None, "fps must be above 0, got None"),
        (BATCH[0], True, "fps must be above 0, got True"),
        (BATCH[0], 0.0, "fps must be above 0, got 0.0"),
        (5, 8.0, "a tensor, an array, a Video, a path or a list of PIL pictures, got int"),
        ([1, 2], 8.0, "or a list of PIL pictures, got list"),
        (Video(frames=(BATCH[0] * 255).byte(), fps=8.0), 9.0, "the video's own 8.0, got 9.0"),
    ],
)
def test_forms_and_rates_that_cannot_be_are_refused(
    form: object, fps: float | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_clip(form, fps)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.mp4"):
        open_clip(tmp_path / "nothing.mp4", None)


def test_videos_with_nan_are_counted_and_named() -> None:
    videos = torch.zeros(4, 3, 3, 8, 8)
    videos[1, 0, 0, 0, 0] = float("nan")
    videos[3, 2, :, 1, 1] = float("nan")
    with pytest.raises(
        ValueError, match=r"no NaN, got 4 NaN values in 2 of \d+ videos, first \[1, 3\]; the gen"
    ):
        check_videos(videos, 8.0)
