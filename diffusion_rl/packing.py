"""Nested Python values with tensors in them as a safetensors file and a JSON text, and back.

Neither can hold code, unlike a pickle. In the JSON a tensor stands as {"$tensor": NAME}, a dict
whose keys are no text as {"$pairs": [[KEY, VALUE], ...]} and a number that JSON does not know as
{"$float": "nan"}; a tuple comes back as a list.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

_MARKS = ("$tensor", "$pairs", "$float")


def pack(value: Any) -> tuple[bytes, bytes]:
    """A safetensors file and a JSON text that hold `value`.

    Raises:
        TypeError: something in it is not a dict, list, tuple, tensor, text, number, bool or None.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(value, "", tensors)
    return save(tensors), json.dumps(tree, allow_nan=False).encode()


def unpack(tensors: bytes, text: bytes) -> Any:
    """What `pack` was given, tuples as lists and tensors on the CPU."""
    return _decode(json.loads(text), load(tensors))


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, torch.nn.Parameter):
            raise TypeError(f"{place} must be a plain tensor, got {type(value).__name__}")
        place = place.removeprefix("/")
        assert place not in tensors, place
        # A copy: safetensors refuses tensors that share their memory.
        tensors[place] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": place}
    if isinstance(value, dict):
        pairs = [[key, _encode(one, f"{place}/{key}", tensors)] for key, one in value.items()]
        plain = all(isinstance(key, str) and key not in _MARKS for key in value)
        return dict(pairs) if plain else {"$pairs": pairs}
    if isinstance(value, list | tuple):
        return [_encode(one, f"{place}/{index}", tensors) for index, one in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{place} must be plain data or a tensor, got {type(value).__name__}")


def _decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decode(one, tensors) for one in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$pairs" in tree:
        return {key: _decode(one, tensors) for key, one in tree["$pairs"]}
    if "$float" in tree:
        return float(tree["$float"])
    return {key: _decode(one, tensors) for key, one in tree.items()}
