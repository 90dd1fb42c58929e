"""Clips are shown as their files ask: upright, mirrored, and each frame when it is due."""

import io
import logging
import struct
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cac_reward.display import even_order, upright
from cac_reward.video import Video, VideoHeader

ONE = 1 << 16
TURNS = [
    (a, b, c, d)
    for a, b, c, d in product((-1, 0, 1), repeat=4)
    if abs(a * d - b * c) == 1 and abs(a) + abs(b) + abs(c) + abs(d) == 2
]


def with_matrix(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """An mp4 with another display matrix, in units of 1 / 65536, in its track header."""
    place = data.index(b"tkhd") + 44
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return data[:place] + matrix + data[place + 36 :]


def corner_clip() -> Video:
    """Grey, 16 high and 32 wide, with a white rectangle near the top left corner."""
    frames = torch.full((4, 3, 16, 32), 60, dtype=torch.uint8)
    frames[:, :, 2:6, 2:14] = 250
    return Video(frames, 8.0)


def mapped(picture: torch.Tensor, a: int, b: int, c: int, d: int) -> torch.Tensor:
    """A picture [C H W] with every pixel moved to x' = a x + c y, y' = b x + d y by itself."""
    places = {
        (a * x + c * y, b * x + d * y): picture[:, y, x]
        for y in range(picture.shape[1])
        for x in range(picture.shape[2])
    }
    left, top = (min(place[axis] for place in places) for axis in (0, 1))
    wide, high = (max(place[axis] for place in places) + 1 for axis in (0, 1))
    moved = torch.zeros(picture.shape[0], high - top, wide - left, dtype=picture.dtype)
    for (x, y), pixel in places.items():
        moved[:, y - top, x - left] = pixel
    return moved


@pytest.mark.parametrize("signs", TURNS)
def test_a_picture_is_moved_as_its_matrix_says(signs: tuple[int, ...]) -> None:
    assert len(TURNS) == 8
    picture = torch.arange(2 * 3 * 5).reshape(2, 3, 5)
    scaled = tuple(sign * ONE + 20 for sign in signs)
    assert torch.equal(upright(picture, scaled, "x"), mapped(picture, *signs))
    assert torch.equal(upright(picture, None, "x"), picture)


@pytest.mark.parametrize("signs", TURNS)
def test_a_turned_file_is_decoded_upright(tmp_path: Path, signs: tuple[int, ...]) -> None:
    clip = corner_clip()
    data = with_matrix(clip.encode(crf=1), *(ONE * sign for sign in signs))
    wanted = mapped(clip.frames[0], *signs)
    read = Video.decode(io.BytesIO(data))
    assert read.frames.shape[1:] == wanted.shape
    assert (read.frames[0].float() - wanted.float()).abs().mean() < 6
    (tmp_path / "clip.mp4").write_bytes(data)
    header = VideoHeader.read(tmp_path / "clip.mp4")
    assert (header.height, header.width) == tuple(wanted.shape[1:])


@pytest.mark.parametrize(
    "matrix", [(46341, 46341, -46341, 46341), (0, 0, 0, 0), (ONE, 0, ONE // 2, ONE), (0, 0, 0, ONE)]
)
def test_an_odd_angle_is_refused(matrix: tuple[int, ...]) -> None:
    data = with_matrix(corner_clip().encode(), *matrix)
    with pytest.raises(
        ValueError,
        match=r"by whole quarters, got the display matrix \(.*\) in an open file; write it again",
    ):
        Video.decode(io.BytesIO(data))


def accept(_: int) -> None:
    """Any number of frames will do."""


@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=30).map(
        lambda steps: [sum(steps[:count]) / 30 for count in range(len(steps) + 1)]
    )
)
def test_each_moment_shows_the_frame_that_is_due(times: list[float]) -> None:
    fps = (len(times) - 1) / times[-1]
    order = even_order(times, fps, "x", accept)
    if order == range(len(times)):
        assert all(abs(time - index / fps) <= 0.75 / fps for index, time in enumerate(times))
        return
    for index, chosen in enumerate(order):
        moment = (index + 0.5) / fps
        assert times[chosen] <= moment
        assert chosen == len(times) - 1 or moment < times[chosen + 1]


@pytest.mark.parametrize("times", [[0.0, None, 0.2], [None, 0.1], [0.0, 0.2, 0.1], [1.0, 1.0, 1.0]])
def test_without_time_stamps_frames_are_even_and_it_is_said(
    times: list[float | None], caplog: pytest.LogCaptureFixture
) -> None:
    assert even_order(times, 8.0, "x", accept) == range(len(times))
    assert "x: no usable time stamps; taking frames as evenly spaced" in caplog.text


def test_even_frames_are_not_talked_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert even_order([0.5, 0.62, 0.75, 0.88], 8.0, "x", accept) == range(4)
    assert caplog.text == ""
