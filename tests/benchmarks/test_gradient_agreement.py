"""The agreement of gradients, against vectors whose common part is known."""

import pytest
import torch

from benchmarks.gradient_agreement import agreement, main


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


def test_two_gradients_are_too_few(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--updates", "2"])
    assert "--updates must be at least 3, got 2" in capsys.readouterr().err
