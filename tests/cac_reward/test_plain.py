"""Plain values are what they should be, or are refused by name."""

import math
from pathlib import Path

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


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe", "[" * 100_000, "9" * 5000, "x" * 9000])
def test_what_is_no_json_is_refused_in_few_words(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="a must be JSON, got ") as caught:
        plain.read_json("a", text)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 400


def test_tables_and_texts(tmp_path: Path) -> None:
    assert plain.read_json("a", b'{"b": [1]}') == {"b": [1]}
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfb,c\n1\n\n2,3\n")
    text = plain.read_text("a", tmp_path / "a")
    assert plain.read_table("a", text, ("c",)) == [
        (2, {"b": "1", "c": None}),
        (4, {"b": "2", "c": "3"}),
    ]
    with pytest.raises(ValueError, match=r"a must have the columns c and d, got \['b', 'c'\]"):
        plain.read_table("a", text, ("c", "d"))
    with pytest.raises(ValueError, match="a must have the columns c, got None"):
        plain.read_table("a", "", ("c",))
    with pytest.raises(ValueError, match="a must be CSV, got text of another form: field larger"):
        plain.read_table("a", "c\n" + "x" * 200_000, ("c",))
    (tmp_path / "a").write_bytes(b"caf\xe9")
    with pytest.raises(
        ValueError, match=r"a must be text in UTF-8, got byte 0xe9 at 3 in .*/a; sav"
    ):
        plain.read_text("a", tmp_path / "a")
