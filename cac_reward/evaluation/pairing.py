"""Which report is about which annotated clip."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.lines import parse_record, read_lines
from cac_reward.plain import read_record, read_string
from cac_reward.records import ClipRecord


@dataclass(frozen=True)
class Pair:
    """An annotated clip and what was answered on it."""

    clip: AnnotatedClip
    record: ClipRecord


@dataclass(frozen=True)
class Pairing:
    """All pairs in the order of the annotations, and what stayed alone."""

    pairs: tuple[Pair, ...]
    unanswered: tuple[str, ...]
    """Names of annotated clips without a record."""
    unannotated: tuple[str, ...]
    """Paths of records without an annotated clip."""


def pair_up(
    clips: Iterable[AnnotatedClip], records: Mapping[str, ClipRecord], root: Path
) -> Pairing:
    """Find the record of each annotated clip.

    By the clip's name as it stands; or by its file; or by the last part of its path, where no other
    clip and no other record has it: answers made elsewhere come with other folders.

    Args:
        clips: Annotated.
        records: By their path.
        root: Of the clips' relative paths.

    Raises:
        ValueError: If two clips have one name, two clips find one record, or nothing pairs up.
    """
    clips = list(clips)
    by_file = {Path(path).resolve(): path for path in records}
    by_last = _once((Path(path).name, path) for path in records)
    own_last = _once((Path(clip.name).name, clip.name) for clip in clips)
    pairs: dict[str, Pair] = {}
    unanswered: list[str] = []
    seen: set[str] = set()
    for clip in clips:
        if clip.name in seen:
            raise ValueError(f"annotations must name each clip once, got {clip.name} twice")
        seen.add(clip.name)
        found = clip.name if clip.name in records else by_file.get((root / clip.name).resolve())
        last = Path(clip.name).name
        if found is None and own_last.get(last) is not None:
            found = by_last.get(last)
        if found is None:
            unanswered.append(clip.name)
        elif found in pairs:
            raise ValueError(
                f"predictions must have one line for each clip, got {found} for "
                f"{pairs[found].clip.name} and {clip.name}"
            )
        else:
            pairs[found] = Pair(clip, records[found])
    if not pairs:
        raise ValueError(
            f"predictions must be on the annotated clips, got none of {len(clips)} among "
            f"{len(records)}; first annotated {short(next(iter(seen), None))}, first predicted "
            f"{short(next(iter(records), None))}; name the clips' folder with --videos"
        )
    alone = tuple(path for path in records if path not in pairs)
    return Pairing(tuple(pairs.values()), tuple(unanswered), alone)


def read_answers(path: Path) -> dict[str, str]:
    """Answers to the clips' questions, by the clips' names.

    Args:
        path: JSONL, `{"path": ..., "answer": ...}` in each line.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is something else, or a clip is answered twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"answers must be an existing file, got {path}")
    answers: dict[str, str] = {}
    for place, line in read_lines(path):
        try:
            record = read_record("answer", parse_record(line), ("path", "answer"))
            name = read_string("path", record["path"])
            answer = read_string("answer", record["answer"])
        except ValueError as error:
            raise ValueError(f"{path}: {place}: {error}") from error
        if answers.setdefault(name, answer) != answer:
            raise ValueError(f"{path}: {place}: {name} must be answered once, got two answers")
    return answers


def _once(pairs: Iterable[tuple[str, str]]) -> dict[str, str | None]:
    """What each name stands for; None where it stands for several."""
    found: dict[str, str | None] = {}
    for name, value in pairs:
        found[name] = None if name in found else value
    return found
