"""Rewards asked, here and elsewhere at once, and added up.

Axes: B videos, F frames, C channels, H height, W width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from diffusion_rl import processes
from diffusion_rl.loading import load_callable
from diffusion_rl.remote_rewards import HttpReward, ProcessReward
from diffusion_rl.reward_contract import (
    RESUME,
    Calls,
    JudgedBatch,
    Judgement,
    Reward,
    RewardFailed,
    RewardFunction,
    RewardRefused,
    RewardSettings,
    ask_once,
    build_function,
    check_videos,
)

__all__ = [
    "AskedRewards",
    "Calls",
    "JudgedBatch",
    "Judgement",
    "Reward",
    "RewardFailed",
    "RewardFunction",
    "RewardRefused",
    "RewardSettings",
    "add_up_rewards",
    "ask_for_team",
    "ask_rewards",
    "build_reward",
    "build_rewards",
    "check_missing",
    "check_videos",
    "gather_answers",
    "gather_judgement",
    "judge_videos",
    "load_callable",
]

logger = logging.getLogger(__name__)

MAX_PAUSE_SECONDS = 60.0


def build_reward(settings: RewardSettings) -> Reward:
    """Make the reward that a configuration describes, wherever it lives.

    A target that takes `videos` and `prompts` is the reward itself; any other is called with the
    options and must return the reward.

    Raises:
        ValueError: The options do not fit the target, or it does not return a callable.
        ImportError: The target does not exist.
        RewardFailed: Its process did not start.
    """
    function: RewardFunction
    end = None
    if settings.where == "here":
        function = build_function(settings)
    else:
        http = settings.where == "http"
        function = HttpReward.from_settings(settings) if http else ProcessReward(settings)
        end = function.close
    return Reward(settings.name, function, settings.weight, settings.calls, end)


def build_rewards(settings: Iterable[RewardSettings], undo: ExitStack) -> list[Reward]:
    """Make several rewards.

    Args:
        settings: of each.
        undo: closes those that are made, also where a later one cannot be.

    Raises:
        ValueError, ImportError, RewardFailed: as `build_reward`.
    """
    built = []
    for one in settings:
        built.append(build_reward(one))
        undo.callback(built[-1].close)
    return built


def judge_videos(
    rewards: Sequence[Reward],
    videos: Tensor,
    prompts: Sequence[str],
    *,
    fps: float,
    missing_limit: float = 0.5,
) -> JudgedBatch:
    """Ask every reward about a batch of videos and add up what they say.

    score = sum over rewards of  weight * score of the reward

    Args:
        rewards: At least one; their names must differ.
        videos: [B F C H W] float in [0, 1].
        prompts: B texts.
        fps: Frames per second of the videos, above 0.
        missing_limit: Largest share of videos in [0, 1) that one reward, or those of weight other
            than 0 together, may leave unjudged.

    Returns:
        The sum, where a NaN of any weighted reward makes the video NaN, and each judgement.

    Raises:
        ValueError: The videos or a reward's answer break the contract.
        RuntimeError: A reward raised, or too many videos are unjudged.
    """
    answers = ask_rewards(rewards, videos, prompts, fps=fps).answers()
    return add_up_rewards(rewards, answers, missing_limit)


def ask_rewards(
    rewards: Sequence[Reward], videos: Tensor, prompts: Sequence[str], *, fps: float
) -> AskedRewards:
    """Send a batch to the rewards elsewhere and do not wait for them.

    Args:
        rewards: At least one; their names must differ.
        videos: [B F C H W] float in [0, 1]; must not change until the answers are in.
        prompts: B texts.
        fps: Frames per second of the videos, above 0.

    Raises:
        ValueError: The videos break the contract.
    """
    names = [reward.name for reward in rewards]
    if not rewards or len(set(names)) != len(names):
        raise ValueError(f"rewards must be at least one and have different names, got {names}")
    check_videos(videos, prompts, fps)
    return AskedRewards(rewards, videos, prompts, fps)


def ask_for_team(
    rewards: Sequence[Reward], videos: Tensor, prompts: Sequence[str], *, fps: float
) -> AskedRewards | None:
    """As `ask_rewards`, once for each team of processes; None where another one asks."""
    return ask_rewards(rewards, videos, prompts, fps=fps) if processes.leads() else None


def gather_answers(
    asked: AskedRewards | None, doing: str, videos: Tensor, rows: Tensor, total: int
) -> dict[str, Judgement]:
    """Wait for what every reward says of the videos of all processes.

    Args:
        asked: from `ask_for_team`.
        doing: said in the error of the processes whose rewards did not fail.
        videos: [B F C H W] of this process.
        rows: [B] long, their places among all.
        total: N, of all.

    Raises:
        ValueError: An answer breaks the contract.
        RuntimeError: A reward raised, here or in another process.
    """
    with processes.together(doing):
        own = asked.answers() if asked is not None else None
    said: dict[str, Judgement] = processes.from_leader(own)
    return {name: gather_judgement(one, videos, rows, total) for name, one in said.items()}


class AskedRewards:
    """A batch that rewards elsewhere are judging; those here are asked when it is wanted."""

    def __init__(
        self, rewards: Sequence[Reward], videos: Tensor, prompts: Sequence[str], fps: float
    ) -> None:
        self._rewards = list(rewards)
        self._batch = (videos, list(prompts), fps)
        self._answers: dict[str, list[Future[Judgement]]] = {}
        for reward in self._rewards:
            if reward.calls.elsewhere:
                pool = ThreadPoolExecutor(reward.calls.calls_at_once, f"reward {reward.name}")
                self._answers[reward.name] = [
                    pool.submit(_call, reward, *part, fps)
                    for part in _parts(reward.calls, videos, prompts)
                ]
                pool.shutdown(wait=False)

    def answers(self) -> dict[str, Judgement]:
        """Wait for what every reward says, by its name.

        Raises:
            ValueError: An answer breaks the contract.
            RuntimeError: A reward raised.
        """
        videos, prompts, fps = self._batch
        judgements: dict[str, Judgement] = {}
        for reward in self._rewards:
            if reward.calls.elsewhere:
                parts = [answer.result() for answer in self._answers[reward.name]]
            else:
                chunks = _parts(reward.calls, videos, prompts)
                parts = [_call(reward, *part, fps) for part in chunks]
            judgements[reward.name] = _joined(reward.name, parts)
        return judgements


def gather_judgement(own: Judgement, videos: Tensor, rows: Tensor, total: int) -> Judgement:
    """What a reward said of the videos of all processes; blame stays where it was found.

    Args:
        own: of this process's videos.
        videos: [B F C H W] those videos.
        rows: [B] long, their places among all.
        total: N, of all.
    """
    everywhere = processes.gather_objects(
        (rows.tolist(), own.reports, own.blame is not None, own.unanswered)
    )
    said = everywhere[:: processes.team_size()]
    reports, blame = None, own.blame
    if any(part is not None for _, part, _, _ in said):
        found: dict[int, Any] = {}
        for places, part, _, _ in said:
            found |= dict(zip(places, part or [None] * len(places), strict=True))
        reports = [found[place] for place in range(total)]
    if blame is None and any(blamed for _, _, blamed, _ in said):
        blame = torch.zeros(*videos.shape[:2], 1, 1)  # It found fault with others only.
    unanswered = sum(lost for _, _, _, lost in said)
    return Judgement(processes.gather_rows(own.score, rows, total), blame, reports, unanswered)


def add_up_rewards(
    rewards: Sequence[Reward], judgements: Mapping[str, Judgement], missing_limit: float
) -> JudgedBatch:
    """Add up what the rewards said of a batch.

    Args:
        rewards: At least one.
        judgements: Of each, by its name.
        missing_limit: Largest share of videos in [0, 1) that one reward, or those of weight other
            than 0 together, may leave unjudged.

    Raises:
        RuntimeError: Too many videos are unjudged.
    """
    check_missing(rewards, judgements, missing_limit)
    total = torch.zeros(len(judgements[rewards[0].name].score))
    weighted = [reward for reward in rewards if reward.weight != 0]
    for reward in weighted:
        total = total + reward.weight * judgements[reward.name].score
    count = int(total.isnan().sum())
    if len(weighted) > 1 and count > missing_limit * len(total):
        names = ", ".join(f"'{reward.name}'" for reward in weighted)
        raise RuntimeError(
            f"rewards {names} together returned NaN for {count} of {len(total)} videos, more than "
            f"missing_limit {missing_limit}; a video that one of them cannot judge has no score; "
            f"{RESUME}"
        )
    return JudgedBatch(total, judgements)


def check_missing(
    rewards: Sequence[Reward], judgements: Mapping[str, Judgement], missing_limit: float
) -> None:
    """Refuse a batch of which one reward, by itself, could not judge enough.

    Args:
        rewards: At least one.
        judgements: Of each, by its name.
        missing_limit: Largest share of videos in [0, 1) that one reward may leave unjudged.

    Raises:
        RuntimeError: A reward left too many videos unjudged.
    """
    if not 0 <= missing_limit < 1:
        raise ValueError(f"missing_limit must be in [0, 1), got {missing_limit}")
    for reward in rewards:
        _check_missing(reward.name, judgements[reward.name], missing_limit)


def _parts(
    calls: Calls, videos: Tensor, prompts: Sequence[str]
) -> list[tuple[Tensor, Sequence[str]]]:
    """The videos and prompts of each call."""
    size = calls.videos_per_call or len(prompts)
    if size >= len(prompts):
        return [(videos, prompts)]
    starts = range(0, len(prompts), size)
    return [(videos[at : at + size], prompts[at : at + size]) for at in starts]


def _call(reward: Reward, videos: Tensor, prompts: Sequence[str], fps: float) -> Judgement:
    """One call, made again as often as the settings say."""
    calls = reward.calls
    for attempt in range(calls.retries + 1):
        try:
            return ask_once(reward.name, reward.function, videos, prompts, fps)
        except RewardFailed as error:
            failure = error
        if attempt < calls.retries:
            pause = min(calls.retry_seconds * 2**attempt, MAX_PAUSE_SECONDS)
            pause = max(pause, min(failure.after_seconds, MAX_PAUSE_SECONDS))
            logger.warning("%s (asked again in %.1f s)", failure, pause)
            if reward.closed.wait(pause):
                raise failure
    if calls.on_error == "stop":
        raise failure
    logger.warning("%s (%d videos are left unjudged)", failure, len(prompts))
    missing = torch.full((len(prompts),), math.nan)
    return Judgement(missing, None, [str(failure)] * len(prompts), len(prompts))


def _joined(name: str, parts: Sequence[Judgement]) -> Judgement:
    """The judgement of a batch from those of its calls, in order."""
    if len(parts) == 1:
        return parts[0]
    blame, reports = None, None
    sizes = {tuple(one.blame.shape[1:]) for one in parts if one.blame is not None}
    if len(sizes) > 1:
        raise ValueError(
            f"blame of reward '{name}' must be of one size for all videos of a batch, got "
            f"{sorted(sizes)}; {RESUME}"
        )
    for size in sizes:  # What has no blame has nothing to blame anywhere.
        blame = torch.cat(
            [
                torch.zeros(len(one.score), *size) if one.blame is None else one.blame
                for one in parts
            ]
        )
    if any(one.reports is not None for one in parts):
        reports = [report for one in parts for report in (one.reports or [None] * len(one.score))]
    score = torch.cat([one.score for one in parts])
    return Judgement(score, blame, reports, sum(one.unanswered for one in parts))


def _check_missing(name: str, judgement: Judgement, limit: float) -> None:
    missing = judgement.score.isnan()
    count, total = int(missing.sum()), len(missing)
    if not count:
        return
    last = ""
    if judgement.reports is not None:
        report = judgement.reports[int(missing.nonzero()[-1])]
        held = report.get("error") if isinstance(report, Mapping) else None
        reason = held or getattr(report, "error", None) or report  # It may be text, or CaC's own.
        last = f'; last report: "{str(reason)[:200]}"'
    if count > limit * total:
        raise RuntimeError(
            f"reward '{name}' returned NaN for {count} of {total} videos, more than "
            f"missing_limit {limit}{last}; {RESUME}"
        )
    logger.warning("reward '%s' could not judge %d of %d videos%s", name, count, total, last)
