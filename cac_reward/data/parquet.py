"""Annotations as a parquet file, the form in which HF datasets keeps and streams them.

Columns are the fields of `AnnotatedClip`, nested as in its JSON; what is not known is null. `extra`
is a list of names and values, for datasets knows no column of free keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.plain import read_record, read_sequence, read_string
from cac_reward.whole_files import whole_file

ROWS_AT_A_TIME = 1000
"""Rows of one group: what a reader and a writer hold in memory."""

_WINDOW = pa.list_(pa.float64())
_BOX = pa.struct({"time": pa.float64(), "box": pa.list_(pa.float64())})
_FINDING = pa.struct(
    {
        "type": pa.string(),
        "window": _WINDOW,
        "boxes": pa.list_(_BOX),
        "severity": pa.int64(),
        "why": pa.string(),
    }
)
_TEXTS = (
    *("description", "question", "answer", "reasoning", "first_answer", "reflection"),
    *("path", "key", "source", "source_video", "split", "prompt", "verdict", "category"),
)
SCHEMA = pa.schema(
    {
        "schema_version": pa.int64(),
        **dict.fromkeys(_TEXTS, pa.string()),
        **dict.fromkeys(("fps", "duration_seconds"), pa.float64()),
        **dict.fromkeys(("width", "height"), pa.int64()),
        "findings": pa.list_(_FINDING),
        "captions": pa.list_(pa.struct({"window": _WINDOW, "text": pa.string()})),
        "options": pa.list_(pa.string()),
        "extra": pa.list_(pa.struct({"name": pa.string(), "value": pa.string()})),
    }
)


@contextmanager
def parquet_writer(path: str | os.PathLike[str]) -> Iterator[Callable[[AnnotatedClip], None]]:
    """What adds a clip to a file, which appears when the context is left without an error."""
    waiting: list[dict[str, Any]] = []
    with (
        whole_file(path, "wb") as opened,
        pq.ParquetWriter(opened, SCHEMA, compression="zstd") as table,
    ):

        def flush() -> None:
            table.write_table(pa.Table.from_pylist(waiting, schema=SCHEMA))
            waiting.clear()

        def write(clip: AnnotatedClip) -> None:
            plain = clip.to_dict()
            if clip.extra:
                plain["extra"] = [
                    {"name": one, "value": value} for one, value in clip.extra.items()
                ]
            waiting.append(plain)
            if len(waiting) == ROWS_AT_A_TIME:
                flush()

        yield write
        if waiting:
            flush()


def read_parquet(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place ("row 3") and plain values of every row; `from_row` makes them an annotation's.

    Raises:
        ValueError: If it is no parquet file.
    """
    with Path(path).open("rb") as opened:
        try:
            table = pq.ParquetFile(opened)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} must be a parquet file, got one of another kind") from error
        number = 0
        for batch in table.iter_batches(batch_size=ROWS_AT_A_TIME):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row


def from_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the plain values that `AnnotatedClip.from_dict` reads.

    Raises:
        ValueError: If `extra` is not a list of names and values.
    """
    extra = {}
    for one in read_sequence("extra", row.get("extra") or []):
        pair = read_record("entry of extra", one, ("name", "value"))
        extra[read_string("name in extra", pair["name"])] = pair["value"]
    return {**row, "extra": extra or None}
