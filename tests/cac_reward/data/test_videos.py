"""The video of an annotated clip as a file, as a folder of frames and as a sample of a shard."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cac_reward.data import videos
from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.shards import is_compressed, read_shard, shard_places
from cac_reward.data.videos import open_video, read_packed
from cac_reward.video import Video

FPS = 8.0


def frames(count: int, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(0, 256, (count, 3, 16, 24), dtype=np.uint8))


def write_frames(folder: Path, clip: torch.Tensor, name: str = "{}.png") -> None:
    folder.mkdir()
    for number, frame in enumerate(clip):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(folder / name.format(number))


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as shard:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def encoded() -> dict[str, bytes]:
    return {key: Video(frames(4, seed), FPS).encode() for seed, key in enumerate(("a", "b/c"))}


def test_a_folder_of_frames_is_read_by_the_numbers_in_its_names(tmp_path: Path) -> None:
    """Frame 10 follows frame 9, whatever the letters say."""
    clip = frames(12)
    write_frames(tmp_path / "frames", clip, "shot2_frame{}.png")
    (tmp_path / "frames" / "notes.txt").write_text("not a frame")
    video = open_video(AnnotatedClip(path="frames", fps=FPS), tmp_path)
    assert torch.equal(video.frames, clip)
    assert video.fps == FPS
    # Pictures with a palette or transparency become colours.
    Image.open(tmp_path / "frames" / "shot2_frame0.png").convert("RGBA").save(
        tmp_path / "frames" / "shot2_frame0.png"
    )
    assert torch.equal(open_video(AnnotatedClip(path="frames", fps=FPS), tmp_path).frames, clip)


def test_folders_that_are_no_clip_are_refused(tmp_path: Path) -> None:
    write_frames(tmp_path / "frames", frames(3))
    with pytest.raises(ValueError, match="fps must be given for a folder of frames, got none"):
        open_video(AnnotatedClip(path="frames"), tmp_path)
    Image.new("RGB", (24, 17)).save(tmp_path / "frames" / "9.png")
    with pytest.raises(ValueError, match="frames must be of one size, got 24x16 and 24x17 in .*9"):
        open_video(AnnotatedClip(path="frames", fps=FPS), tmp_path)
    write_frames(tmp_path / "one", frames(1))
    with pytest.raises(ValueError, match="folder must hold at least 2 frames .* got 1 in"):
        open_video(AnnotatedClip(path="one", fps=FPS), tmp_path)
    (tmp_path / "one" / "1.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match="cannot identify image file"):
        open_video(AnnotatedClip(path="one", fps=FPS), tmp_path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_sample_of_a_shard_is_found_by_its_key(
    mode: str, encoded: dict[str, bytes], tmp_path: Path
) -> None:
    members = {f"{key}.{kind}": data for key, data in encoded.items() for kind in ("mp4",)}
    members |= {"b/c.json": b"{}", "two.mp4": b"1", "two.webm": b"2"}
    shard = write_tar(tmp_path / "shard.tar", members, mode)
    assert is_compressed(shard) == (mode != "w")
    for seed, key in enumerate(encoded):
        assert read_packed(shard, key) == encoded[key]
        video = open_video(AnnotatedClip(path="shard.tar", key=key), tmp_path)
        near = (video.frames.float() - frames(4, seed).float()).abs().mean()
        far = (video.frames.float() - frames(4, 1 - seed).float()).abs().mean()
        assert near < far
    with pytest.raises(FileNotFoundError, match="shard must hold the sample 'x', got none in"):
        read_packed(shard, "x")
    with pytest.raises(ValueError, match="sample 'two' must hold one video, got 2 in"):
        read_packed(shard, "two")
    with pytest.raises(FileNotFoundError, match="shard must be an existing file"):
        read_packed(tmp_path / "none.tar", "a")


def test_places_are_those_of_the_bytes_and_are_read_once(
    encoded: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {f"{key}.mp4": data for key, data in encoded.items()}
    shard = write_tar(tmp_path / "shard.tar", members)
    whole = shard.read_bytes()
    for key, own in shard_places(shard).items():
        ((suffix, (begin, length)),) = own.items()
        assert whole[begin : begin + length] == members[f"{key}.{suffix}"]
    read_packed(shard, "a")
    with monkeypatch.context() as patched:
        patched.setattr(videos, "shard_places", None)
        assert read_packed(shard, "b/c") == encoded["b/c"]
    # A shard that was written anew is read anew.
    write_tar(shard, {"z.mp4": b"new"})
    assert read_packed(shard, "z") == b"new"


def test_a_shard_cut_anywhere_is_refused(encoded: dict[str, bytes], tmp_path: Path) -> None:
    """In the content, in a header, right between two members, before the end's two blocks."""
    whole = write_tar(tmp_path / "whole.tar", {"a.json": b"{}", "b.json": b"{}"}).read_bytes()
    assert [one.key for one in read_shard(tmp_path / "whole.tar")] == ["a", "b"]
    cut = tmp_path / "cut.tar"
    for length in (0, 100, 513, 1024, 1024 + 100, 1536 + 100, 2048, 2048 + 100):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.tar must be a whole tar file"):
            list(read_shard(cut))
        with pytest.raises(ValueError, match="cut.tar must be a whole tar file"):
            shard_places(cut)
    cut.write_bytes(whole[: 2048 + 512])
    assert len(list(read_shard(cut))) == 2
