"""The reward contract enforced, and rewards added up.

Axes: B videos, F frames, C channels, H height, W width.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import logging
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion_rl.shapes import check_shape

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]
"""reward(videos, prompts, *, fps) -> Tensor[B] or a dict with score, blame and reports."""

_RESUME = (
    "nothing saved so far is lost: mend it and run the same command again to go on from the last "
    "checkpoint"
)


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """One reward of a run, by name."""

    name: str
    """What the reward is called in logs and errors."""
    target: str
    """Where it lives, "module:name" or "module:Name.attribute"."""
    weight: float = 1.0
    """Factor in the sum of rewards; 0 only logs the score."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the target."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name must not be empty; it is how logs and errors call the reward")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight must be finite, got {self.weight}")


@dataclass(frozen=True)
class Reward:
    """A reward ready to be called."""

    name: str
    """What the reward is called in logs and errors."""
    function: RewardFunction
    """The callable that honours the reward contract."""
    weight: float = 1.0
    """Factor in the sum of rewards; 0 only logs the score."""


@dataclass(frozen=True)
class Judgement:
    """What one reward says of a batch, checked."""

    score: Tensor
    """[B] float32 on the CPU, higher is better, NaN where a video could not be judged."""
    blame: Tensor | None = None
    """[B F H W] in [0, 1], where and when the fault is (any H and W)."""
    reports: Sequence[Any] | None = None
    """One object per video."""


@dataclass(frozen=True)
class JudgedBatch:
    """The weighted sum of all rewards, and every one of them on its own."""

    score: Tensor
    """[B] float32 on the CPU, NaN where any reward of weight other than 0 could not judge."""
    judgements: Mapping[str, Judgement]
    """By the name of the reward."""


def load_callable(target: str) -> Callable[..., Any]:
    """Import what a configuration names, or say which half of the name is wrong.

    Args:
        target: "module:name" or "module:Name.attribute".

    Raises:
        ValueError: The text has not this form, or names something that cannot be called.
        ImportError: The module or the name in it does not exist, or the module fails to import.

    Example:
        >>> load_callable("math:sqrt")(9)
        3.0
    """
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise ValueError(f"target must be 'module:name', got '{target}'")
    found: Any = _import_module(target, module_name)
    walked = f"module '{module_name}'"
    for part in path.split("."):
        if not hasattr(found, part):
            raise ImportError(
                f"target '{target}': {walked} has no '{part}'{_near(part, dir(found))}"
            )
        found = getattr(found, part)
        walked = f"'{part}' of {walked}"
    if not callable(found):
        raise ValueError(f"target '{target}' must be callable, got {type(found).__name__}")
    return found


