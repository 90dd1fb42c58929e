"""The benchmark of generators and the count of their memory run at a tiny size."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import generator_performance, memory_estimate

TINY = ["--model", "tiny", "--group", "2", "--rank", "2", "--dtype", "float32"]


def test_every_size_is_measured_beside_its_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--device", "cpu", "--videos", "5x16x16", "5x32x16", "--checkpointing"]
    assert generator_performance.main([*arguments, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "performance.json").read_text(encoding="utf-8"))
    assert [row["videos"] for row in found["rows"]] == ["5x16x16", "5x32x16"]
    for row in found["rows"]:
        assert row["group"] == 2
        assert row["rollout_seconds"] > 0
        assert row["update_seconds"] > 0
        assert row["rollout_peak"] > row["estimated_rollout_peak"] > 0
    small, large = (row["estimated_update_peak"] for row in found["rows"])
    assert small < large
    table = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert "checkpointing True" in table
    assert "| 5x32x16 | 2 |" in table
    assert "| 5x32x16 | 2 |" in capsys.readouterr().out


def test_the_count_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--frames", "5", "--height", "16", "--width", "16"]
    assert memory_estimate.main([*TINY, *size]) == 0
    lines = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines())
    assert float(lines["peak"]) > 0
    assert float(lines["text_encoder"]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generator_performance.main(["--output", str(tmp_path / "none")]) == 1
    assert "--device must be there, got cuda without a GPU" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit, match="--updates must be at least 1, got 0"):
        generator_performance.main([*TINY, "--updates", "0"])
