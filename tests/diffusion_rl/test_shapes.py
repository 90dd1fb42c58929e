"""Axes are checked by name."""

from __future__ import annotations

import pytest
import torch

from diffusion_rl.shapes import check_shape


def test_sizes_are_returned_by_letter():
    assert check_shape("videos", torch.zeros(2, 3, 4), "B F C", B=2) == {"B": 2, "F": 3, "C": 4}
    assert check_shape("latent", torch.zeros(2, 3, 4), "B ...") == {"B": 2}


@pytest.mark.parametrize(
    ("shape", "axes", "known", "message"),
    [
        ((2, 3), "B", {}, r"x has shape \(2, 3\), but axes 'B' need 1 axes, not 2"),
        ((2,), "B K", {}, r"x has shape \(2,\), but axes 'B K' need 2 axes, not 1"),
        ((), "B ...", {}, r"x has shape \(\), but axes 'B ...' need 1 axes, not 0"),
        ((2, 4), "B K", {"K": 3}, r"x has shape \(2, 4\), but axes 'B K' need K=3, not 4"),
    ],
)
def test_another_shape_is_refused(shape, axes, known, message):
    with pytest.raises(ValueError, match=message):
        check_shape("x", torch.zeros(shape), axes, **known)
