"""The process in which untrusted clips are decoded, with a limit on its memory.

Started as `python -m cac_reward.server.decoding SETTINGS`. Each message names an input; the frames
are written to the spool as plain bytes and the answer says their shape, or why there are none.
"""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import stat
import sys
from pathlib import Path
from typing import Any

from cac_reward.server.lines import SPENT, Message, answer_lines, claim_stdout, say

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
DTYPES = ("U8", "F16", "BF16", "F32")


def decode_clip(message: Message, settings: Message) -> Message:
    """Decode one clip into `message["output"]`: F * 3 * H * W bytes, frame by frame.

    Args:
        message: name, kind ('mp4', 'frames', 'safetensors' or 'path'), input, lengths (of the
            frames' pictures), fps (None believes the file), output.
        settings: the limits by name, and media_root.

    Returns:
        shape [F, 3, H, W] and fps, or error; and whether the memory is spent.
    """
    readers = {
        "mp4": _read_mp4,
        "frames": _read_frames,
        "safetensors": _read_safetensors,
        "path": _read_path,
    }
    try:
        video = readers[message["kind"]](message, settings)
        # Showing uneven frames at an even rate may have made it longer than its header said.
        _limits(settings).check(message["name"], video.num_frames, video.height, video.width)
        _check_seconds(message["name"], video.num_frames / video.fps, settings)
    except (ValueError, OSError) as error:
        # FFmpeg says EAGAIN where there was no memory for the stack of a thread.
        if getattr(error.__cause__, "errno", None) in (errno.EAGAIN, errno.ENOMEM):
            return _spent(message, settings, error)
        return {"error": str(error)}
    except (MemoryError, RuntimeError) as error:
        return _spent(message, settings, error)
    video.frames.contiguous().numpy().tofile(message["output"])
    return {"shape": list(video.frames.shape), "fps": video.fps}


def _spent(message: Message, settings: Message, error: Exception) -> Message:
    """What to say when the memory did not suffice; what is left of it may be in pieces."""
    limit = settings["decode_memory_bytes"]
    text = f"{message['name']} could not be decoded in {limit} bytes of memory: {error}"
    return {"error": text, SPENT: True}


def open_confined(root: str | None, path: str) -> io.FileIO:
    """Open a regular file that lies below a folder once every link is followed.

    The check is made on the opened file, so that swapping a link in between gains nothing. That a
    file outside exists is not told.

    Raises:
        ValueError: There is no root, the file is outside it, missing, or no regular file.
    """
    if root is None:
        raise ValueError("path must not be given here: the server was started without --media-root")
    real_root = os.path.realpath(root)
    refusal = f"path must name a regular file under the server's media root, got {path[:200]!r}"
    if "\0" in path:
        raise ValueError(refusal)
    target = os.path.realpath(os.path.join(real_root, path))
    if not Path(target).is_relative_to(real_root):
        raise ValueError(refusal)
    try:
        # Without O_NONBLOCK a named pipe would block here.
        descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(refusal) from error
    opened = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    if not (opened.is_relative_to(real_root) and stat.S_ISREG(os.fstat(descriptor).st_mode)):
        os.close(descriptor)
        raise ValueError(refusal)
    return io.FileIO(descriptor)


def _read_mp4(message: Message, settings: Message) -> Any:
    with io.FileIO(message["input"]) as file:
        return _decode_file(file, message, settings)


def _read_path(message: Message, settings: Message) -> Any:
    with open_confined(settings["media_root"], message["input"]) as file:
        size = os.fstat(file.fileno()).st_size
        if size > settings["max_clip_bytes"]:
            raise ValueError(
                f"{message['name']} must stay within max_clip_bytes={settings['max_clip_bytes']}, "
                f"got {size}"
            )
        return _decode_file(file, message, settings)


def _decode_file(file: io.FileIO, message: Message, settings: Message) -> Any:
    from cac_reward.video import Video

    name, fps = message["name"], message["fps"]
    file.name = name  # type: ignore[misc]
    _check_header_seconds(file, name, settings)
    file.seek(0)
    return Video.decode(file, fps=fps, limits=_limits(settings))  # type: ignore[arg-type]


def _check_header_seconds(file: io.FileIO, name: str, settings: Message) -> None:
    """Refuse a file whose header states too many seconds; whether it is a video is told later."""
    import av

    from cac_reward.video import _FORMATS

    try:
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": ""}
        with av.open(file, "r", options=options) as container:  # type: ignore[call-overload]
            duration = container.duration
    except (av.error.FFmpegError, OSError):
        return
    if duration is not None:
        _check_seconds(name, duration / 1_000_000, settings)


