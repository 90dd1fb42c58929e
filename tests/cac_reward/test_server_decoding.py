"""What a decoder makes of clips, of what is no clip, and of paths that lead elsewhere."""

import errno
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from cac_reward.server.decoding import decode_clip, open_confined
from cac_reward.server.judging import judge_clips, load_scorer
from cac_reward.server.settings import ServerLimits
from cac_reward.video import Video
from tests.serving import stub

LIMITS = {**asdict(ServerLimits()), "media_root": None}


@pytest.fixture
def frames() -> torch.Tensor:
    return torch.randint(0, 256, (6, 3, 16, 24), dtype=torch.uint8)


def decode(
    folder: Path, kind: str, data: bytes, *, fps: float | None = None, **changes: object
) -> dict[str, Any]:
    """The reply to one clip; where it was decoded, with its frames."""
    source, output = folder / "clip.in", folder / "clip.raw"
    source.write_bytes(data)
    message = {"name": "videos[0]", "kind": kind, "input": str(source), "lengths": [len(data)]}
    message |= {"fps": fps, "output": str(output)}
    if "lengths" in changes:
        message["lengths"] = changes.pop("lengths")
    if "path" in changes:
        message["input"] = changes.pop("path")
    reply = decode_clip(message, {**LIMITS, **changes})
    if "shape" in reply:
        read = np.fromfile(output, dtype=np.uint8).reshape(reply["shape"])
        reply["frames"] = torch.from_numpy(read)
    return reply


def pictures(frames: torch.Tensor, kind: str = "PNG") -> list[bytes]:
    encoded = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(buffer, kind)
        encoded.append(buffer.getvalue())
    return encoded


def decode_pictures(folder: Path, parts: list[bytes], **changes: object) -> dict[str, Any]:
    lengths = [len(part) for part in parts]
    return decode(folder, "frames", b"".join(parts), fps=8.0, lengths=lengths, **changes)


def test_mp4(tmp_path: Path, frames: torch.Tensor) -> None:
    data = Video(frames, 12.0).encode()
    reply = decode(tmp_path, "mp4", data)
    torch.testing.assert_close(reply["frames"], Video.decode(io.BytesIO(data)).frames)
    assert (reply["shape"], reply["fps"]) == ([6, 3, 16, 24], 12.0)
    assert decode(tmp_path, "mp4", data, fps=24)["fps"] == 24.0


def test_pictures_come_back_bit_for_bit(tmp_path: Path, frames: torch.Tensor) -> None:
    reply = decode_pictures(tmp_path, pictures(frames))
    assert torch.equal(reply["frames"], frames)
    assert reply["fps"] == 8.0


def test_safetensors_come_back_bit_for_bit(tmp_path: Path, frames: torch.Tensor) -> None:
    reply = decode(tmp_path, "safetensors", save({"frames": frames}), fps=8.0)
    assert torch.equal(reply["frames"], frames)
    half = save({"frames": frames.float() / 255})
    assert torch.equal(decode(tmp_path, "safetensors", half, fps=8.0)["frames"], frames)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda data: b"", "must be a readable video"),
        (lambda data: data[: len(data) // 2], "must be a readable video"),
        (lambda data: b"GIF89a" + data, "must be a readable video"),
        (lambda data: b"#EXTM3U\nhttp://127.0.0.1/a.ts\n", "must be a readable video"),
        (lambda data: b"\x00" * 5000, "must be a readable video"),
    ],
)
def test_what_is_no_video_is_refused(
    change: Any, text: str, tmp_path: Path, frames: torch.Tensor
) -> None:
    reply = decode(tmp_path, "mp4", change(Video(frames, 8.0).encode()))
    assert text in reply["error"]
    assert "videos[0]" in reply["error"]
    assert str(tmp_path) not in reply["error"]


