"""A file is there whole or not at all."""

from pathlib import Path

import pytest

from cac_reward.whole_files import whole_file


def test_the_name_appears_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    with whole_file(path) as opened:
        opened.write("caf\u00e9\n")
        opened.flush()
        assert [one.name for one in tmp_path.iterdir()] == ["out.txt.partial"]
    assert path.read_bytes() == "caf\u00e9\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    path.write_bytes(b"older")
    with pytest.raises(UnicodeEncodeError), whole_file(path) as opened:
        opened.writelines(["newer", "\ud800"])
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]
