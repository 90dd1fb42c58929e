"""One folder of clips and one judge for all tests of stages; none of them changes either."""

from pathlib import Path

import pytest

from tests.tiny_stage import build_speaking_judge
from tests.training_clips import write_clips


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips, every second one broken."""
    return write_clips(tmp_path_factory.mktemp("clips"), 8)


@pytest.fixture(scope="session")
def clean_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clean ones of eight clips."""
    file = write_clips(tmp_path_factory.mktemp("clean"), 8)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[::2]))
    return file


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny judge of random weights, that can say a verdict or a call in one token."""
    return build_speaking_judge(tmp_path_factory.mktemp("judges") / "judge")
