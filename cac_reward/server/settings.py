"""What the server may be asked, how long it may take, and whom it answers."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, fields
from pathlib import Path

MEBIBYTE = 1024**2
DECODER_BYTES = 256 * MEBIBYTE
"""What codecs and their threads may take besides the frames."""


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """Bounds on what one request, one clip and all of them together may cost."""

    max_body_bytes: int = 256 * MEBIBYTE
    """Bytes of one request."""
    max_pending_bytes: int = 1024 * MEBIBYTE
    """Bytes of all requests that are being answered."""
    max_clips: int = 64
    """Clips of one request."""
    max_prompt_characters: int = 10_000
    """Characters of one prompt."""
    max_clip_bytes: int = 128 * MEBIBYTE
    """Bytes of one clip as it came, base64 undone; of one file under the media root."""
    max_frames: int = 2_000
    """Frames of one clip."""
    max_pixels: int = 2048 * 2048
    """Pixels of one frame."""
    max_seconds: float = 120.0
    """Seconds of one clip."""
    max_decoded_bytes: int = 512 * MEBIBYTE
    """Bytes of one decoded clip, 3 for each pixel."""
    decode_seconds: float = 60.0
    """Seconds that decoding one clip may take."""
    decode_memory_bytes: int = 2048 * MEBIBYTE
    """Bytes of memory that a decoder may take beyond its own start."""
    batch_seconds: float = 900.0
    """Seconds that judging one batch may take; the model process is restarted after that."""
    start_seconds: float = 1800.0
    """Seconds that the model may take to load."""
    body_seconds: float = 60.0
    """Seconds that a client may take to send its request."""
    max_queue: int = 128
    """Clips accepted and not answered yet; beyond that the answer is 429."""
    max_batch: int = 8
    """Clips judged together."""
    batch_wait_seconds: float = 0.01
    """Seconds that a clip waits for others to be judged with."""
    deadline_seconds: float = 600.0
    """Seconds for one request unless it asks for fewer; beyond that the answer is 504."""
    num_decoders: int = 2
    """Processes that decode."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not value > 0:
                raise ValueError(f"{one.name} must be above 0, got {value}")
        # Decoding holds a clip twice for a moment: as single frames, and as one tensor.
        needed = 2 * self.max_decoded_bytes + DECODER_BYTES
        if self.decode_memory_bytes < needed:
            raise ValueError(
                f"decode_memory_bytes must be at least {needed} for max_decoded_bytes="
                f"{self.max_decoded_bytes}, got {self.decode_memory_bytes}"
            )
        if self.max_batch > self.max_queue:
            raise ValueError(
                f"max_batch must be at most max_queue={self.max_queue}, got {self.max_batch}"
            )


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where to listen, whom to answer, and which files may be named."""

    host: str = "127.0.0.1"
    """Address to listen on; anything but a loopback address needs a token."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    token: str | None = field(default=None, repr=False)
    """What a client must know; None lets everybody on this machine ask."""
    media_root: Path | None = None
    """Folder whose files a request may name; None refuses every path."""
    frames_fps: float | None = None
    """Rate of clips that come as pictures without one; None refuses those."""
    limits: ServerLimits = field(default_factory=ServerLimits)
    """Bounds on what is accepted."""

    def __post_init__(self) -> None:
        if self.token is not None and len(self.token) < 16:
            raise ValueError(
                f"token must have at least 16 characters, got {len(self.token)}; make one with: "
                "python -c 'import secrets; print(secrets.token_urlsafe())'"
            )
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ValueError("token must be printable ASCII without line breaks")
        if self.token is None and not is_loopback(self.host):
            raise ValueError(
                f"host must be a loopback address where there is no token, got {self.host!r}; "
                "set CAC_REWARD_TOKEN or --token-file to listen elsewhere"
            )
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be in [0, 65535], got {self.port}")
        if self.media_root is not None and not self.media_root.is_dir():
            raise ValueError(f"media_root must be an existing folder, got {self.media_root}")
        if self.frames_fps is not None and not 0 < self.frames_fps < float("inf"):
            raise ValueError(f"frames_fps must be above 0, got {self.frames_fps}")


def is_loopback(host: str) -> bool:
    """Whether a name or address can only be this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