@pytest.mark.parametrize(
    ("limit", "value", "text"),
    [
        ("max_frames", 5, "within max_frames=5, got 6"),
        ("max_pixels", 383, "within max_pixels=383, got 384"),
        ("max_decoded_bytes", 6911, "within max_bytes=6911, got 6912"),
        ("max_seconds", 0.7, "within max_seconds=0.7, got 0.75"),
    ],
)
def test_limits_hold_for_every_kind(
    limit: str, value: float, text: str, tmp_path: Path, frames: torch.Tensor
) -> None:
    changes = {limit: value}
    replies = [
        decode(tmp_path, "mp4", Video(frames, 8.0).encode(), **changes),
        decode_pictures(tmp_path, pictures(frames), **changes),
        decode(tmp_path, "safetensors", save({"frames": frames}), fps=8.0, **changes),
    ]
    for reply in replies:
        assert text in reply["error"]
    assert not (tmp_path / "clip.raw").exists()


def test_a_clip_that_grows_while_it_is_decoded_is_refused(
    tmp_path: Path, frames: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = Video(torch.cat([frames, frames]), 8.0)
    monkeypatch.setattr(Video, "decode", lambda *_, **__: longer)
    reply = decode(tmp_path, "mp4", Video(frames, 8.0).encode(), max_frames=6)
    assert "within max_frames=6, got 12" in reply["error"]


def test_seconds_are_read_from_the_header(
    tmp_path: Path, frames: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Video(frames, 0.001).encode()

    def decode_nothing(*_: object, **__: object) -> None:
        raise AssertionError("decoded although too long")

    monkeypatch.setattr(Video, "decode", decode_nothing)
    reply = decode(tmp_path, "mp4", data)
    assert "within max_seconds=120, got 6000.00 in videos[0]" in reply["error"]


def test_pictures_are_measured_before_any_is_decoded(tmp_path: Path) -> None:
    # A header that states 60,000 x 60,000 pixels, and none of them.
    header = bytearray(pictures(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))[0])
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    reply = decode_pictures(tmp_path, [bytes(header)] * 2)
    assert "within max_pixels=4194304, got 3600000000 in videos[0]" in reply["error"]


def test_pictures_that_do_not_fit_together_are_refused(
    tmp_path: Path, frames: torch.Tensor
) -> None:
    good = pictures(frames)
    other = pictures(frames[:, :, :8])
    text = decode_pictures(tmp_path, [good[0], other[1]])["error"]
    assert "frames must have one size, got (24, 16) and then (24, 8) at frame 1" in text
    text = decode_pictures(tmp_path, [good[0], b"nothing"])["error"]
    assert "videos[0].frames[1] must be a picture as PNG, JPEG, WEBP" in text
    text = decode_pictures(tmp_path, [good[0], good[1][:-60]])["error"]
    assert "videos[0].frames[1] must be whole" in text
    text = decode_pictures(tmp_path, [good[0], *pictures(frames[:1], "TIFF")])["error"]
    assert "must be a picture as PNG, JPEG, WEBP" in text
    assert "at least 2 frames, got 1" in decode_pictures(tmp_path, good[:1])["error"]


def test_alpha_and_grey_are_made_rgb(tmp_path: Path) -> None:
    for mode in ("RGBA", "L", "P", "I;16"):
        buffer = io.BytesIO()
        Image.new(mode, (8, 8)).save(buffer, "PNG")
        assert decode_pictures(tmp_path, [buffer.getvalue()] * 2)["shape"] == [2, 3, 8, 8], mode


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"video": torch.zeros(2, 3, 4, 4)}, "one tensor named 'frames', got ['video']"),
        ({"frames": torch.zeros(2, 4, 4, 3)}, "must be [frames, 3, H, W], got [2, 4, 4, 3]"),
        ({"frames": torch.zeros(3, 4, 4)}, "must be [frames, 3, H, W], got [3, 4, 4]"),
        ({"frames": torch.zeros(2, 3, 0, 4)}, "must be [frames, 3, H, W], got [2, 3, 0, 4]"),
        ({"frames": torch.zeros(2, 3, 4, 4).double()}, "must be one of"),
        ({"frames": torch.full((2, 3, 4, 4), 1.5)}, "must be in [0, 1], got min=1.50"),
        (
            {"frames": torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), torch.nan)])},
            "must hold no NaN, got 48 NaN values in 1 of 2 frames, first [1]; the generator or its",
        ),
    ],
)
def test_tensors_that_are_no_clip_are_refused(
    tensors: dict[str, torch.Tensor], text: str, tmp_path: Path
) -> None:
    assert text in decode(tmp_path, "safetensors", save(tensors), fps=8.0)["error"]