def build_reward(settings: RewardSettings) -> Reward:
    """Make the reward that a configuration describes.

    A target that takes `videos` and `prompts` is the reward itself; any other is called with the
    options and must return the reward.

    Raises:
        ValueError: The options do not fit the target, or it does not return a callable.
        ImportError: The target does not exist.
    """
    target = load_callable(settings.target)
    signature = inspect.signature(target)
    is_reward = {"videos", "prompts"} <= set(signature.parameters)
    try:
        if is_reward:
            signature.bind_partial(**settings.options)
        else:
            signature.bind(**settings.options)
    except TypeError as error:
        unknown = [name for name in settings.options if name not in signature.parameters]
        near = _near(unknown[0], signature.parameters) if unknown else ""
        raise ValueError(
            f"options of reward '{settings.name}' must fit {settings.target}{signature}: "
            f"{error}{near}"
        ) from error
    if is_reward:
        return Reward(settings.name, functools.partial(target, **settings.options), settings.weight)
    function = target(**settings.options)
    if not callable(function):
        raise ValueError(
            f"target '{settings.target}' must return a reward that can be called, "
            f"got {type(function).__name__}"
        )
    return Reward(settings.name, function, settings.weight)


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
        missing_limit: Largest share of videos in [0, 1) that one reward may leave unjudged.

    Returns:
        The sum, where a NaN of any weighted reward makes the video NaN, and each judgement.

    Raises:
        ValueError: The videos or a reward's answer break the contract.
        RuntimeError: A reward raised, or left too many videos unjudged.
    """
    names = [reward.name for reward in rewards]
    if not rewards or len(set(names)) != len(names):
        raise ValueError(f"rewards must be at least one and have different names, got {names}")
    if not 0 <= missing_limit < 1:
        raise ValueError(f"missing_limit must be in [0, 1), got {missing_limit}")
    check_videos(videos, prompts, fps)
    total = torch.zeros(len(prompts))
    judgements = {}
    for reward in rewards:
        judgement = _judge(reward, videos, prompts, fps)
        _check_missing(reward.name, judgement, missing_limit)
        judgements[reward.name] = judgement
        if reward.weight != 0:
            total = total + reward.weight * judgement.score
    return JudgedBatch(total, judgements)


def check_videos(videos: Tensor, prompts: Sequence[str], fps: float) -> None:
    """Refuse what is not [B F C H W] in [0, 1] with a prompt each and a frame rate.

    Raises:
        ValueError: Names what is wrong.
    """
    if not isinstance(videos, Tensor) or not videos.is_floating_point():
        kind = videos.dtype if isinstance(videos, Tensor) else type(videos).__name__
        raise ValueError(f"videos must be a floating point tensor [B F C H W], got {kind}")
    axes = check_shape("videos", videos, "B F C H W")
    if axes["C"] != 3:
        raise ValueError(
            f"videos must have axes [B F C H W] with 3 channels, got shape {tuple(videos.shape)}"
        )
    if min(axes.values()) == 0:
        raise ValueError(f"videos must not be empty, got shape {tuple(videos.shape)}")
    if not bool(videos.isfinite().all()):
        raise ValueError("videos must be finite, got NaN or infinity")
    low, high = videos.min().item(), videos.max().item()
    if low < 0 or high > 1:
        remedy = "divide by 255" if high > 2 else "rescale with (x + 1) / 2"
        raise ValueError(
            f"videos must be in [0, 1], got min={low:.2f}, max={high:.2f}; {remedy} "
            "or clamp in the generator's decode"
        )
    if isinstance(prompts, str) or len(prompts) != axes["B"]:
        count = 1 if isinstance(prompts, str) else len(prompts)
        raise ValueError(f"prompts must be one per video ({axes['B']}), got {count}")
    if not fps > 0 or math.isinf(fps):
        raise ValueError(f"fps must be a finite number above 0, got {fps}")


def _judge(reward: Reward, videos: Tensor, prompts: Sequence[str], fps: float) -> Judgement:
    try:
        with torch.no_grad():
            answer = reward.function(videos, list(prompts), fps=fps)
    except Exception as error:
        raise RuntimeError(
            f"reward '{reward.name}' raised {type(error).__name__}: {error}; {_RESUME}"
        ) from error
    if not isinstance(answer, Mapping):
        answer = {"score": answer}
    unknown = set(answer) - {"score", "blame", "reports"}
    if unknown or "score" not in answer:
        raise ValueError(
            f"reward '{reward.name}' must return a tensor or a dict of score, blame and reports, "
            f"got a dict of {sorted(map(str, answer))}; {_RESUME}"
        )
    score = _check_score(reward.name, answer["score"], len(prompts))
    blame = _check_blame(reward.name, answer.get("blame"), videos)
    reports = answer.get("reports")
    if reports is not None and len(reports) != len(prompts):
        raise ValueError(
            f"reports of reward '{reward.name}' must be one per video ({len(prompts)}), "
            f"got {len(reports)}; {_RESUME}"
        )
    return Judgement(score, blame, reports)


def _check_score(name: str, score: Any, count: int) -> Tensor:
    described = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
    if described != (count,):
        raise ValueError(
            f"score of reward '{name}' must be a tensor of shape ({count},), got {described}; "
            f"{_RESUME}"
        )
    if not score.is_floating_point() or bool(score.isinf().any()):
        found = "infinity" if score.is_floating_point() else score.dtype
        raise ValueError(
            f"score of reward '{name}' must be finite floats, or NaN for a video not judged, "
            f"got {found}; {_RESUME}"
        )
    return score.detach().float().cpu()


def _check_blame(name: str, blame: Any, videos: Tensor) -> Tensor | None:
    if blame is None:
        return None
    described = tuple(blame.shape) if isinstance(blame, Tensor) else type(blame).__name__
    if not isinstance(blame, Tensor) or blame.ndim != 4 or blame.shape[:2] != videos.shape[:2]:
        raise ValueError(
            f"blame of reward '{name}' must be a tensor [B F H W] with B and F of the videos "
            f"{tuple(videos.shape[:2])}, got {described}; {_RESUME}"
        )
    blame = blame.detach().float().cpu()
    if not bool(((blame >= 0) & (blame <= 1)).all()):
        raise ValueError(
            f"blame of reward '{name}' must be in [0, 1], got min={blame.min().item():.2f}, "
            f"max={blame.max().item():.2f}; {_RESUME}"
        )
    return blame


def _check_missing(name: str, judgement: Judgement, limit: float) -> None:
    missing = judgement.score.isnan()
    count, total = int(missing.sum()), len(missing)
    if not count:
        return
    last = ""
    if judgement.reports is not None:
        report = judgement.reports[int(missing.nonzero()[-1])]
        reason = getattr(report, "error", None) or report  # A report may be text, or CaC's own.
        last = f'; last report: "{str(reason)[:200]}"'
    if count > limit * total:
        raise RuntimeError(
            f"reward '{name}' returned NaN for {count} of {total} videos, more than "
            f"missing_limit {limit}{last}; {_RESUME}"
        )
    logger.warning("reward '%s' could not judge %d of %d videos%s", name, count, total, last)


def _import_module(target: str, module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not (module_name == missing or module_name.startswith(f"{missing}.")):
            raise ImportError(
                f"target '{target}': module '{module_name}' was found, but importing it failed "
                f"because it needs '{missing}', which is not installed"
            ) from error
        parent, _, last = missing.rpartition(".")
        folders = getattr(importlib.import_module(parent), "__path__", []) if parent else None
        names = [module.name for module in pkgutil.iter_modules(folders)]
        raise ImportError(
            f"target '{target}': there is no module '{missing}'{_near(last, names)}; "
            "it is looked for among installed packages and on PYTHONPATH"
        ) from error
    except ImportError as error:
        raise ImportError(
            f"target '{target}': module '{module_name}' was found, but importing it failed: {error}"
        ) from error


def _near(name: str, known: Any) -> str:
    """The end of an error: names that the writer may have meant."""
    matches = difflib.get_close_matches(name, list(known), n=3)
    return f"; near names: {', '.join(matches)}" if matches else ""
