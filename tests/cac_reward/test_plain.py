"""Plain values are what they should be, or are refused by name."""

import math

import numpy as np
import pytest

from cac_reward import plain


def test_numbers_and_integers_of_any_kind_but_truth_values() -> None:
    assert plain.read_number("a", np.float32(0.5)) == 0.5
    assert plain.read_integer("a", np.int64(3)) == 3
    for read in (plain.read_number, plain.read_integer):
        with pytest.raises(ValueError, match="a must be an? (number|integer)|a must be a number"):
            read("a", True)
    for value in (math.nan, math.inf, 10**400):
        with pytest.raises(ValueError, match="a must be finite"):
            plain.read_number("a", value)
    with pytest.raises(ValueError, match="a must hold 2 numbers, got 3"):
        plain.read_numbers("a", [1, 2, 3], 2)


def test_texts_lists_and_objects() -> None:
    with pytest.raises(ValueError, match="a must be text, got 3"):
        plain.read_string("a", 3)
    with pytest.raises(ValueError, match="a must be a list, got 'xy'"):
        plain.read_sequence("a", "xy")
    with pytest.raises(ValueError, match="a must have 'y', got only"):
        plain.read_record("a", {"x": 1}, ("x", "y"))
    with pytest.raises(ValueError, match="a must have no key but"):
        plain.read_record("a", {"x": 1, "z": 1}, ("x",))
    for text, match in (("a\nb", "one printable line"), ("abc", "at most 2 characters, got 3")):
        with pytest.raises(ValueError, match=match):
            plain.check_line("a", text, 10 if "\n" in text else 2)
