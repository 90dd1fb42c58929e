"""Which answer is about which annotated clip."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.importers.vau_bench import VIDEO_NAME
from cac_reward.data.lines import parse_record, read_lines
from cac_reward.evaluation.predictions import Prediction
from cac_reward.plain import read_record, read_string


@dataclass(frozen=True)
class Pair:
    """An annotated clip and what was answered on it."""

    clip: AnnotatedClip
    prediction: Prediction

    @property
    def length(self) -> tuple[float, int] | None:
        """Frames per second and frames: as judged, else as annotated; None where not known."""
        for fps, num_frames in (
            (self.prediction.fps, self.prediction.num_frames),
            (self.clip.fps, self.clip.num_frames),
        ):
            if fps is not None and num_frames is not None:
                return fps, num_frames
        return None


@dataclass(frozen=True)
class Pairing:
    """All pairs in the order of the annotations, and what stayed alone."""

    pairs: tuple[Pair, ...]
    unanswered: tuple[AnnotatedClip, ...]
    """Annotated clips without a prediction."""
    unannotated: tuple[str, ...]
    """Paths of predictions without an annotated clip."""


def pair_up(
    clips: Iterable[AnnotatedClip], predictions: Mapping[str, Prediction], root: Path
) -> Pairing:
    """Find the prediction of each annotated clip.

    By the clip's name as it stands; or by the name that its data set's list gives it
    (`VIDEO_NAME`); or by its file; or by the last two parts of its path, or the last, where no
    other clip and no other prediction has them: answers made elsewhere come with other folders.

    Args:
        clips: Annotated.
        predictions: By their path.
        root: Of the clips' relative paths.

    Raises:
        ValueError: If two clips have one name, two clips find one prediction, or nothing pairs up.
    """
    clips = list(clips)
    by_file = {Path(path).resolve(): path for path in predictions}
    ends = [
        (
            _once((_end(path, parts), path) for path in predictions),
            _once((_end(clip.name, parts), clip.name) for clip in clips),
            parts,
        )
        for parts in (2, 1)
    ]
    pairs: dict[str, Pair] = {}
    unanswered: list[AnnotatedClip] = []
    seen: set[str] = set()
    for clip in clips:
        if clip.name in seen:
            raise ValueError(f"annotations must name each clip once, got {clip.name} twice")
        seen.add(clip.name)
        named = [one for one in (clip.name, clip.extra.get(VIDEO_NAME)) if one in predictions]
        found = named[0] if named else by_file.get((root / clip.name).resolve())
        for theirs, ours, parts in ends:
            end = _end(clip.name, parts)
            if found is None and ours.get(end) is not None:
                found = theirs.get(end)
        if found is None:
            unanswered.append(clip)
        elif found in pairs:
            raise ValueError(
                f"predictions must have one line for each clip, got {found} for "
                f"{pairs[found].clip.name} and {clip.name}"
            )
        else:
            pairs[found] = Pair(clip, predictions[found])
    if not pairs:
        raise ValueError(
            f"predictions must be on the annotated clips, got none of {len(clips)} among "
            f"{len(predictions)}; first annotated {short(next(iter(seen), None))}, first predicted "
            f"{short(next(iter(predictions), None))}; name the clips' folder with --videos"
        )
    alone = tuple(path for path in predictions if path not in pairs)
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


def _end(path: str, parts: int) -> str:
    """The last parts of a path; all of a shorter one."""
    return "/".join(Path(path).parts[-parts:])


def _once(pairs: Iterable[tuple[str, str]]) -> dict[str, str | None]:
    """What each name stands for; None where it stands for several."""
    found: dict[str, str | None] = {}
    for name, value in pairs:
        found[name] = None if name in found else value
    return found
