"""Prompts from text, JSON lines, parquet or a folder of either kind of Hugging Face datasets.

What does not fit is refused with its file and line; nothing is skipped but blank lines.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

PROMPT_COLUMN = "prompt"
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
TEXT = (".txt", ".text", "")
# Which of these a folder written by `save_to_disk` holds says what it is.
DATASET_FILE, DATASETS_FILE = "dataset_info.json", "dataset_dict.json"


def read_prompts(path: str | Path, column: str = PROMPT_COLUMN) -> list[str]:
    """Every prompt of a file or folder, in its order; repeated ones are kept and warned of.

    Args:
        path: `.txt` (UTF-8, one prompt a line; a name without an ending is read so, too),
            `.jsonl` (an object a line), `.parquet`, a folder written by `Dataset.save_to_disk` or a
            downloaded dataset, whose parquet files lie in it or in its `data`.
        column: key or column of the prompt; the others are not read. A text file has none.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: names the file, the line or row, and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        found = _of_dataset(path, column)
    elif not path.is_file():
        raise FileNotFoundError(
            f"prompts must be an existing text, .jsonl or .parquet file or a folder of datasets, "
            f"got {path}"
        )
    elif path.suffix.lower() in JSON_LINES:
        found = _of_json_lines(path, column)
    elif path.suffix.lower() in PARQUET:
        found = _of_parquet(path, column)
    elif path.suffix.lower() in TEXT:
        found = _of_text(path, column)
    else:
        raise ValueError(
            f"prompts must be .txt, .jsonl, .parquet or a folder of datasets, got {path}; save it "
            "as .txt with one prompt a line, or as .jsonl with an object a line"
        )
    prompts = list(found)
    if not prompts:
        raise ValueError(f"prompts must be at least one line of text, got an empty file {path}")
    _warn_of_repeats(prompts, path)
    return prompts


def _of_text(path: Path, column: str) -> Iterator[str]:
    if column != PROMPT_COLUMN:
        raise ValueError(
            f"prompt_column must be left out for a text file, got {column} for {path}; it has no "
            "columns"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(_not_utf8(path, line, error)) from error
    # Not str.splitlines, which also ends a line at a form feed or U+2028 within a prompt.
    lines = enumerate(text.split("\n"), start=1)
    return (_check(line, f"{path}, line {number}") for number, line in lines if line.strip())


def _of_json_lines(path: Path, column: str) -> Iterator[str]:
    # By bytes: a text within JSON may hold what str.splitlines takes for the end of a line.
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(_not_utf8(path, number, error)) from error
        if not line:
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"prompts must be a JSON object a line, got {line:.60} in {place}: {error}"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"prompts must be a JSON object a line, got a {type(row).__name__} in {place}"
            )
        if column not in row:
            raise ValueError(_no_column(column, row, place))
        yield _check(row[column], place)


def _of_parquet(path: Path, column: str) -> Iterator[str]:
    from pyarrow import ArrowInvalid, parquet

    try:
        file = parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise ValueError(_no_column(column, file.schema_arrow.names, str(path)))
        values = file.read([column]).column(column).to_pylist()
    except (ArrowInvalid, OSError, UnicodeDecodeError) as error:
        # ArrowInvalid is a ValueError too, but one that does not name the file.
        raise ValueError(f"prompts must be readable parquet, got {path}: {error}") from error
    return _of_rows(values, path)


def _of_dataset(path: Path, column: str) -> Iterator[str]:
    if (path / DATASETS_FILE).is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise ValueError(
            f"prompts must be one split of a dataset, got {path} with {', '.join(splits)}; name "
            f"the folder of one: {path / splits[0] if splits else path}"
        )
    if not (path / DATASET_FILE).is_file():
        return _of_download(path, column)
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ImportError(
            "prompts from a folder of datasets need datasets; install it with: pip install datasets"
        ) from error
    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"prompts must be a readable dataset, got {path}: {error}") from error
    if column not in dataset.column_names:
        raise ValueError(_no_column(column, dataset.column_names, str(path)))
    return _of_rows(dataset[column], path)


def _of_download(path: Path, column: str) -> Iterator[str]:
    """The parquet files of a dataset's repository, `train-00000-of-00002.parquet` and so on."""
    for folder in (path, path / "data"):
        if files := sorted(one for one in folder.glob("*") if one.suffix.lower() in PARQUET):
            break
    else:
        raise ValueError(
            "prompts must be a folder written by Dataset.save_to_disk or one of parquet files, got "
            f"{path} with neither a {DATASET_FILE} nor parquet in it or its data"
        )
    splits = sorted({one.name.partition("-")[0] for one in files if "-" in one.name})
    if len(splits) > 1:
        raise ValueError(
            f"prompts must be one split of a dataset, got {path} with {', '.join(splits)}; name "
            f"a file of one: {files[0]}"
        )
    for file in files:
        yield from _of_parquet(file, column)


def _of_rows(values: Iterable[Any], path: Path) -> Iterator[str]:
    return (_check(value, f"{path}, row {row}") for row, value in enumerate(values, start=1))


def _check(value: Any, place: str) -> str:
    """The prompt without the space around it."""
    if not isinstance(value, str):
        raise ValueError(f"prompts must be texts, got {value!r:.60} in {place}")
    if not value.strip():
        raise ValueError(f"prompts must not be empty, got {value!r:.60} in {place}")
    wrong = next((sign for sign in value if sign == "\0" or "\ud800" <= sign <= "\udfff"), None)
    if wrong is not None:
        raise ValueError(
            f"prompts must be text, got the sign {wrong!a} in {place}; save the file as UTF-8"
        )
    return value.strip()


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> str:
    return (
        f"prompts must be UTF-8, got {path} with byte 0x{error.object[error.start]:02x} in "
        f"line {line}; save it as UTF-8"
    )


def _no_column(column: str, known: Iterable[str], place: str) -> str:
    return (
        f"prompts must have {column!r}, got {', '.join(map(str, known)) or 'nothing'} in {place}; "
        "name another with prompt_column"
    )


def _warn_of_repeats(prompts: list[str], path: Path) -> None:
    counts = Counter(prompts)
    if len(counts) < len(prompts):
        most, times = counts.most_common(1)[0]
        logger.warning(
            "%d of the %d prompts in %s repeat another, %.60r %d times; what is repeated is drawn "
            "as often",
            *(len(prompts) - len(counts), len(prompts), path, most, times),
        )
