"""Sound inputs made unsound: bytes, texts and trees of JSON, as accidents and attackers do it."""

from __future__ import annotations

import copy
import random
import struct
from typing import Any

NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 10**9, 2**31 - 1, 2**31, 2**32 - 1)
TEXTS = (
    *("\ud800", "\x00", "\ufeff", "\u2028", "\n", "\r\n", "\t", " ", "'", '"', "\\", "\\u0000"),
    *("\\ud83d", "NaN", "Infinity", "-Infinity", "1e999", "-0", "9" * 400, "9" * 5000, "0x1"),
    *("[", "]", "{", "}", ",", ":", "[" * 3000, '{"a":' * 3000, "null", "true", "[]", "{}"),
    *("<tool_call>", "</tool_call>", "Verdict: clean", "Verdict: anomalous", "<|im_end|>"),
    *("&lt;", "<!DOCTYPE a [<!ENTITY b 'c'>]>", "&b;", "]]>", "<a>", "\U0001f600", "\u0661"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, 5e-324, 1e-9, 10**9, 10**400, -(10**400)),
    *(float("nan"), float("inf"), "", " ", "x", "x" * 3000, "\ud800", "\x00", "1", "nan", [], {}),
    *([[]], [None], {"a": 1}, [0, 0], [1, 0], [0, 1], [0.5, 0.5, 0.5, 0.5], [[0, 1]] * 300),
)
DEPTH = 60


def damage_bytes(chance: random.Random, data: bytes) -> bytes:
    """Change, cut, repeat and overwrite a few places."""
    damaged = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        place = chance.randrange(len(damaged) + 1)
        length = min(chance.choice((1, 2, 4, 16, 200)), len(damaged) - place)
        kind = chance.randrange(7)
        if kind == 0 and length:
            damaged[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            damaged[place : place + length] = chance.randbytes(length)
        elif kind == 2:
            number = struct.pack(">I", chance.choice(NUMBERS))
            little = chance.random() < 0.3
            damaged[place : place + 4] = number[::-1] if little else number
        elif kind == 3:
            del damaged[place : place + length]
        elif kind == 4:
            damaged[place:place] = damaged[place : place + length] * chance.choice((1, 3, 50))
        elif kind == 5:
            damaged[place:place] = chance.choice(TEXTS).encode("utf-8", "surrogatepass")
        elif chance.random() < 0.3:
            del damaged[place:]
    return bytes(damaged)


def damage_text(chance: random.Random, text: str) -> str:
    """Change, cut, repeat and insert a few pieces."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        place = chance.randrange(len(text) + 1)
        length = chance.choice((0, 1, 1, 5, 40))
        piece = chance.choice((chance.choice(TEXTS), text[place : place + length] * 2, ""))
        text = text[:place] + piece + text[place + length :]
    return text


def damage_tree(chance: random.Random, tree: Any) -> Any:
    """Replace, drop, add and move a few values."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = _places(tree)
        if not places:
            return _value(chance)
        owner, key = chance.choice(places)
        kind = chance.randrange(5)
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[chance.choice(("extra", "", "\ud800", "windows", "type"))] = _value(chance)
        elif kind == 2:
            other, place = chance.choice(places)
            owner[key] = copy.deepcopy(other[place])
        else:
            owner[key] = _value(chance)
    return tree


def _value(chance: random.Random) -> Any:
    if chance.random() < 0.1:
        deep: Any = 0
        for _ in range(DEPTH):
            deep = [deep] if chance.random() < 0.5 else {"a": deep}
        return deep
    return copy.deepcopy(chance.choice(VALUES))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every value of a tree: what holds it and under which key."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        owner = waiting.pop()
        keys = list(owner) if isinstance(owner, dict) else range(len(owner))
        for key in keys:
            found.append((owner, key))
            if isinstance(owner[key], dict | list):
                waiting.append(owner[key])
    return found
