"""The baseline that learns nothing: draw several videos of a prompt and keep the best.

What a fine-tuned generator is worth is what it adds to this, at the cost of n videos each time.
Axes: F frames, C, H, W.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_rl.rewards import Reward, judge_videos
from diffusion_rl.tracking import write_video
from diffusion_rl.whole_files import write_whole

SCORES_FILE, SUMMARY_FILE = "scores.jsonl", "best_of_n.json"

Sampler = Callable[[Sequence[str], Sequence[int]], Tensor]
"""(prompts, seeds) of equal number -> videos [B F C H W] in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class BestOfNSettings:
    """What is drawn, and where it goes."""

    n: int
    """Videos of each prompt, at least 1."""
    seed: int = 0
    """Of the first video of the first prompt, at least 0; the others follow."""
    missing_limit: float = 0.5
    """Share of a prompt's videos that a reward may leave unjudged, in [0, 1)."""
    fps: float
    """Frames per second of the videos, above 0."""
    output: str
    """Folder of videos and scores."""
    format: str = "mp4"
    """mp4 or webp."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


def expected_best(scores: Sequence[float]) -> list[float]:
    """Expect the best of k videos, for every k, from all that were drawn of a prompt.

    best(k) = sum over i of  C(i - 1, k - 1) / C(n, k) * i-th smallest of n scores

    which is the mean over all subsets of k videos of their best, so it is unbiased; picking the
    best of the first k would be, too, but noisier.

    Args:
        scores: n of one prompt; NaN was not judged and takes no part.

    Returns:
        best(1) to best(n), NaN beyond the number of judged scores.

    Source:
        The estimator of pass@k (arXiv:2107.03374, eq. 1) for a maximum.

    Example:
        >>> expected_best([3.0, 1.0, 2.0])
        [2.0, 2.6666666666666665, 3.0]
    """
    judged = sorted(score for score in scores if not math.isnan(score))
    n = len(judged)
    found = [
        sum(math.comb(place, k - 1) * score for place, score in enumerate(judged)) / math.comb(n, k)
        for k in range(1, n + 1)
    ]
    return found + [math.nan] * (len(scores) - n)


def best_of_n(
    sample: Sampler,
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    settings: BestOfNSettings,
) -> Iterator[dict[str, Any]]:
    """Yield one record for each prompt, the best video written before it; done ones are skipped.

    A record is a line of scores.jsonl: number and text of the prompt, seeds, the weighted score of
    each video and every reward's own (None where not judged), the place of the best, and its file.

    Args:
        sample: Draws videos.
        rewards: At least one of weight other than 0.
        prompts: At least one.
        settings: Everything else.

    Raises:
        ValueError: The output folder holds scores of other prompts, seeds or n.
        RuntimeError: A reward raised, or left too many videos unjudged.
    """
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    done = read_scores(folder / SCORES_FILE)
    _write_lines(folder / SCORES_FILE, done)  # Without a line that a crash cut off.
    for number, prompt in enumerate(prompts):
        seeds = [settings.seed + number * settings.n + place for place in range(settings.n)]
        if number < len(done):
            _check_same(done[number], prompt, seeds, folder)
            yield done[number]
            continue
        videos = sample([prompt] * settings.n, seeds)
        judged = judge_videos(
            rewards,
            videos,
            [prompt] * settings.n,
            fps=settings.fps,
            missing_limit=settings.missing_limit,
        )
        best, file = _best(judged.score), None
        if best is not None:
            file = f"{number:04d}.{settings.format}"
            write_video(folder / file, videos[best], settings.fps)
        record = {
            "number": number,
            "prompt": prompt,
            "seeds": seeds,
            "scores": _plain(judged.score),
            "rewards": {name: _plain(one.score) for name, one in judged.judgements.items()},
            "best": best,
            "file": file,
        }
        with (folder / SCORES_FILE).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
        yield record


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean over prompts of the expected best of k, and of each reward at that choice.

    Returns:
        `prompts`, `n`, `unjudged_videos`; `expected_best`, for k = 1 to n the mean over the prompts
        with k judged videos, None where there is none; `prompts_at_k`, how many those are;
        `rewards`, of each its mean over all videos and over the best ones.
    """
    n = len(records[0]["scores"])
    curves = torch.tensor([expected_best(_floats(one["scores"])) for one in records])
    names = list(records[0]["rewards"])
    chosen = [one for one in records if one["best"] is not None]
    return {
        "prompts": len(records),
        "n": n,
        "unjudged_videos": sum(score is None for one in records for score in one["scores"]),
        "expected_best": _plain(curves.nanmean(dim=0)),
        "prompts_at_k": (~curves.isnan()).sum(dim=0).tolist(),
        "rewards": {
            name: {
                "all": _mean([score for one in records for score in one["rewards"][name]]),
                "best": _mean([one["rewards"][name][one["best"]] for one in chosen]),
            }
            for name in names
        },
    }


def write_summary(folder: str | Path, records: Sequence[dict[str, Any]]) -> Path:
    """Write summary and records as best_of_n.json, whole or not at all."""
    content = {**summarise(records), "videos": list(records)}
    text = json.dumps(content, indent=1, allow_nan=False)
    return write_whole(Path(folder) / SUMMARY_FILE, text)


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The records of a scores.jsonl; a last line that a crash cut off is left out.

    Raises:
        ValueError: Another line is no JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path} must hold one JSON object a line, got {line[:80]!r} in line {number}"
            ) from error
    return found


def _check_same(record: dict[str, Any], prompt: str, seeds: list[int], folder: Path) -> None:
    if (record["prompt"], record["seeds"]) != (prompt, seeds):
        raise ValueError(
            f"output must be a new folder or hold scores of the same prompts, seed and n, got "
            f"{folder} with prompt {record['prompt']!r} and seeds from {record['seeds'][0]}; "
            "choose another output"
        )


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(one) + "\n" for one in records))


def _best(scores: Tensor) -> int | None:
    """Place of the highest judged score; None where there is none."""
    judged = ~scores.isnan()
    return int(scores.nan_to_num(nan=-math.inf).argmax()) if bool(judged.any()) else None


def _plain(scores: Tensor) -> list[float | None]:
    return [None if math.isnan(score) else score for score in scores.tolist()]


def _floats(scores: Sequence[float | None]) -> list[float]:
    return [math.nan if score is None else score for score in scores]


def _mean(scores: Sequence[float | None]) -> float | None:
    judged = [score for score in scores if score is not None]
    return sum(judged) / len(judged) if judged else None
