"""Small sound video files of many kinds, for `benchmarks.fuzz` to damage."""

from __future__ import annotations

import io
import random
from fractions import Fraction
from functools import cache

import av
import numpy as np

KINDS = (
    ("mp4", "libx264", "yuv420p", {}),
    ("mp4", "libx264", "yuv420p10le", {"bf": "0"}),
    ("mp4", "libx264", "yuv420p", {"movflags": "frag_keyframe+empty_moov"}),
    ("mp4", "mpeg4", "yuv420p", {}),
    ("mov", "png", "rgba", {}),
    ("matroska", "ffv1", "bgr0", {}),
    ("matroska", "libx264", "yuv444p", {}),
    ("avi", "mpeg4", "yuv420p", {}),
    ("gif", "gif", "rgb8", {}),
    ("mpegts", "libx264", "yuv420p", {}),
    ("flv", "flv1", "yuv420p", {}),
)
"""Container, codec, pixel format and options."""


def sound_video(chance: random.Random) -> bytes:
    """One of the kinds, of one of a few lengths, evenly spaced or not."""
    return _write(chance.randrange(len(KINDS)), chance.choice((4, 9)), chance.random() < 0.3)


@cache
def _write(kind: int, num_frames: int, uneven: bool) -> bytes:
    form, codec, pixels, options = KINDS[kind]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=8, options=dict(options))
        stream.width, stream.height, stream.pix_fmt = 32, 16, pixels
        stream.codec_context.time_base = Fraction(1, 8)
        for index in range(num_frames):
            picture = np.full((16, 32, 3), 20 + 20 * index, np.uint8)
            picture[:, 2 * index : 2 * index + 8] = 250
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index + (3 * (index > 2) if uneven else 0), Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
