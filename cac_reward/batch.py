"""Judging thousands of clips: which files, with which prompts, in which share of the work.

Files are decoded ahead in a thread while the judge looks at the ones before. A file that cannot be
read or judged becomes a record with the reason, and the others go on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Protocol

from cac_reward.plain import read_table, read_text
from cac_reward.records import ClipRecord
from cac_reward.report import AnomalyReport
from cac_reward.video import Video

SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"),
    *(".mpg", ".mpeg", ".ts", ".ogv", ".flv", ".asf", ".3gp"),
)
"""What counts as a clip in a folder; a file named by itself may be called anything."""

PROMPT_FORMATS = (".txt", ".json", ".jsonl", ".csv")


class Inspector(Protocol):
    """What judges: `CaCScorer`, or anything with its `inspect`."""

    def inspect(
        self, videos: Sequence[Video], prompts: Sequence[str] | None = None
    ) -> list[AnomalyReport]: ...


@dataclass(frozen=True)
class Clip:
    """A file to judge."""

    path: str
    """Where it is."""
    name: str
    """What prompts and shards know it by: its path within the folder that was given."""
    prompt: str = ""
    """What it was generated from."""


def find_clips(paths: Sequence[Path]) -> list[Clip]:
    """List the clips among files and folders, in a fixed order and each once.

    Args:
        paths: Files are taken as they are; folders are searched with all their subfolders for
            names that end in one of `SUFFIXES` and do not begin with a dot.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a folder holds no clip, or two clips have one name.
    """
    clips: dict[str, Clip] = {}
    for path in paths:
        if path.is_dir():
            found = sorted(
                one
                for one in path.rglob("*")
                if one.suffix.lower() in SUFFIXES and one.is_file() and not _is_hidden(one, path)
            )
            if not found:
                raise ValueError(
                    f"folder must hold video files ({', '.join(SUFFIXES)}), got {path}"
                )
            named = [(one, one.relative_to(path).as_posix()) for one in found]
        elif path.exists():
            named = [(path, path.as_posix())]
        else:
            raise FileNotFoundError(f"clip must be an existing file or folder, got {path}")
        for one, name in named:
            clip = clips.setdefault(name, Clip(one.as_posix(), name))
            if Path(clip.path).resolve() != one.resolve():
                raise ValueError(
                    f"clips must have different names, got {name} in {clip.path} and {one}; "
                    "give the folder above both"
                )
    return list(clips.values())


def read_prompts(path: Path, clips: Sequence[Clip]) -> dict[str, str]:
    """Find the prompt of each clip in a file.

    Args:
        path: One of
            .txt: a prompt per line, in the order of `clips`;
            .json: an object from name to prompt;
            .jsonl: an object with "path" and "prompt" per line;
            .csv: a table with the columns path and prompt.
            Names are those of the clips (or the last part, where only one clip has it).
        clips: All clips, of all shards.

    Returns:
        Prompt by name of clip; prompts of no clip are left out.

    Raises:
        ValueError: If the file has another form, or a clip has no prompt in it.
    """
    text = read_text("prompts", path)
    if path.suffix == ".txt":
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if len(lines) != len(clips):
            raise ValueError(
                f"prompts in {path} must be one line for each of {len(clips)} clips, "
                f"got {len(lines)}; name the clips in a .csv or .json if they are others"
            )
        return {clip.name: line for clip, line in zip(clips, lines, strict=True)}
    given = _named_prompts(path, text)
    last_parts: dict[str, list[str]] = {}
    for clip in clips:
        last_parts.setdefault(Path(clip.name).name, []).append(clip.name)
    prompts = {}
    for name, prompt in given.items():
        names = last_parts.get(Path(name).name, [])
        if name in names:
            prompts[name] = prompt
        elif len(names) == 1:
            prompts.setdefault(names[0], prompt)
    missing = [clip.name for clip in clips if clip.name not in prompts]
    if missing:
        raise ValueError(
            f"prompts in {path} must name every clip, got none for {missing[0]!r} "
            f"({len(missing)} of {len(clips)} clips)"
        )
    return prompts


def in_shard(name: str, shard: int, num_shards: int) -> bool:
    """Whether a clip belongs to a share of the work.

    It depends on the clip's name alone, so machines agree without talking, whatever else comes
    into the folder meanwhile.

    Args:
        name: of the clip.
        shard: 1 to num_shards.
        num_shards: at least 1.
    """
    if not 1 <= shard <= num_shards:
        raise ValueError(
            f"shard must be within 1/{num_shards} to {num_shards}/{num_shards}, got "
            f"{shard}/{num_shards}"
        )
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % num_shards == shard - 1


def judge_clips(
    clips: Sequence[Clip], scorer: Inspector, *, fps: float | None = None, batch: int = 4
) -> Iterator[ClipRecord]:
    """Judge clips, and yield the record of each as soon as its batch is done.

    Args:
        clips: In the order of the records.
        scorer: Who judges.
        fps: Frames per second to believe instead of the files' own.
        batch: Clips judged together; twice as many are in memory.

    Raises:
        ValueError: If `batch` is below 1.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    starts = range(0, len(clips), batch)
    executor = ThreadPoolExecutor(1, thread_name_prefix="decode")
    try:
        ahead: Future[list[Video | str]] | None = None
        for start in starts:
            rows = clips[start : start + batch]
            opened = (ahead or executor.submit(_open_all, rows, fps)).result()
            following = clips[start + batch : start + 2 * batch]
            ahead = executor.submit(_open_all, following, fps) if following else None
            yield from _judge(rows, opened, scorer)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _named_prompts(path: Path, text: str) -> dict[str, str]:
    """Prompts by the name that the file gives."""
    if path.suffix not in PROMPT_FORMATS:
        raise ValueError(f"prompts must be in one of {PROMPT_FORMATS}, got {path}")
    pairs: list[tuple[object, object]]
    if path.suffix == ".csv":
        rows = read_table(f"prompts in {path}", text, ("path", "prompt"))
        pairs = [(row["path"], row["prompt"]) for _, row in rows]
    else:
        try:
            if path.suffix == ".json":
                pairs = list(json.loads(text).items())
            else:
                lines = [json.loads(line) for line in text.split("\n") if line.strip()]
                pairs = [(line["path"], line["prompt"]) for line in lines]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"prompts in {path} must be JSON that gives each path its prompt, got "
                f"{repr(error)[:200]}"
            ) from error
    prompts: dict[str, str] = {}
    for name, prompt in pairs:
        if not isinstance(name, str) or not isinstance(prompt, str):
            raise ValueError(
                f"prompts in {path} must be texts, got {short(prompt)} for {short(name)}"
            )
        if prompts.setdefault(name.removeprefix("./"), prompt) != prompt:
            raise ValueError(
                f"prompts in {path} must give one prompt each, got two for {short(name)}"
            )
    return prompts