def test_what_is_no_safetensors_is_refused(tmp_path: Path, frames: torch.Tensor) -> None:
    huge = json.dumps(
        {"frames": {"dtype": "U8", "shape": [10**9, 3, 9, 9], "data_offsets": [0, 1]}}
    )
    bodies = [b"", b"abc", save({"frames": frames})[:-9]]
    for data in [*bodies, len(huge).to_bytes(8, "little") + huge.encode() + b"\0"]:
        reply = decode(tmp_path, "safetensors", data, fps=8.0)
        assert "videos[0].safetensors must be a safetensors file" in reply["error"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A media root with a clip, and a secret beside it."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "root_not").mkdir()
    (tmp_path / "root_not" / "a.mp4").write_text("secret")
    folder = tmp_path / "root"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.mp4").write_text("clip")
    (folder / "inside.mp4").symlink_to(folder / "inner" / "a.mp4")
    (folder / "outside.mp4").symlink_to(tmp_path / "secret")
    (folder / "folder_outside").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize(
    "path", ["inner/a.mp4", "inside.mp4", "inner/../inner/a.mp4", "./inside.mp4"]
)
def test_files_under_the_root_are_opened(root: Path, path: str) -> None:
    for given in (path, str(root / path)):
        with open_confined(str(root), given) as file:
            assert file.read() == b"clip"


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "inner/../../secret",
        "outside.mp4",
        "folder_outside/secret",
        "../root_not/a.mp4",
        "/etc/passwd",
        "/proc/self/environ",
        "/dev/zero",
        "missing.mp4",
        "loop",
        "inner",
        ".",
        "pipe",
        "inside.mp4\0",
        "http://127.0.0.1/a.mp4",
        "file:///etc/passwd",
        "a" * 5000,
    ],
)
def test_everything_else_is_refused_in_the_same_words(root: Path, path: str) -> None:
    with pytest.raises(ValueError, match="path must name a regular file under the server's media"):
        open_confined(str(root), path)


def test_nothing_outside_is_even_opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *_: object) -> int:
        raise AssertionError(f"opened {path}")

    monkeypatch.setattr(os, "open", refuse)
    for path in ("../secret", "outside.mp4", "folder_outside/secret", "/dev/zero"):
        with pytest.raises(ValueError, match="path must name a regular file under"):
            open_confined(str(root), path)


def test_a_link_swapped_after_the_check_gains_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def swap(path: str, flags: int, *more: Any) -> int:
        clip = root / "inner" / "a.mp4"
        if path == str(clip):
            clip.unlink()
            clip.symlink_to(root.parent / "secret")
        return real_open(path, flags, *more)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(ValueError, match="path must name a regular file under"):
        open_confined(str(root), "inner/a.mp4")


def test_paths_need_a_root(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="started without --media-root"):
        open_confined(None, "a.mp4")


