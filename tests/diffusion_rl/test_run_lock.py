"""One writer for a folder, however the one before it ended."""

import errno
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from diffusion_rl.run_lock import LOCK_FILE, release_lock, take_lock
from tests.several import run_on


def refused(folder: Path) -> str:
    """What another process is told that wants the folder too."""

    def take() -> str:
        with pytest.raises(ValueError, match="output must be a folder that no other") as raised:
            take_lock(folder)
        return str(raised.value)

    (said,) = run_on(1, take)
    assert isinstance(said, str), said
    return said


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(
        ValueError, match="must be on a file system with locks, got .*run: Function"
    ):
        take_lock(tmp_path / "run")
    monkeypatch.undo()
    take_lock(tmp_path / "run")
    release_lock(tmp_path / "run")


def test_the_second_process_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    take_lock(folder)
    take_lock(folder)  # Its own.
    said = refused(folder)
    assert f"process {os.getpid()} on {socket.gethostname()} (since 2" in said
    assert "wait for it, stop it, or choose another output" in said
    held = json.loads((folder / LOCK_FILE).read_text())
    assert (held["pid"], held["host"]) == (os.getpid(), socket.gethostname())
    release_lock(folder)
    assert not (folder / LOCK_FILE).exists()
    release_lock(folder)
    assert run_on(1, lambda: take_lock(folder)) == [None]


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    def killed() -> None:
        take_lock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_on(1, killed) == [-signal.SIGKILL]
    assert (tmp_path / LOCK_FILE).is_file()
    take_lock(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    refused(tmp_path)
    release_lock(tmp_path)


def test_a_child_does_not_keep_the_lock_of_a_killed_parent(tmp_path: Path) -> None:
    """As a data loader or a reward in a process of its own might."""

    parent = os.fork()
    if parent == 0:
        take_lock(tmp_path)
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        (tmp_path / "child").write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(parent, 0)[1] == signal.SIGKILL
    child = int((tmp_path / "child").read_text())
    take_lock(tmp_path)
    os.kill(child, signal.SIGKILL)  # It was there all the time.
    release_lock(tmp_path)


def test_a_lock_of_another_host_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "name": "process 1 on elsewhere"}))
    with pytest.raises(ValueError, match=f"process 1 on elsewhere was .* delete {path}"):
        take_lock(tmp_path)
    path.unlink()
    take_lock(tmp_path)
    release_lock(tmp_path)


def test_a_lock_file_that_was_cut_off_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text('{"pid": 1, "ho')
    take_lock(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    release_lock(tmp_path)


def test_a_folder_that_was_put_aside_is_another_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    take_lock(folder)
    folder.rename(tmp_path / "aside")
    take_lock(folder)
    refused(folder)
    release_lock(folder)
    assert not (folder / LOCK_FILE).exists()
