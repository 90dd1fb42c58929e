"""UniRL: a `BaseScorer` for its reward service, and that service's /score schema.

In the reward service, reward_service/scorers/cac.py:

    from cac_reward.adapters.unirl import CaCVideoScorer
    from reward_service.scorers.registry import register

    register("cac", CaCVideoScorer)

and the row "cac": "reward_service.scorers.cac" in SCORER_MODULES. UniRL's client writes its mp4 at
`video_fps: 8` by default: set it to the generator's rate, or pass `fps` here.

Source:
    Tencent-Hunyuan/UniRL, unirl-reward-service/reward_service/{schemas,server}.py and
    scorers/{base,registry,videoalign}.py.
"""

from __future__ import annotations

import base64
import binascii
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cac_reward.adapters.base import Outcome, Scorer, VideoReward, missing_package
from cac_reward.adapters.settings import scorer_of

PROTOCOL_VERSION = "1"
SUB_METRIC = "p_clean"
MEDIA = ("image_b64", "image_ipc", "video_b64", "video_path")
IDENTITY = (
    *("request_id", "sample_id", "group_id", "source_rank", "policy_version", "idempotency_key"),
)


def __getattr__(name: str) -> type:
    """`CaCVideoScorer`, made when it is first asked for."""
    if name == "CaCVideoScorer":
        return _scorer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _scorer_class() -> type:
    try:
        from reward_service.scorers.base import BaseScorer
    except ImportError as error:
        how = "install unirl-reward-service from Tencent-Hunyuan/UniRL"
        raise missing_package("CaCVideoScorer", "reward_service", how) from error

    class CaCVideoScorer(BaseScorer):
        """P(clean) of the video on each item's last turn; NaN where it could not be judged.

        Args:
            judge: folder or hub id of the judge, or a scorer.
            fps: frames per second to believe instead of the files' own.
            device: where the judge runs.
            dtype: of the judge.
            mode: 'full' or 'fast', as for `CaCScorer`.
            revision: branch, tag or commit of the hub id.
            on_failure: 'mask' for NaN, which UniRL drops by itself, 'raise', or a number.
        """

        name = "cac"
        input_kind = "video"
        sub_metric_names = (SUB_METRIC,)

        def __init__(
            self,
            judge: str | Path | Scorer,
            fps: float | None = None,
            device: str = "cuda",
            dtype: str = "bfloat16",
            mode: str = "full",
            revision: str | None = None,
            on_failure: str | float = "mask",
        ) -> None:
            scorer = scorer_of(judge, device=device, dtype=dtype, mode=mode, revision=revision)
            self._reward = VideoReward(scorer=scorer, fps=fps, on_failure=on_failure)

        def score(self, items: Sequence[Any]) -> list[dict[str, float]]:
            """One dict for each item, in order.

            Raises:
                ValueError: If an item has no video on its last turn.
            """
            for row, item in enumerate(items):
                if not item.videos or item.videos[-1] is None:
                    raise ValueError(f"item {row} must have a video on its last turn, got none")
            videos = [item.videos[-1] for item in items]
            outcome = self._reward(videos, [item.history[-1][0] for item in items])
            return [{SUB_METRIC: score} for score in outcome.scores.tolist()]

    CaCVideoScorer.__qualname__ = "CaCVideoScorer"  # So that pickle finds it by __getattr__.
    return CaCVideoScorer


@dataclass(frozen=True)
class ScoreRequest:
    """One of the requests in a body of POST /score."""

    prompt: str
    """Text of the last turn."""
    video: bytes | None
    """The video file itself."""
    video_path: str | None
    """Or where the client says it is: to be confined by whoever opens it."""
    required_rewards: tuple[str, ...]
    """Names of the rewards asked for."""
    metadata: Mapping[str, Any]
    """As sent; {} where there is none."""
    identity: Mapping[str, Any]
    """What the answer echoes."""


