"""A clip in memory, and its way from and to a video file.

Axes: F frames, C channels (3, RGB), H height, W width. Files are opened as plain local data: no
network address, playlist or list of other files is ever followed.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cac_reward.display import display_matrix, even_order, fit_size, upright
from cac_reward.pixels import check_frames
from cac_reward.whole_files import whole_file

logger = logging.getLogger(__name__)

SMALL_FRAME = 256 * 256
"""Pixels up to which one thread reads a frame fastest."""
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,ogg,flv,asf,mpeg"


@dataclass(frozen=True, kw_only=True)
class VideoLimits:
    """What a file may ask of this machine; checked on its header, before anything is decoded."""

    max_frames: int = 10_000
    """Most frames of a clip."""
    max_pixels: int = 4096 * 2304
    """Most pixels of one frame."""
    max_bytes: int = 4 * 1024**3
    """Most memory of the decoded clip."""

    def check(self, name: str, num_frames: int, height: int, width: int) -> None:
        """Refuse a clip that is too large.

        Raises:
            ValueError: Naming the limit and how to raise it.
        """
        remedy = "cut or scale it down, or raise the limit in VideoLimits"
        for limit, value in (
            ("max_frames", num_frames),
            ("max_pixels", height * width),
            ("max_bytes", num_frames * height * width * 3),
        ):
            if value > getattr(self, limit):
                raise ValueError(
                    f"video must stay within {limit}={getattr(self, limit)}, "
                    f"got {value} in {name}; {remedy}"
                )


@dataclass(frozen=True, kw_only=True)
class VideoHeader:
    """What a file says of itself before it is decoded."""

    fps: float
    """Average frames per second."""
    num_frames: int
    """Frames announced; 0 where the file does not say."""
    width: int
    """Pixels, as shown."""
    height: int
    """Pixels, as shown."""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> VideoHeader:
        """Open a video file and decode its first frame only.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no readable video or states no rate.
        """
        name = os.fspath(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"video must be an existing file, got {name}")
        with open(path, "rb") as opened, _opened_video(opened, name) as (container, stream):
            rate = _checked_fps(stream.average_rate, name)
            announced = _announced_frames(stream, container, rate)
            first = next(container.decode(stream), None)
            if first is None:
                raise ValueError(f"video must have frames, got none in {name}")
            corner = torch.empty(1, first.height, first.width, dtype=torch.uint8)
            height, width = upright(corner, display_matrix(first), name).shape[1:]
            return cls(fps=rate, num_frames=announced, width=width, height=height)


@dataclass(frozen=True, eq=False)
class Video:
    """A clip: at least two frames of one size at a constant rate."""

    frames: Tensor
    """[F 3 H W] uint8."""
    fps: float
    """Frames per second, above 0."""
    source: str = "tensor"
    """Where it came from, for messages and reports."""

    def __post_init__(self) -> None:
        frames = self.frames
        if not isinstance(frames, Tensor) or frames.ndim != 4 or frames.shape[1] != 3:
            shape = tuple(frames.shape) if isinstance(frames, Tensor) else type(frames).__name__
            raise ValueError(
                f"frames of {self.source} must be a tensor [frames, 3, height, width], got {shape}"
            )
        if frames.dtype != torch.uint8:
            raise ValueError(
                f"frames of {self.source} must be uint8, got {frames.dtype}; "
                "use Video.from_float for frames in [0, 1]"
            )
        _check_length(len(frames), self.source)
        if 0 in frames.shape:
            raise ValueError(f"frames of {self.source} must have pixels, got {tuple(frames.shape)}")
        object.__setattr__(self, "fps", _checked_fps(self.fps, self.source))

    @classmethod
    def from_float(cls, frames: Tensor, fps: float, source: str = "tensor") -> Video:
        """Make a clip of [F 3 H W] float frames in [0, 1].

        Raises:
            ValueError: If layout, range, length or rate is wrong.
        """
        if isinstance(frames, Tensor) and frames.ndim == 4 and frames.shape[1] == 3:
            _check_length(len(frames), source)
        check_frames(f"frames of {source}", frames)
        return cls((frames.detach().float().cpu() * 255).round().to(torch.uint8), fps, source)

    @classmethod
    def decode(
        cls,
        source: str | os.PathLike[str] | BinaryIO,
        *,
        fps: float | None = None,
        limits: VideoLimits = VideoLimits(),
        longest_side: int | None = None,
    ) -> Video:
        """Read a video file.

        A file whose frames are not evenly spaced is brought to its average rate by showing at each
        moment the frame that was on screen; a warning says so. Frames are turned and mirrored as
        the file asks; of transparent pixels the colour counts; 10 and more bits become 8.

        Args:
            source: A local file, or an open binary file that can seek.
            fps: Frames per second to believe instead of the file's own.
            limits: Checked on the header before decoding, and while decoding.
            longest_side: Pixels to which larger frames are shrunk while they are decoded, for
                looking at them; None keeps their size.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no readable video, is cut short, has fewer than two frames, states
                no rate, asks to be turned by an odd angle, or passes a limit.
        """
        name = _name_of(source)
        if hasattr(source, "read"):
            return _decode(source, name, fps, limits, longest_side)
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"video must be an existing file, got {path}")
        if not path.is_file():
            raise ValueError(f"video must be a file, got {path}, which is not one")
        with path.open("rb") as opened:
            return _decode(opened, name, fps, limits, longest_side)

    @property
    def num_frames(self) -> int:
        return self.frames.shape[0]

    @property
    def height(self) -> int:
        return self.frames.shape[2]

    @property
    def width(self) -> int:
        return self.frames.shape[3]

    @property
    def duration_seconds(self) -> float:
        return self.num_frames / self.fps

    def to_float(self, indices: Sequence[int] | None = None) -> Tensor:
        """[K 3 H W] float in [0, 1]: the chosen frames, all where None."""
        frames = self.frames if indices is None else self.frames[list(indices)]
        return frames.float() / 255

    def encode(self, *, crf: int = 18, preset: str = "medium", threads: int = 0) -> bytes:
        """The clip as an mp4 that browsers play (h264, 4:2:0).

        Args:
            crf: x264's quality, 0 (best) to 51 (worst).
            preset: x264's effort, from 'ultrafast' to 'veryslow'.
            threads: 0 takes all cores; the bytes depend on their number, so give 1 where the same
                clip must become the same file everywhere.

        Raises:
            ValueError: If `crf` is out of range, or height or width is odd.
        """
        av = _import_av()
        if not 0 <= crf <= 51:
            raise ValueError(f"crf must be in [0, 51], got {crf}")
        if self.height % 2 or self.width % 2:
            raise ValueError(
                f"height and width must be even to encode, got {self.height}x{self.width}; "
                "crop or pad the frames first"
            )
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as container:
            rate = Fraction(self.fps).limit_denominator(100_000)
            effort = {"crf": str(crf), "preset": preset}
            stream = container.add_stream("libx264", rate=rate, options=effort)
            stream.height, stream.width, stream.pix_fmt = self.height, self.width, "yuv420p"
            stream.codec_context.thread_count = threads
            for frame in self.frames:
                picture = frame.permute(1, 2, 0).contiguous().cpu().numpy()
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        return buffer.getvalue()

    def save(self, path: str | os.PathLike[str], *, crf: int = 18) -> None:
        """Write `encode` to a file; a half-written file never carries the final name."""
        with whole_file(path, "wb") as opened:
            opened.write(self.encode(crf=crf))


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs av; install it with: pip install av") from error
    return av


def _name_of(source: object) -> str:
    if hasattr(source, "read"):
        return str(getattr(source, "name", "an open file"))
    return os.fspath(source)  # type: ignore[call-overload]


def _checked_fps(fps: object, name: str) -> float:
    """A rate as a plain float, or an error that says which clip has none."""
    number = fps if isinstance(fps, int | float | Fraction) and not isinstance(fps, bool) else 0
    if not 0 < number < float("inf"):
        raise ValueError(f"fps of {name} must be above 0, got {fps!r}; pass the clip's true rate")
    return float(number)


def _check_length(num_frames: int, name: str) -> None:
    if num_frames < 2:
        raise ValueError(
            f"video must have at least 2 frames, got {num_frames} in {name}; "
            "one picture has no time in it"
        )


@contextmanager
def _opened_video(source: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """Container and picture track of a file; what is wrong with it is a ValueError."""
    av = _import_av()
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": ""}
    try:
        with av.open(source, "r", options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise ValueError(f"video must have a picture track, got none in {name}")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ValueError(
                    f"video must be of a codec known here, got another in {name}; convert it to "
                    "h264 first"
                )
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(
            f"video must be a readable video file, got {name} ({error.strerror}); "
            "play it in a browser or convert it to mp4 first"
        ) from error


def _decode(
    source: Any, name: str, fps: float | None, limits: VideoLimits, longest_side: int | None
) -> Video:
    with _opened_video(source, name) as (container, stream):
        rate = _checked_fps(stream.average_rate if fps is None else fps, name)
        announced = _announced_frames(stream, container, rate)
        limits.check(name, announced, stream.height, stream.width)
        pictures, times = _read_frames(container, stream, name, limits, longest_side)
        _check_whole(container, stream, times, name)
    _check_length(len(pictures), name)
    order: Sequence[int] = range(len(pictures))
    if fps is None:
        size = pictures[0].shape[1:]
        order = even_order(times, rate, name, lambda count: limits.check(name, count, *size))
    return Video(_stack(pictures, order), rate, name)


def _announced_frames(stream: Any, container: Any, rate: float) -> int:
    """Frames that the header promises; 0 where it promises nothing."""
    if stream.frames:
        return int(stream.frames)
    if stream.duration is not None and stream.time_base is not None:
        return int(stream.duration * stream.time_base * Fraction(rate))
    return 0 if container.duration is None else int(container.duration / 1_000_000 * rate)


def _read_frames(
    container: Any, stream: Any, name: str, limits: VideoLimits, longest_side: int | None = None
) -> tuple[list[Tensor], list[float | None]]:
    """Every frame [3 H W] uint8, upright, and the time at which it is shown."""
    pictures: list[Tensor] = []
    times: list[float | None] = []
    matrices: dict[int, tuple[int, ...] | None] = {}
    # Waking threads for each small frame costs many times what they save.
    threads = 1 if stream.height * stream.width <= SMALL_FRAME else 0
    stream.codec_context.thread_count = threads
    converter = _import_av().video.reformatter.VideoReformatter()
    for frame in container.decode(stream):
        limits.check(name, len(pictures) + 1, frame.height, frame.width)
        shrunk = fit_size(frame.height, frame.width, longest_side)
        seen = converter.reformat(frame, format="rgb24", threads=threads, **shrunk)
        picture = torch.from_numpy(seen.to_ndarray()).permute(2, 0, 1)
        # A frame asked for its matrix stays in memory until the garbage is collected.
        if frame.rotation not in matrices:
            matrices[frame.rotation] = display_matrix(frame)
        picture = upright(picture, matrices[frame.rotation], name)
        if pictures and picture.shape != pictures[0].shape:
            raise ValueError(
                f"video must keep one size, got {tuple(pictures[0].shape[1:])} and "
                f"{tuple(picture.shape[1:])} in {name}; convert it to one size first"
            )
        pictures.append(picture.contiguous())
        times.append(frame.time)
    return pictures, times


def _check_whole(container: Any, stream: Any, times: Sequence[float | None], name: str) -> None:
    """Refuse a file that ends well before its header says; an edit list may hide a few frames."""
    remedy = "write or copy it again"
    # An AVI also counts the pictures that it only shows for longer.
    counts = stream.frames and container.format.name != "avi"
    if counts and len(times) < 0.9 * stream.frames:
        raise ValueError(
            f"video must be whole, got {len(times)} of {stream.frames} frames in {name}; {remedy}"
        )
    # Where another track shares the file, its length is not the pictures'.
    alone = len(container.streams) == 1 and container.duration is not None
    if alone and times and times[-1] is not None:
        start = (container.start_time or 0) / 1_000_000
        promised, got = container.duration / 1_000_000, times[-1] - start
        if 0 < got < 0.9 * promised - 2 / float(stream.average_rate or 1):
            raise ValueError(
                f"video must be whole, got {got:.2f} of {promised:.2f} s in {name}; {remedy}"
            )


def _stack(pictures: list[Tensor], order: Sequence[int]) -> Tensor:
    """[F 3 H W] of the pictures in this order; gives each back as soon as it is copied."""
    frames = torch.empty(len(order), *pictures[0].shape, dtype=torch.uint8)
    last_use = {chosen: index for index, chosen in enumerate(order)}
    released = torch.empty(0, dtype=torch.uint8)
    for index, chosen in enumerate(order):
        frames[index] = pictures[chosen]
        if last_use[chosen] == index:
            pictures[chosen] = released
    return frames