def _open_all(clips: Sequence[Clip], fps: float | None) -> list[Video | str]:
    """Each clip's frames, or why they cannot be had."""
    opened: list[Video | str] = []
    for clip in clips:
        try:
            opened.append(Video.decode(clip.path, fps=fps))
        except (ValueError, OSError) as error:
            opened.append(str(error))
    return opened


def _judge(
    clips: Sequence[Clip], opened: Sequence[Video | str], scorer: Inspector
) -> Iterator[ClipRecord]:
    """Records of one batch; if the batch is refused, each clip is tried by itself."""
    readable = [
        (clip, video) for clip, video in zip(clips, opened, strict=True) if isinstance(video, Video)
    ]
    outcomes: dict[str, AnomalyReport | str] = {}
    try:
        if readable:
            reports = scorer.inspect(
                [video for _, video in readable], [clip.prompt for clip, _ in readable]
            )
            outcomes = {clip.path: one for (clip, _), one in zip(readable, reports, strict=True)}
    except ValueError as error:
        if len(readable) == 1:
            outcomes = {readable[0][0].path: str(error)}
        else:
            for clip, frames in readable:
                (alone,) = _judge([clip], [frames], scorer)
                outcomes[clip.path] = alone.report or str(alone.error)
    for clip, video in zip(clips, opened, strict=True):
        outcome = outcomes[clip.path] if isinstance(video, Video) else video
        if isinstance(video, Video) and isinstance(outcome, AnomalyReport):
            yield ClipRecord(path=clip.path, width=video.width, height=video.height, report=outcome)
        else:
            yield ClipRecord(path=clip.path, error=str(outcome))
