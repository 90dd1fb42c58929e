"""Clips from and to files: what comes back, and every way in which a file can be wrong."""

import io
import os
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch

from cac_reward import video as module
from cac_reward.video import Video, VideoHeader, VideoLimits

REAL_VIDEOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "real_videos"


def moving_square(num_frames: int = 9, height: int = 32, width: int = 48) -> Video:
    frames = torch.full((num_frames, 3, height, width), 40, dtype=torch.uint8)
    for index in range(num_frames):
        frames[index, 0, 8:24, 2 * index : 2 * index + 16] = 220
    return Video(frames, 8.0, "square")


def write_mp4(times: list[int], *, rate: int = 8, pictures: int | None = None) -> io.BytesIO:
    """A grey mp4 whose frame i is as bright as 10 * i and is shown at times[i] / rate."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "1", "bf": "0"})
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        for index, time in enumerate(times[:pictures]):
            picture = np.full((16, 16, 3), 10 * index + 20, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return io.BytesIO(buffer.getvalue())


def test_a_header_says_what_decoding_shows(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    moving_square().save(path)
    assert VideoHeader.read(path) == VideoHeader(fps=8.0, num_frames=9, width=48, height=32)
    with pytest.raises(FileNotFoundError, match="video must be an existing file"):
        VideoHeader.read(tmp_path / "gone.mp4")
    path.write_bytes(b"no video")
    with pytest.raises(ValueError, match="video must be a readable video file, got .*clip.mp4"):
        VideoHeader.read(path)


def test_what_is_encoded_is_decoded(tmp_path: Path) -> None:
    clip = moving_square()
    path = tmp_path / "clip.mp4"
    clip.save(path, crf=1)
    read = Video.decode(path)
    assert (read.fps, read.num_frames, read.height, read.width) == (8.0, 9, 32, 48)
    assert read.source == str(path)
    assert read.duration_seconds == 9 / 8
    # Chroma is stored at half size, so only brightness and the inside of areas come back.
    assert (read.frames.float() - clip.frames.float()).abs().mean() < 4
    inside = slice(12, 20)
    for index in range(9):
        middle = slice(2 * index + 4, 2 * index + 12)
        square = read.frames[index, :, inside, middle].float().mean((1, 2))
        assert (square - torch.tensor([220.0, 40.0, 40.0])).abs().max() < 12
    assert os.listdir(tmp_path) == ["clip.mp4"]


@pytest.mark.parametrize("fps", [8.0, 12.5, 16.0, 23.976, 24.0, 29.97, 30.0, 60.0])
def test_the_rate_survives_a_file(fps: float) -> None:
    clip = Video(moving_square().frames, fps)
    assert Video.decode(io.BytesIO(clip.encode())).fps == pytest.approx(fps, abs=1e-3)


def test_more_compression_means_fewer_bytes_and_more_damage() -> None:
    clip = Video((torch.rand(6, 3, 32, 32) * 255).to(torch.uint8), 8.0)
    fine, coarse = clip.encode(crf=5), clip.encode(crf=45)
    assert len(coarse) < len(fine)
    errors = [
        (Video.decode(io.BytesIO(one)).to_float() - clip.to_float()).abs().mean()
        for one in (fine, coarse)
    ]
    assert errors[0] < errors[1]


def test_float_frames_make_the_round_trip() -> None:
    frames = torch.rand(4, 3, 5, 7)
    clip = Video.from_float(frames, 8)
    assert (clip.to_float() - frames).abs().max() <= 0.5 / 255 + 1e-6
    torch.testing.assert_close(clip.to_float([2, 0]), clip.to_float()[[2, 0]])
    again = Video.from_float(clip.to_float(), 8)
    assert torch.equal(again.frames, clip.frames)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fps", "shape"),
    [
        ("example_1_A.mp4", 24.0, (126, 752, 1360)),
        ("example_1_B.mp4", 30.0, (152, 720, 1280)),
        ("example_2_A.mp4", 24.0, (144, 384, 672)),
        ("example_2_B.mp4", 24.0, (128, 768, 1280)),
        ("example_3_A.mp4", 24.0, (128, 768, 1280)),
        ("example_3_B.mp4", 16.0, (60, 384, 688)),
    ],
)
def test_real_videos(name: str, fps: float, shape: tuple[int, int, int]) -> None:
    path = REAL_VIDEOS / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    clip = Video.decode(path)
    assert (clip.num_frames, clip.height, clip.width) == shape
    assert clip.fps == fps
    assert clip.to_float([0, shape[0] // 2, shape[0] - 1]).std() > 0.02


def test_uneven_frames_are_brought_to_an_even_rate(caplog: pytest.LogCaptureFixture) -> None:
    clip = Video.decode(write_mp4([0, 1, 2, 7, 8, 9]))
    brightness = clip.frames[:, 1, 8, 8].float()
    assert "not evenly spaced" in caplog.text
    # The third picture stays on screen from 2/8 s to 7/8 s, half of the clip.
    held = (brightness - brightness[clip.num_frames // 2]).abs() < 4
    assert 0.3 < held.float().mean() < 0.7
    assert (brightness.diff() > -3).all()
    # 10 / 8 s, give or take the time for which the last picture stays, which the file does not say.
    assert 1.06 < clip.duration_seconds < 1.44


def test_a_stated_rate_is_believed(caplog: pytest.LogCaptureFixture) -> None:
    clip = Video.decode(write_mp4([0, 1, 2, 7, 8, 9]), fps=4)
    assert (clip.fps, clip.num_frames) == (4.0, 6)
    assert "not evenly spaced" not in caplog.text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"video must be an existing file, got .*no\.mp4"):
        Video.decode(tmp_path / "no.mp4")
    with pytest.raises(ValueError, match="video must be a file, got .*, which is not one"):
        Video.decode(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a video" * 50,
        b"\x00\x00\x00\x20ftypisom" + b"\x00" * 200,
        b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        b"RIFF\x24\x00\x00\x00WAVEfmt ",
    ],
)
def test_unreadable_data_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"video must be a readable video file, got .*clip\.mp4"):
        Video.decode(path)


def test_playlists_never_open_other_files(tmp_path: Path) -> None:
    moving_square().save(tmp_path / "other.mp4")
    listing = tmp_path / "clip.mp4"
    listing.write_text(f"ffconcat version 1.0\nfile '{tmp_path / 'other.mp4'}'\n")
    with av.open(str(listing), format="concat", options={"safe": "0"}) as container:
        assert next(container.decode(video=0)).width == 48  # it would work without the guard
    with pytest.raises(ValueError, match="video must be a readable video file"):
        Video.decode(listing)


@pytest.mark.parametrize("kept", [0.3, 0.6])
@pytest.mark.parametrize(
    ("container", "message"),
    [
        ("mp4", r"video must be a readable video file, got .*cut \(Invalid data"),
        ("mp4 with its index in front", r"video must be a readable video file, got .*cut"),
        ("matroska", r"video must be whole, got \d\.\d+ of 5\.00 s in .*cut; write or copy"),
    ],
)
def test_a_half_written_file_is_refused(
    tmp_path: Path, container: str, message: str, kept: float
) -> None:
    clip = Video((torch.rand(40, 3, 64, 64) * 255).to(torch.uint8), 8.0)
    whole = tmp_path / "whole"
    options = {"movflags": "faststart"} if "front" in container else {}
    with (
        av.open(io.BytesIO(clip.encode())) as source,
        av.open(str(whole), "w", format=container.split()[0], container_options=options) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert Video.decode(whole).num_frames == 40
    cut = tmp_path / "cut"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * kept)])
    with pytest.raises(ValueError, match=message):
        Video.decode(cut)


def test_a_file_with_fewer_frames_than_it_says_is_refused() -> None:
    stream = SimpleNamespace(frames=40)
    container = SimpleNamespace(streams=[1, 2], format=SimpleNamespace(name="mov"))
    module._check_whole(container, stream, [0.0] * 36, "x")
    with pytest.raises(ValueError, match="must be whole, got 35 of 40 frames in x; write or copy"):
        module._check_whole(container, stream, [0.0] * 35, "x")


def test_a_sound_file_has_no_pictures(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"must have a picture track, got none in .*sound\.mp4"):
        Video.decode(path)


def test_one_frame_and_no_frame_are_refused() -> None:
    with pytest.raises(ValueError, match="video must have at least 2 frames, got 1 in an open"):
        Video.decode(write_mp4([0, 1, 2], pictures=1), fps=8)
    for count in (0, 1):
        with pytest.raises(ValueError, match=f"at least 2 frames, got {count} in tensor; one pic"):
            Video(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), 8.0)
        with pytest.raises(ValueError, match=f"at least 2 frames, got {count} in tensor; one pic"):
            Video.from_float(torch.zeros(count, 3, 8, 8), 8.0)


def test_a_file_without_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="video must"):
        Video.decode(write_mp4([]), fps=8)


@pytest.mark.parametrize("fps", [None, 0, -8.0, float("nan"), float("inf"), True, "8"])
def test_a_clip_needs_a_rate(fps: Any) -> None:
    with pytest.raises(ValueError, match="fps of square must be above 0, got .*; pass the clip's"):
        Video(moving_square().frames, fps, "square")


def test_a_file_that_states_no_rate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(average_rate=None, frames=9, height=32, width=48, codec_context=1)
    container = SimpleNamespace(streams=SimpleNamespace(video=[stream]))
    container.__enter__ = lambda: container

    class Opened:
        def __enter__(self) -> Any:
            return container

        def __exit__(self, *_: object) -> None:
            return None

    monkeypatch.setattr(av, "open", lambda *_, **__: Opened())
    with pytest.raises(ValueError, match="fps of an open file must be above 0, got None; pass"):
        Video.decode(io.BytesIO(b""))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (VideoLimits(max_frames=8), "video must stay within max_frames=8, got 9 in an open file"),
        (VideoLimits(max_pixels=1535), "video must stay within max_pixels=1535, got 1536"),
        (VideoLimits(max_bytes=9 * 1536 * 3 - 1), "max_bytes=41471, got 41472 .* raise the limit"),
    ],
)
def test_limits_are_checked_before_decoding(
    limits: VideoLimits, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = io.BytesIO(moving_square().encode())
    monkeypatch.setattr(module, "_read_frames", lambda *_: pytest.fail("decoded first"))
    with pytest.raises(ValueError, match=message):
        Video.decode(data, limits=limits)


def test_limits_hold_while_decoding_when_the_header_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO(moving_square().encode())
    monkeypatch.setattr(module, "_announced_frames", lambda *_: 0)
    with pytest.raises(ValueError, match="max_frames=4, got 5"):
        Video.decode(data, limits=VideoLimits(max_frames=4))


def write_file(
    form: str, codec: str, pixels: str, pictures: list[np.ndarray], times: list[int] | None = None
) -> bytes:
    """Pictures [H W 3 or 4] shown at times[i] / 8 s, in any container and codec."""
    buffer = io.BytesIO()
    options = {"live": "1"} if form == "matroska" else {}
    with av.open(buffer, "w", format=form, container_options=options) as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 8)
        for time, picture in zip(times or range(len(pictures)), pictures, strict=True):
            kind = "rgb24" if picture.shape[2] == 3 else "rgba"
            frame = av.VideoFrame.from_ndarray(picture, format=kind)
            frame.pts, frame.time_base = time, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def shades(count: int, height: int = 16, width: int = 32) -> list[np.ndarray]:
    return [np.full((height, width, 3), 20 + 10 * index, np.uint8) for index in range(count)]


def test_transparent_pixels_count_by_their_colour() -> None:
    picture = np.full((16, 32, 4), 200, np.uint8)
    picture[:, :16, 3] = 0
    picture[:, 16:, 1:3] = 0
    clip = Video.decode(io.BytesIO(write_file("mov", "png", "rgba", [picture] * 3)))
    assert torch.equal(clip.frames[0, :, 0, 0], torch.tensor([200, 200, 200], dtype=torch.uint8))
    assert torch.equal(clip.frames[0, :, 0, 20], torch.tensor([200, 0, 0], dtype=torch.uint8))


@pytest.mark.parametrize("pixels", ["yuv420p10le", "yuv444p10le", "yuv422p"])
def test_more_bits_and_finer_colour_show_the_same_picture(pixels: str) -> None:
    clip = Video.decode(io.BytesIO(write_file("mp4", "libx264", pixels, shades(6))))
    assert clip.frames.dtype == torch.uint8
    for index in range(6):
        assert (clip.frames[index].float() - (20 + 10 * index)).abs().max() <= 3


@pytest.mark.parametrize(("height", "width"), [(1, 32), (32, 1), (1, 1)])
def test_one_pixel_is_a_side(height: int, width: int) -> None:
    data = write_file("mov", "png", "rgb24", shades(4, height, width))
    clip = Video.decode(io.BytesIO(data))
    assert clip.frames.shape == (4, 3, height, width)
    assert clip.frames[:, 0, 0, 0].tolist() == [20, 30, 40, 50]


@pytest.mark.parametrize("form", ["mp4", "matroska", "avi", "mov"])
def test_uneven_frames_are_shown_when_they_are_due(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    times = [0, 1, 2, 10, 11, 12, 13, 14]
    clip = Video.decode(io.BytesIO(write_file(form, "mpeg4", "yuv420p", shades(8), times)))
    assert "not evenly spaced" in caplog.text
    for index, shade in enumerate(clip.frames[:, 1, 8, 8].tolist()):
        moment = (index + 0.5) / clip.fps
        due = max(row for row, time in enumerate(times) if time / 8 <= moment)
        assert abs(shade - (20 + 10 * due)) <= 3
    # The file does not say how long the last picture stays.
    assert abs(clip.duration_seconds - 15 / 8) <= 1.5 / clip.fps


def long_mp4(num_frames: int) -> bytes:
    """One picture a second for hours, by the same packet again and again."""
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(write_file("mp4", "mpeg4", "yuv420p", shades(1)))) as source,
        av.open(buffer, "w", format="mp4") as target,
    ):
        content = bytes(next(source.demux(video=0)))
        stream = target.add_stream_from_template(source.streams.video[0])
        for index in range(num_frames):
            packet = av.Packet(content)
            packet.stream, packet.time_base = stream, Fraction(1)
            packet.pts = packet.dts = index
            packet.is_keyframe = True
            target.mux_one(packet)
    return buffer.getvalue()


def test_four_hours_are_refused_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO(long_mp4(4 * 3600))
    monkeypatch.setattr(module, "_read_frames", lambda *_: pytest.fail("decoded first"))
    with pytest.raises(ValueError, match="within max_frames=10000, got 14400 in .*; cut or scale"):
        Video.decode(data)


def test_a_billion_frames_in_the_header_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = moving_square().encode()
    monkeypatch.setattr(module, "_read_frames", lambda *_: pytest.fail("decoded first"))
    for box, message in (
        (b"stts", "video must stay within max_frames=10000, got 1000000000 in an open file"),
        (b"stsz", "video must be a readable video file, got an open file"),
    ):
        place = sound.index(box) + 12
        lie = sound[:place] + (10**9).to_bytes(4, "big") + sound[place + 4 :]
        with pytest.raises(ValueError, match=message):
            Video.decode(io.BytesIO(lie))


def test_frames_hours_apart_are_not_spread_out_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # A stream that is still being written states no length; its rate says 8 frames a second.
    data = write_file("matroska", "mpeg4", "yuv420p", shades(4), [0, 1, 2, 8 * 3600 * 4])
    with av.open(io.BytesIO(data)) as container:
        assert container.duration is None
    monkeypatch.setattr(module, "_stack", lambda *_: pytest.fail("spread out first"))
    with pytest.raises(ValueError, match="video must stay within max_frames=10000, got 115201 in"):
        Video.decode(io.BytesIO(data))


def test_an_unknown_codec_is_named_as_the_reason() -> None:
    sound = moving_square().encode()
    data = sound.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC")
    with pytest.raises(ValueError, match="video must be of a codec known here, got another in an"):
        Video.decode(io.BytesIO(data))


def test_notes_in_another_encoding_do_no_harm() -> None:
    buffer = io.BytesIO()
    clip = moving_square()
    with (
        av.open(io.BytesIO(clip.encode())) as source,
        av.open(buffer, "w", format="matroska") as target,
    ):
        target.metadata["comment"] = "marker-of-this-test"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = buffer.getvalue().replace(b"marker-of", b"\xff\xfe\xaa\xc3ker-o"[:9])
    assert data != buffer.getvalue()
    assert Video.decode(io.BytesIO(data)).num_frames == clip.num_frames


@pytest.mark.parametrize(
    ("size", "longest", "wanted"),
    [((64, 96), 48, (32, 48)), ((96, 64), 48, (48, 32)), ((64, 96), 96, (64, 96))],
)
def test_frames_shrink_while_they_are_decoded(
    size: tuple[int, int], longest: int, wanted: tuple[int, int]
) -> None:
    height, width = size
    frames = torch.full((4, 3, height, width), 30, dtype=torch.uint8)
    frames[:, :, : height // 2, width // 4 : width // 2] = 230
    data = Video(frames, 8.0).encode(crf=1, preset="veryfast")
    small = Video.decode(io.BytesIO(data), longest_side=longest)
    whole = Video.decode(io.BytesIO(data))
    assert small.frames.shape[2:] == wanted
    averaged = torch.nn.functional.adaptive_avg_pool2d(whole.frames.float(), wanted)
    # The scaler rounds dark grey two levels down.
    assert (small.frames.float() - averaged).abs().mean() < 3
    assert (small.num_frames, small.fps) == (whole.num_frames, whole.fps)


def test_a_clip_must_keep_its_size() -> None:
    pictures = [np.zeros((4, 6, 3), np.uint8), np.zeros((6, 4, 3), np.uint8)]
    frames = [av.VideoFrame.from_ndarray(one, format="rgb24") for one in pictures]
    container = SimpleNamespace(decode=lambda _: iter(frames))
    stream = SimpleNamespace(height=4, width=6, codec_context=SimpleNamespace())
    with pytest.raises(ValueError, match=r"must keep one size, got \(4, 6\) and \(6, 4\) in x"):
        module._read_frames(container, stream, "x", VideoLimits())


def test_wrong_layouts_and_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a tensor \[frames, 3, height, width\], got \(4"):
        Video(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), 8.0)
    with pytest.raises(ValueError, match="frames, 3, height, width], got ndarray"):
        Video(np.zeros((4, 3, 8, 8), np.uint8), 8.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be uint8, got torch.float32; use Video.from_float"):
        Video(torch.zeros(4, 3, 8, 8), 8.0)
    with pytest.raises(ValueError, match=r"must have pixels, got \(4, 3, 0, 8\)"):
        Video(torch.zeros(4, 3, 0, 8, dtype=torch.uint8), 8.0)


def test_encoding_refuses_odd_sides_and_unknown_quality() -> None:
    odd = Video(torch.zeros(2, 3, 5, 8, dtype=torch.uint8), 8.0)
    with pytest.raises(ValueError, match="height and width must be even to encode, got 5x8; crop"):
        odd.encode()
    with pytest.raises(ValueError, match=r"crf must be in \[0, 51\], got 52"):
        moving_square().encode(crf=52)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        moving_square().save(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_without_av_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match="reading videos needs av; install it with: pip install"):
        Video.decode(io.BytesIO(b""))
