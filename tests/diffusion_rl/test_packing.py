"""Packing: what goes in comes out to the bit, and what could not is refused."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from diffusion_rl.packing import pack, unpack

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(), inner)
        | st.dictionaries(st.integers() | st.sampled_from(["$tensor", "$pairs", "$float"]), inner)
    ),
    max_leaves=10,
)


@given(TREES)
def test_plain_data_comes_back(tree: Any) -> None:
    assert unpack(*pack(tree)) == tree


def test_tensors_come_back_to_the_bit() -> None:
    shared = torch.arange(6.0).view(2, 3)
    given = {
        "state": {0: {"step": torch.tensor(3.0), "mean": shared.T}, 1: {"mean": shared[1]}},
        "dice": [torch.get_rng_state(), torch.tensor([math.nan, -0.0, math.inf])],
        "half": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "empty": torch.zeros(0, 4),
        "numbers": (math.inf, -math.inf, 0.1),
    }
    tensors, text = pack(given)
    found = unpack(tensors, text)
    assert found["state"].keys() == {0, 1}
    pairs = [
        (found["state"][0]["step"], given["state"][0]["step"]),
        (found["state"][0]["mean"], shared.T),
        (found["state"][1]["mean"], shared[1]),
        (found["dice"][0], given["dice"][0]),
        (found["half"], given["half"].data),
        (found["empty"], given["empty"]),
    ]
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert (
        found["dice"][1].view(torch.int32).tolist() == given["dice"][1].view(torch.int32).tolist()
    )
    assert found["numbers"] == [math.inf, -math.inf, 0.1]
    assert "state/0/mean" in load(tensors)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert math.isnan(unpack(*pack([math.nan]))[0])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [object()]}, "/a/0 must be plain data or a tensor, got object"),
        ({"a": torch.ones(1).to_sparse()}, None),
        ([{1, 2}], "/0 must be plain data or a tensor, got set"),
    ],
)
def test_anything_else_is_refused(value: Any, message: str | None) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        pack(value)