def _read_frames(message: Message, settings: Message) -> Any:
    """Pictures one after another in the input; sizes are checked before any is decoded."""
    import numpy as np
    import torch
    from PIL import Image

    from cac_reward.video import Video

    name, lengths = message["name"], message["lengths"]
    _check_seconds(name, len(lengths) / message["fps"], settings)
    Image.MAX_IMAGE_PIXELS = None  # Ours is checked below, for every clip alike.
    with open(message["input"], "rb") as file:
        encoded = [file.read(length) for length in lengths]
    pictures = []
    for index, data in enumerate(encoded):
        try:
            pictures.append(Image.open(io.BytesIO(data), formats=IMAGE_FORMATS))
        except (OSError, SyntaxError) as error:
            raise ValueError(
                f"{name}.frames[{index}] must be a picture as {', '.join(IMAGE_FORMATS)}"
            ) from error
    width, height = pictures[0].size
    _limits(settings).check(name, len(pictures), height, width)
    for index, picture in enumerate(pictures):
        if picture.size != (width, height):
            raise ValueError(
                f"{name}.frames must have one size, got {pictures[0].size} and then "
                f"{picture.size} at frame {index}"
            )
    frames = np.empty((len(pictures), height, width, 3), dtype=np.uint8)
    for index, picture in enumerate(pictures):
        try:
            frames[index] = np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{name}.frames[{index}] must be whole, got {error}") from error
        picture.close()
    return Video(torch.from_numpy(frames).permute(0, 3, 1, 2), message["fps"], name)


def _read_safetensors(message: Message, settings: Message) -> Any:
    """One tensor named 'frames'; its shape is read from the header before it is loaded."""
    import torch
    from safetensors import SafetensorError, safe_open

    from cac_reward.video import Video

    name = message["name"]
    try:
        with safe_open(message["input"], framework="pt") as file:
            if set(file.keys()) != {"frames"}:
                raise ValueError(
                    f"{name}.safetensors must hold one tensor named 'frames', got "
                    f"{sorted(file.keys())[:5]}"
                )
            header = file.get_slice("frames")
            shape, dtype = list(header.get_shape()), header.get_dtype()
            if len(shape) != 4 or shape[1] != 3 or 0 in shape:
                raise ValueError(f"{name}.safetensors must be [frames, 3, H, W], got {shape}")
            if dtype not in DTYPES:
                raise ValueError(f"{name}.safetensors must be one of {DTYPES}, got {dtype}")
            _limits(settings).check(name, shape[0], shape[2], shape[3])
            _check_seconds(name, shape[0] / message["fps"], settings)
            frames = file.get_tensor("frames")
    except SafetensorError as error:
        raise ValueError(f"{name}.safetensors must be a safetensors file ({error})") from error
    if frames.dtype == torch.uint8:
        return Video(frames, message["fps"], name)
    return Video.from_float(frames, message["fps"], name)


def _limits(settings: Message) -> Any:
    from cac_reward.video import VideoLimits

    return VideoLimits(
        max_frames=settings["max_frames"],
        max_pixels=settings["max_pixels"],
        max_bytes=settings["max_decoded_bytes"],
    )


def _check_seconds(name: str, seconds: float, settings: Message) -> None:
    if seconds > settings["max_seconds"]:
        raise ValueError(
            f"video must stay within max_seconds={settings['max_seconds']:g}, "
            f"got {seconds:.2f} in {name}"
        )


def limit_process(memory_bytes: int, file_bytes: int) -> None:
    """Bound this process's further private memory, the size of its files, and core dumps."""
    with open("/proc/self/status", encoding="ascii") as status:
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + memory_bytes, used + memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Answer until standard input closes."""
    answers = claim_stdout()
    settings = json.loads(sys.argv[1])
    import av  # noqa: F401 - loaded before the memory limit counts.
    import torch
    from PIL import Image

    import cac_reward.video  # noqa: F401

    Image.init()
    torch.set_num_threads(1)
    limit_process(settings["decode_memory_bytes"], settings["max_decoded_bytes"])
    say(answers, {"ready": True})
    answer_lines(answers, lambda message: decode_clip(message, settings))


if __name__ == "__main__":
    main()
