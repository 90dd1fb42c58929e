"""A file is there whole or as it was."""

import os
from pathlib import Path

import pytest

from diffusion_rl.whole_files import write_whole


def test_text_and_bytes_come_back_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "one.txt"
    assert write_whole(path, "caf\u00e9\r\n") == path
    assert path.read_bytes() == "caf\u00e9\r\n".encode()
    write_whole(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_cannot_be_written_leaves_what_was_there(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_whole(tmp_path / "one.txt", "before")

    def full(*given: object) -> None:
        assert path.read_text() == "before"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
