"""What a reward is, where it lives and what it must answer, checked at the door.

Axes: B videos, F frames, C channels, H height, W width.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion_rl.loading import load_callable, near_names
from diffusion_rl.memory_errors import OutOfMemoryError, ran_out_of_memory
from diffusion_rl.shapes import check_shape

RewardFunction = Callable[..., Any]
"""reward(videos, prompts, *, fps) -> Tensor[B] or a dict with score, blame and reports."""

RESUME = (
    "nothing saved so far is lost: mend it and run the same command again, which goes on from what "
    "is saved"
)
WHERE = ("here", "process", "http")
ON_ERROR = ("stop", "missing")
HTTP_RETRIES, HTTP_VIDEOS = 5, 8
TIMEOUT_SECONDS = 600.0


class RewardRefused(RuntimeError):
    """A reward elsewhere will not answer this, however often it is asked."""


class RewardFailed(RuntimeError):
    """A call of a reward failed; asking again may help.

    Args:
        message: what happened.
        after_seconds: how long the other side asks to be left alone; 0 where it does not say.
    """

    def __init__(self, message: str, after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.after_seconds = after_seconds


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """One reward of a run, by name."""

    name: str
    """What the reward is called in logs and errors."""
    target: str
    """Where it lives, "module:name" or "module:Name.attribute"; with `where: http` the address of
    its server."""
    weight: float = 1.0
    """Factor in the sum of rewards; 0 only logs the score."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the target; with `where: http` those of HttpReward."""
    where: str = "here"
    """`here` asks it in the loop's own process, `process` in one of its own, `http` at a server;
    the last two are asked while other rewards are, and with `staleness: 1` while the next videos
    are drawn."""
    on_error: str = "stop"
    """What a call does that failed to its last retry: `stop` the run, or leave its videos
    `missing`, which missing_limit bounds. With `missing`, set videos_per_call, so that a call is
    not all of them."""
    retries: int | None = None
    """How often a failed call is made again, at least 0, after pauses that double from
    retry_seconds; None is 5 with `where: http`, else 0."""
    retry_seconds: float = 1.0
    """First pause, at least 0; no pause is above 60."""
    videos_per_call: int | None = None
    """Most videos in one call, at least 1; None is 8 with `where: http`, else all of them."""
    calls_at_once: int = 1
    """Calls under way at a time, at least 1; above 1 only with `where: http`."""
    timeout_seconds: float | None = None
    """Of one call elsewhere (and of a process's start), above 0; None is 600."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name must not be empty; it is how logs and errors call the reward")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight must be finite, got {self.weight}")
        for name, known in (("where", WHERE), ("on_error", ON_ERROR)):
            if getattr(self, name) not in known:
                near = near_names(getattr(self, name), known)
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)}{near}"
                )
        if (self.where == "http") != self.target.startswith(("http://", "https://")):
            raise ValueError(
                "target must be 'http://HOST' or 'https://HOST' with where: http, and "
                f"'module:name' with any other, got {self.target} with where: {self.where}"
            )
        self._check_calls()

    def _check_calls(self) -> None:
        for name, least in (("retries", 0), ("videos_per_call", 1), ("calls_at_once", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= self.retry_seconds < math.inf:
            raise ValueError(f"retry_seconds must be at least 0, got {self.retry_seconds}")
        if self.calls_at_once > 1 and self.where != "http":
            raise ValueError(
                f"calls_at_once must be 1 with where: {self.where}, got {self.calls_at_once}; "
                "only a server answers several at a time"
            )
        if self.timeout_seconds is not None and self.where == "here":
            raise ValueError(
                f"timeout_seconds must be left out with where: here, got {self.timeout_seconds}; "
                "a call in the loop's own process cannot be ended"
            )
        if self.timeout_seconds is not None and not 0 < self.timeout_seconds < math.inf:
            raise ValueError(f"timeout_seconds must be above 0, got {self.timeout_seconds}")

    @property
    def calls(self) -> Calls:
        """How the reward is asked, with defaults filled in."""
        http = self.where == "http"
        return Calls(
            elsewhere=self.where != "here",
            on_error=self.on_error,
            retries=(HTTP_RETRIES if http else 0) if self.retries is None else self.retries,
            retry_seconds=self.retry_seconds,
            videos_per_call=self.videos_per_call or (HTTP_VIDEOS if http else None),
            calls_at_once=self.calls_at_once,
        )


@dataclass(frozen=True, kw_only=True)
class Calls:
    """How a reward is asked; the fields are those of RewardSettings."""

    elsewhere: bool = False
    """Whether it is asked in a thread, while this process does something else."""
    on_error: str = "stop"
    retries: int = 0
    retry_seconds: float = 1.0
    videos_per_call: int | None = None
    calls_at_once: int = 1


@dataclass(frozen=True)
class Reward:
    """A reward ready to be called."""

    name: str
    """What the reward is called in logs and errors."""
    function: RewardFunction
    """The callable that honours the reward contract."""
    weight: float = 1.0
    """Factor in the sum of rewards; 0 only logs the score."""
    calls: Calls = field(default_factory=Calls)
    """How it is asked."""
    end: Callable[[], None] | None = None
    """Ends what it holds open elsewhere."""
    closed: threading.Event = field(default_factory=threading.Event, compare=False)
    """Set once nobody waits for it any more."""

    def close(self) -> None:
        """End it: calls under way elsewhere fail, and none is repeated."""
        self.closed.set()
        if self.end is not None:
            self.end()


@dataclass(frozen=True)
class Judgement:
    """What one reward says of a batch, checked."""

    score: Tensor
    """[B] float32 on the CPU, higher is better, NaN where a video could not be judged."""
    blame: Tensor | None = None
    """[B F H W] in [0, 1], where and when the fault is (any H and W)."""
    reports: Sequence[Any] | None = None
    """One object per video."""
    unanswered: int = 0
    """Videos of calls that failed to the last retry and were left missing."""


@dataclass(frozen=True)
class JudgedBatch:
    """The weighted sum of all rewards, and every one of them on its own."""

    score: Tensor
    """[B] float32 on the CPU, NaN where any reward of weight other than 0 could not judge."""
    judgements: Mapping[str, Judgement]
    """By the name of the reward; blame is of the videos of this process only."""


def build_function(settings: RewardSettings) -> RewardFunction:
    """Make the callable that a configuration describes, in this process.

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
        near = near_names(unknown[0], signature.parameters) if unknown else ""
        raise ValueError(
            f"options of reward '{settings.name}' must fit {settings.target}{signature}: "
            f"{error}{near}"
        ) from error
    if is_reward:
        return functools.partial(target, **settings.options)
    function = target(**settings.options)
    if not callable(function):
        raise ValueError(
            f"target '{settings.target}' must return a reward that can be called, "
            f"got {type(function).__name__}"
        )
    return function


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


