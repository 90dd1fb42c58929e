"""Values of plain JSON read strictly: what is not of the expected kind is refused by its name."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as short


def read_text(name: str, path: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is in another encoding.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} must be text in UTF-8, got byte {error.object[error.start]:#04x} at "
            f"{error.start} in {os.fspath(path)}; save it as UTF-8"
        ) from error


def read_json(name: str, text: str | bytes) -> object:
    """The value of a JSON text.

    Raises:
        ValueError: If it is none, is not in UTF-8, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be JSON, got {short(text)}: {str(error)[:200]}") from error


def read_table(
    name: str, text: str, columns: Sequence[str]
) -> list[tuple[int, dict[str, str | None]]]:
    """The rows of a CSV text, each with the number of its line; a cell that it lacks is None.

    Raises:
        ValueError: If it is no CSV or lacks one of the columns.
    """
    try:
        table = csv.DictReader(io.StringIO(text, newline=""))
        rows = [(table.line_num, row) for row in table]
    except csv.Error as error:
        raise ValueError(f"{name} must be CSV, got text of another form: {error}") from error
    if not set(columns) <= set(table.fieldnames or ()):
        got = table.fieldnames and short(table.fieldnames)
        raise ValueError(f"{name} must have the columns {' and '.join(columns)}, got {got}")
    return rows


def set_float(owner: object, name: str) -> None:
    """Store a checked field as a plain float, whatever kind of number it was."""
    object.__setattr__(owner, name, read_number(name, getattr(owner, name)))


def read_number(name: str, value: object) -> float:
    """A finite float, of any kind of number but a truth value."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise ValueError(f"{name} must be a number, got {short(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def read_integer(name: str, value: object) -> int:
    """An int, of any kind of integer but a truth value."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be an integer, got {short(value)}")
    return int(value)  # type: ignore[call-overload]


def read_numbers(name: str, value: object, count: int) -> list[float]:
    """A list of exactly this many finite numbers."""
    values = read_sequence(name, value)
    if len(values) != count:
        raise ValueError(f"{name} must hold {count} numbers, got {len(values)}")
    return [read_number(name, one) for one in values]


def read_sequence(name: str, value: object) -> Sequence[object]:
    """A list or a tuple."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list, got {short(value)}")
    return value


def read_string(name: str, value: object) -> str:
    """A text."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {short(value)}")
    return value


def read_record(name: str, value: object, keys: Sequence[str] | None) -> Mapping[str, object]:
    """A JSON object with exactly these keys (any keys where None)."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object, got {short(value)}")
    if keys is not None:
        missing = [key for key in keys if key not in value]
        unknown = [key for key in value if key not in keys]
        if missing:
            raise ValueError(f"{name} must have {missing[0]!r}, got only {short(sorted(value))}")
        if unknown:
            raise ValueError(f"{name} must have no key but {sorted(keys)}, got {short(unknown[0])}")
    return value


def read_values(name: str, value: object) -> Mapping[str, object] | None:
    """Finite numbers and texts by name, each of which may be null; null stays None."""
    if value is None:
        return None
    record = read_record(name, value, None)
    for key, one in record.items():
        finite = isinstance(one, float) and math.isfinite(one)
        if not (one is None or isinstance(one, str | int) or finite):
            raise ValueError(
                f"{name} must hold numbers and texts, got {short(one)} for {short(key)}"
            )
    return record


def read_counts(name: str, value: object) -> Mapping[str, int] | None:
    """Whole numbers from 0 on by name; null stays None."""
    if value is None:
        return None
    counts = {key: read_integer(name, one) for key, one in read_record(name, value, None).items()}
    for key, one in counts.items():
        if one < 0:
            raise ValueError(f"{name} must be counts from 0 on, got {one} for {short(key)}")
    return counts


def check_line(name: str, text: object, limit: int) -> None:
    """Refuse what is not one line of clean, encodable text of at most `limit` characters."""
    line = read_string(name, text)
    if len(line) > limit:
        raise ValueError(f"{name} must have at most {limit} characters, got {len(line)}")
    for character in line:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise ValueError(f"{name} must be one printable line, got {line[:200]!r}")
