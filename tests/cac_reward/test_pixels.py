"""Pixels that are none are refused, with the reason."""

import pytest
import torch

from cac_reward.pixels import check_frames
from cac_reward.video import Video


def test_frames_are_checked_at_the_door() -> None:
    check_frames("frames", torch.rand(2, 3, 4, 4))
    for wrong in (torch.rand(2, 4, 4, 3), torch.rand(3, 4, 4), [[0.5]]):
        with pytest.raises(ValueError, match=r"frames must be a tensor \[frames, 3, height, width"):
            check_frames("frames", wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frames must hold at least one pixel, got shape"):
        check_frames("frames", torch.rand(0, 3, 4, 4))
    with pytest.raises(ValueError, match="frames must be float .*, got torch.uint8; divide by 255"):
        check_frames("frames", torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    for bad in (-1.0, 1.01, float("inf")):
        with pytest.raises(ValueError, match=r"frames must be in \[0, 1\], got min=.*rescale with"):
            check_frames("frames", torch.full((2, 3, 4, 4), bad))


def test_nan_is_counted_and_its_frames_named() -> None:
    frames = torch.rand(14, 3, 4, 4)
    check_frames("frames", frames)
    frames[2, 0, 1, 1] = float("nan")
    frames[5, :, 0, 3] = float("nan")
    message = (
        r"frames must hold no NaN, got 4 NaN values in 2 of 14 frames, first \[2, 5\]; the gen"
    )
    with pytest.raises(ValueError, match=message):
        check_frames("frames", frames)
    with pytest.raises(ValueError, match="frames of clip.pt must hold no NaN, got 4 NaN values"):
        Video.from_float(frames, 8.0, "clip.pt")
    with pytest.raises(ValueError, match=r"of 14 frames, first \[0, 1, .*, 9\]; "):
        check_frames("frames", frames * float("nan"))
