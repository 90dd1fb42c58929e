"""The process that holds the model, so that its death is not the server's.

Started as `python -m cac_reward.server.judging SETTINGS`. Each message names clips whose frames lie
in the spool; the answer holds a score and a report for each, or an error.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from cac_reward.judge_options import JudgeOptions
from cac_reward.judges.base import JudgeUnreachableError
from cac_reward.report import AnomalyReport
from cac_reward.server.lines import Message, answer_lines, claim_stdout, say
from cac_reward.video import Video

logger = logging.getLogger(__name__)


class _Inspecting(Protocol):
    """A scorer with evidence, such as CaCScorer."""

    def inspect(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[AnomalyReport]: ...


def load_scorer(settings: Message) -> Any:
    """Load the judge of `JudgeOptions`, or call the factory given as 'module:name'.

    Raises:
        ValueError: An option breaks its rule; the factory's name is malformed or it returns
            nothing that can score.
        ImportError: Its module cannot be imported.
        AttributeError: The module has no such name.
    """
    path = settings.pop("scorer")
    if path is None:
        return JudgeOptions(**settings["judge"]).load()
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ValueError(f"scorer must be 'module:name', got {path!r}")
    factory: Any = importlib.import_module(module)
    for part in name.split("."):
        factory = getattr(factory, part)
    scorer = factory()
    if not callable(getattr(scorer, "inspect", None)) and not callable(scorer):
        raise ValueError(
            f"scorer must return an object with inspect(videos, prompts) or a callable "
            f"reward(videos, prompts, fps=...), got {type(scorer).__name__} from {path!r}"
        )
    return scorer


def judge_clips(scorer: Any, clips: Sequence[Message]) -> Message:
    """Score clips of any sizes; one error for all of them where the scorer raises one."""
    try:
        videos = [_map_frames(clip) for clip in clips]
        prompts = [clip["prompt"] for clip in clips]
        if callable(getattr(scorer, "inspect", None)):
            return {"answers": _inspect(scorer, videos, prompts)}
        return {"answers": _reward(scorer, videos, prompts)}
    except (ValueError, RuntimeError) as error:
        logger.exception("the scorer failed on %d clips", len(clips))
        return {"error": f"{type(error).__name__}: {str(error)[:1000]}"}


def _inspect(scorer: _Inspecting, videos: list[Video], prompts: list[str]) -> list[Message]:
    reports = scorer.inspect(videos, prompts)
    if len(reports) != len(videos):
        raise ValueError(f"scorer must return {len(videos)} reports, got {len(reports)}")
    return [
        {"score": report.score, "error": report.error, "report": report.to_dict()}
        for report in reports
    ]


def _reward(scorer: Any, videos: list[Video], prompts: list[str]) -> list[Message]:
    """Call a plain reward once for each size and rate among the clips."""
    groups: dict[object, list[int]] = defaultdict(list)
    for row, video in enumerate(videos):
        groups[video.frames.shape, video.fps].append(row)
    answers: list[Message] = [{} for _ in videos]
    for rows in groups.values():
        batch = torch.stack([videos[row].to_float() for row in rows])
        result = scorer(batch, [prompts[row] for row in rows], fps=videos[rows[0]].fps)
        scores = result["score"] if isinstance(result, dict) else result
        for row, score in zip(rows, torch.as_tensor(scores).tolist(), strict=True):
            finite = math.isfinite(score)
            error = None if finite else f"the reward returned {score} for this clip"
            answers[row] = {"score": score if finite else None, "error": error, "report": None}
    return answers


def _map_frames(clip: Message) -> Video:
    """The clip's frames, mapped from the spool without a copy."""
    count = math.prod(clip["shape"])
    frames = torch.from_file(clip["frames"], shared=False, size=count, dtype=torch.uint8)
    return Video(frames.view(clip["shape"]), clip["fps"], clip["name"])


def main() -> None:
    """Load the scorer and answer until standard input closes, which means that the server ended."""
    answers = claim_stdout()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    settings = json.loads(sys.argv[1])
    spool = settings.pop("spool")
    try:
        scorer = load_scorer(settings)
    except (ValueError, OSError, ImportError, JudgeUnreachableError) as error:
        logger.error("%s", error)
        sys.exit(2)
    name = getattr(getattr(scorer, "judge", scorer), "name", type(scorer).__name__)
    say(answers, {"ready": True, "judge": str(name)})
    answer_lines(answers, lambda message: judge_clips(scorer, message["clips"]))
    shutil.rmtree(spool, ignore_errors=True)  # The server removes it itself unless it was killed.


if __name__ == "__main__":
    main()