def parse_score(body: object, *, rewards: Sequence[str] = ("cac",)) -> list[ScoreRequest]:
    """Read the JSON body of POST /score.

    Args:
        body: the decoded JSON; nothing in it is opened.
        rewards: names that may be asked for.

    Raises:
        ValueError: Naming what is wrong with it, and where.
    """
    version = _mapping("body", body).get("protocol_version", PROTOCOL_VERSION)
    if version != PROTOCOL_VERSION:
        raise ValueError(f"protocol_version must be {PROTOCOL_VERSION!r}, got {version!r}")
    requests = _mapping("body", body).get("requests")
    if not isinstance(requests, list):
        raise ValueError(f"requests must be a list, got {type(requests).__name__}")
    return [_request(f"requests[{row}]", one, rewards) for row, one in enumerate(requests)]


def score_reply(
    requests: Sequence[ScoreRequest], outcome: Outcome, *, reward: str = "cac"
) -> dict[str, object]:
    """The JSON body of the answer, in the order of the requests.

    A video that could not be judged has no entry in `results` but one in `errors`.

    Raises:
        ValueError: If there is not one score for each request.
    """
    if len(outcome.errors) != len(requests):
        raise ValueError(
            f"outcome must have one score for each of {len(requests)} requests, "
            f"got {len(outcome.errors)}"
        )
    results: list[dict[str, dict[str, float]]] = []
    errors: list[dict[str, str]] = []
    for score, error in zip(outcome.scores.tolist(), outcome.errors, strict=True):
        failed = math.isnan(score)
        results.append({} if failed else {reward: {SUB_METRIC: score}})
        errors.append({reward: str(error)} if failed else {})
    return {
        "results": results,
        "errors": errors,
        "identities": [dict(request.identity) for request in requests],
        "protocol_version": PROTOCOL_VERSION,
    }


def _request(name: str, value: object, rewards: Sequence[str]) -> ScoreRequest:
    request = _mapping(name, value)
    history = request.get("history")
    if not isinstance(history, list) or not history:
        raise ValueError(f"{name}.history must be a list of turns, got {history!r:.200}")
    turns = [_mapping(f"{name}.history[{row}]", turn) for row, turn in enumerate(history)]
    for row, turn in enumerate(turns):
        _check_turn(f"{name}.history[{row}]", turn)
    last = turns[-1]
    if last.get("video_b64") is None and last.get("video_path") is None:
        raise ValueError(f"{name}.history must end in a turn with a video, got none")
    wanted = request.get("required_rewards")
    if not isinstance(wanted, list) or not wanted or not set(map(str, wanted)) <= set(rewards):
        raise ValueError(
            f"{name}.required_rewards must name some of {list(rewards)}, got {wanted!r:.200}"
        )
    if request.get("scorer_version") is not None:
        raise ValueError(
            f"{name}.scorer_version must be null, got {request['scorer_version']!r:.200}; "
            "drop expected_scorer_version from the client"
        )
    metadata = request.get("metadata")
    return ScoreRequest(
        prompt=last["text"],
        video=_video_bytes(f"{name}.history[{len(turns) - 1}]", last.get("video_b64")),
        video_path=last.get("video_path"),
        required_rewards=tuple(wanted),
        metadata={} if metadata is None else _mapping(f"{name}.metadata", metadata),
        identity={**{key: request.get(key) for key in IDENTITY}, "scorer_version": None},
    )


def _check_turn(name: str, turn: Mapping[str, Any]) -> None:
    """Refuse a turn that breaks the schema's own rules."""
    for key in ("text", *MEDIA):
        if not isinstance(turn.get(key), str) and (key == "text" or turn.get(key) is not None):
            raise ValueError(f"{name}.{key} must be text, got {type(turn.get(key)).__name__}")
    if all(turn.get(key) is None for key in MEDIA):
        raise ValueError(f"{name} must carry one of {list(MEDIA)}, got none")
    if turn.get("video_b64") is not None and turn.get("video_path") is not None:
        raise ValueError(f"{name} must carry only one of video_b64 and video_path, got both")


def _video_bytes(name: str, text: str | None) -> bytes | None:
    try:
        return None if text is None else base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name}.video_b64 must be base64, got {error}") from error


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object, got {type(value).__name__}")
    return value