def ask_once(
    name: str, function: RewardFunction, videos: Tensor, prompts: Sequence[str], fps: float
) -> Judgement:
    """Call a reward once and check what it answers.

    That it changed the videos is seen where torch changed them, in any tensor that shares their
    memory; what numpy writes into `videos.numpy()`, or torch into `videos.data`, is not seen.

    Raises:
        RewardRefused: The reward is elsewhere and will not answer.
        RewardFailed: It raised anything else.
        OutOfMemoryError: Memory ran out in this process; never taken for a failure of this call.
        ValueError: Its answer breaks the contract, or it changed the videos.
    """
    before = _changes(videos)
    try:
        with torch.no_grad():
            answer = function(videos, list(prompts), fps=fps)
    except RewardRefused as error:
        raise RewardRefused(f"reward '{name}': {error}; {RESUME}") from error
    except RewardFailed as error:
        raise RewardFailed(f"reward '{name}': {error}; {RESUME}", error.after_seconds) from error
    except Exception as error:
        if ran_out_of_memory(error):
            raise OutOfMemoryError(
                f"memory ran out in reward '{name}' ({error}); {_less_memory(len(prompts))}; "
                f"{RESUME}"
            ) from error
        _check_unchanged(name, videos, before)
        raise RewardFailed(
            f"reward '{name}' raised {type(error).__name__}: {error}; {RESUME}"
        ) from error
    _check_unchanged(name, videos, before)
    if not isinstance(answer, Mapping):
        answer = {"score": answer}
    unknown = set(answer) - {"score", "blame", "reports"}
    if unknown or "score" not in answer:
        raise ValueError(
            f"reward '{name}' must return a tensor or a dict of score, blame and reports, "
            f"got a dict of {sorted(map(str, answer))}; {RESUME}"
        )
    score = _check_score(name, answer["score"], len(prompts))
    blame = _check_blame(name, answer.get("blame"), videos)
    reports = answer.get("reports")
    if reports is not None and len(reports) != len(prompts):
        raise ValueError(
            f"reports of reward '{name}' must be one per video ({len(prompts)}), "
            f"got {len(reports)}; {RESUME}"
        )
    return Judgement(score, blame, reports)


