"""The agreement of gradients, against vectors whose common part is known."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks.gradient_agreement import agreement, main

SMALL = ["rollout.prompts_per_update=1", "rollout.videos_per_prompt=4"]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6])
def test_the_share_that_gradients_have_in_common_is_found(share: float) -> None:
    source = torch.Generator().manual_seed(0)
    common, *noise = torch.randn((41, 100_000), generator=source)
    found = [share**0.5 * common + (1 - share) ** 0.5 * one for one in noise]
    mean, low, high = agreement(found)
    assert mean == pytest.approx(share, abs=0.01)
    assert low <= mean <= high
    # Averages of n such gradients agree as the module says.
    means = [sum(found[start : start + 4]) / 4 for start in range(0, 40, 4)]
    assert agreement(means)[0] == pytest.approx(4 * share / (1 + 3 * share), abs=0.01)


def test_two_rows_agree_by_what_both_have_in_common() -> None:
    source = torch.Generator().manual_seed(0)
    common, *noise = torch.randn((41, 100_000), generator=source)
    good = [0.6 * common + 0.8 * one for one in noise[:20]]
    bad = [0.2 * common + 0.96**0.5 * one for one in noise[20:]]
    assert agreement(good, bad)[0] == pytest.approx(0.6 * 0.2, abs=0.01)
    # What two rows make of the same videos does not count: here it is all that they share.
    assert agreement(noise[:20], noise[:20])[0] == pytest.approx(0, abs=0.01)


def test_rows_are_measured_with_both_outcomes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["--rows", "grpo", "nft", "--updates", "3", "--implied"]
    main([*rows, "--output", str(tmp_path), "--set", *SMALL])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [line.split(" | ")[0] for line in lines]
    assert names[:4] == ["| row", "| grpo", "| grpo, implied", "| nft"]
    pairs = ["| grpo; grpo, implied", "| grpo; nft", "| grpo, implied; nft"]
    assert names[4:9] == ["| rows", *pairs, "| grpo: step"]
    assert sorted(set(names[9:]) & {f"| {at}" for at in range(7)}) == names[9:]
    counts = []
    for line in lines[9:]:
        count, told, factor = line.strip("| ").split(" | ")[1:]
        counts.append(int(count))
        assert 0 <= float(told) <= 1
        assert math.isfinite(float(factor))
    assert sum(counts) == 3 * 3


def test_two_gradients_are_too_few(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--updates", "2"])
    assert "--updates must be at least 3, got 2" in capsys.readouterr().err