def test_a_file_under_the_root_is_decoded_within_the_limits(
    tmp_path: Path, frames: torch.Tensor
) -> None:
    Video(frames, 8.0).save(tmp_path / "a.mp4")
    root = str(tmp_path)
    reply = decode(tmp_path, "path", b"", path="a.mp4", media_root=root)
    assert reply["shape"] == [6, 3, 16, 24]
    reply = decode(tmp_path, "path", b"", path="a.mp4", media_root=root, max_clip_bytes=99)
    assert "videos[0] must stay within max_clip_bytes=99, got" in reply["error"]


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM])
def test_a_codec_without_memory_is_told_from_a_bad_file(
    code: int, tmp_path: Path, frames: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("video must be a readable video file") from OSError(code, "full")

    monkeypatch.setattr(Video, "decode", fail)
    reply = decode(tmp_path, "mp4", Video(frames, 8.0).encode())
    assert reply["spent"]
    assert "videos[0] could not be decoded in 2147483648 bytes of memory" in reply["error"]


def test_a_decoder_is_bounded_in_memory_and_gives_up_when_it_is_full(tmp_path: Path) -> None:
    clip = torch.zeros(200, 3, 256, 512, dtype=torch.uint8)  # 79 MB, and a small file.
    source = tmp_path / "clip.in"
    source.write_bytes(Video(clip, 25.0).encode())
    small = tmp_path / "small.in"
    small.write_bytes(Video(clip[:8], 25.0).encode())
    settings = {**LIMITS, "decode_memory_bytes": 112 * 1024**2}
    messages = [
        {"name": "v", "kind": "mp4", "input": str(path), "lengths": [], "fps": None}
        | {"output": str(tmp_path / "out")}
        for path in (small, source, small)
    ]
    run = subprocess.run(
        [sys.executable, "-m", "cac_reward.server.decoding", json.dumps(settings)],
        input="".join(json.dumps(message) + "\n" for message in messages),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    ready, decoded, refused = (json.loads(line) for line in run.stdout.splitlines())
    assert ready == {"ready": True}
    assert decoded["shape"] == [8, 3, 256, 512]
    assert "v could not be decoded in 117440512 bytes of memory" in refused["error"]
    assert refused["spent"]  # The third clip is left to the process that takes this one's place.


def spooled(folder: Path, value: int, prompt: str = "", size: int = 4) -> dict[str, Any]:
    """A decoded clip as the model process is told of it."""
    path = folder / f"{value}_{size}.raw"
    frames = np.full((3, 3, size, size), value, dtype=np.uint8)
    frames.tofile(path)
    clip = {"name": "v", "frames": str(path), "shape": list(frames.shape), "fps": 8.0}
    return {**clip, "prompt": prompt}


def test_the_model_process_scores_clips_of_any_sizes(tmp_path: Path) -> None:
    clips = [spooled(tmp_path, 51), spooled(tmp_path, 102, size=6), spooled(tmp_path, 0, "unknown")]
    for path in ("tests.serving:stub", "tests.serving:plain_reward"):
        answers = judge_clips(load_scorer({"scorer": path}), clips)["answers"]
        assert [one["score"] for one in answers[:2]] == pytest.approx([0.2, 0.4])
        assert answers[2]["score"] is None
        assert answers[2]["error"] in ("told not to know", "the reward returned nan for this clip")
        assert (answers[0]["report"] is None) == (path == "tests.serving:plain_reward")


def test_a_scorers_error_is_told(tmp_path: Path) -> None:
    clips = [spooled(tmp_path, 51, "raise no"), spooled(tmp_path, 52)]
    assert judge_clips(stub(), clips) == {"error": "ValueError: told to raise: no"}


def test_a_scorer_must_answer_every_clip(tmp_path: Path) -> None:
    class Forgetful:
        def inspect(self, videos: object, prompts: object) -> list[object]:
            return []

    reply = judge_clips(Forgetful(), [spooled(tmp_path, 51)])
    assert reply == {"error": "ValueError: scorer must return 1 reports, got 0"}


@pytest.mark.parametrize("path", ["tests.serving", ":stub", "tests.serving:"])
def test_a_scorer_is_named_by_module_and_name(path: str) -> None:
    with pytest.raises(ValueError, match=f"scorer must be 'module:name', got '{path}'"):
        load_scorer({"scorer": path})


def test_a_scorer_must_score() -> None:
    with pytest.raises(
        ValueError, match=r"scorer must return an object with inspect.*got str from"
    ):
        load_scorer({"scorer": "os:getcwd"})