def _less_memory(count: int) -> str:
    """What to change where a reward needs too much for a call about so many videos."""
    fewer = f"its videos_per_call={count // 2} asks about fewer at once (now {count})"
    elsewhere = (
        "where: process with a device of its own among its options, or where: http on another "
        "machine, takes it off this one; a smaller judge, or one in half precision, needs less"
    )
    return f"{fewer}; {elsewhere}" if count > 1 else elsewhere


def _changes(videos: Tensor) -> int:
    """How often torch has changed a tensor, or another that shares its memory, in place."""
    return 0 if videos.is_inference() else videos._version  # Inference tensors do not count.


def _check_unchanged(name: str, videos: Tensor, before: int) -> None:
    """Refuse what guards and further rewards, or a second call, would take for the videos."""
    if _changes(videos) != before:
        raise ValueError(
            f"videos must not be changed by a reward, got {_changes(videos) - before} changes in "
            f"place by reward '{name}'; have it change videos.clone() instead; {RESUME}"
        )


def _check_score(name: str, score: Any, count: int) -> Tensor:
    described = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
    if described != (count,):
        raise ValueError(
            f"score of reward '{name}' must be a tensor of shape ({count},), got {described}; "
            f"{RESUME}"
        )
    if not score.is_floating_point() or bool(score.isinf().any()):
        found = "infinity" if score.is_floating_point() else score.dtype
        raise ValueError(
            f"score of reward '{name}' must be finite floats, or NaN for a video not judged, "
            f"got {found}; {RESUME}"
        )
    return score.detach().float().cpu()


def plain_report(name: str, report: Any) -> Any:
    """A report as JSON has it: what its `to_dict` says where it has one, else its text.

    Args:
        name: of the reward, said in the error.
        report: of one video.

    Raises:
        ValueError: JSON cannot hold what its `to_dict` says.
    """
    structured = hasattr(report, "to_dict")
    try:
        return json.loads(json.dumps(report.to_dict() if structured else report))
    except (TypeError, ValueError) as error:
        if not structured:
            return str(report)
        raise ValueError(
            f"to_dict() of reports of reward '{name}' must hold what JSON can, got {error}; turn "
            f"numbers of numpy and torch into Python's with float(...) or .item(); {RESUME}"
        ) from error


def _check_blame(name: str, blame: Any, videos: Tensor) -> Tensor | None:
    if blame is None:
        return None
    described = tuple(blame.shape) if isinstance(blame, Tensor) else type(blame).__name__
    if not isinstance(blame, Tensor) or blame.ndim != 4 or blame.shape[:2] != videos.shape[:2]:
        raise ValueError(
            f"blame of reward '{name}' must be a tensor [B F H W] with B and F of the videos "
            f"{tuple(videos.shape[:2])}, got {described}; {RESUME}"
        )
    blame = blame.detach().float().cpu()
    if not bool(((blame >= 0) & (blame <= 1)).all()):
        raise ValueError(
            f"blame of reward '{name}' must be in [0, 1], got min={blame.min().item():.2f}, "
            f"max={blame.max().item():.2f}; {RESUME}"
        )
    return blame
