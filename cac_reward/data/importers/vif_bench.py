"""ViF-Bench (Skyra): the index that its evaluation reads, folders of frames by generator.

A JSON object: for each generator, and for 'real', the folders of its clips' frames. A clip is
called by the parts of its folder behind 'test_normalized', or by the last two; a generated clip and
the real one that it is paired with share the last. Nothing is marked inside the clips.

Source: https://github.com/JoeLeelyf/Skyra (arXiv:2512.15693), eval/utils/ViFBench.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.importers.base import (
    ImportSettings,
    Outcome,
    check_utf8,
    in_column,
    json_entries,
    read_entries,
)
from cac_reward.plain import read_sequence, read_string
from cac_reward.report import VERDICTS

REAL = "real"
_ROOT = "test_normalized"
_LEFT_OUT = "full-videos"
"""Part of the folders of whole videos, which the benchmark does not use."""


def read_vif_bench(path: Path, settings: ImportSettings) -> Iterator[Outcome]:
    """Every clip of the index, generator by generator.

    Raises:
        ValueError: If the file is no JSON object of lists, with the line.
    """
    for line, generator, folders in json_entries(path):
        try:
            listed = read_sequence(f"folders of {generator!r}", folders)
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from error
        entries = ((line, (generator, one)) for one in listed if _LEFT_OUT not in str(one))
        yield from read_entries(path, entries, lambda entry: _clip(*entry, settings))


def _clip(generator: str, folder: object, settings: ImportSettings) -> AnnotatedClip:
    with in_column(f"{generator!r}"):
        check_utf8(generator)
        check_utf8(str(folder))
        parts = PurePosixPath(read_string("folder", folder)).parts
        if len(parts) < 2:
            raise ValueError(f"folder must be below the one of its generator, got {folder!r}")
        start = parts.index(_ROOT) + 1 if _ROOT in parts[:-1] else len(parts) - 2
        name = "/".join(parts[start:])
        fields = settings.clip(name, f"{name}.mp4")
    return AnnotatedClip(
        **fields,
        source=f"vif_bench/{generator}",
        source_video=parts[-1],
        split="test" if settings.split is None else settings.split,
        verdict=VERDICTS[generator.lower() != REAL],
    )
