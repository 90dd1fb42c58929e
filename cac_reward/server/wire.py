"""Requests and answers as JSON: our own schema, and those of UniRL and of Flow-Factory.

Every request becomes the same list of clips; nothing is decoded here, and no address is fetched.
"""

from __future__ import annotations

import base64
import binascii
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from cac_reward.server.settings import ServerSettings

REWARD = "cac"
METRIC = "p_clean"
SOURCES = ("mp4", "frames", "safetensors", "path")
PROTOCOL_VERSION = "1"
IDENTITY = (
    "request_id",
    "sample_id",
    "group_id",
    "source_rank",
    "policy_version",
    "idempotency_key",
)


class WireError(ValueError):
    """What a client sent is not what this server understands; the text says what to change."""


@dataclass(frozen=True)
class ClipRequest:
    """One clip as it came, not decoded."""

    name: str
    """Its place in the request, for messages."""
    kind: str
    """One of SOURCES."""
    prompt: str
    """What it was generated from."""
    fps: float | None
    """Frames per second to believe; None believes the file."""
    content: tuple[str, ...]
    """Base64 texts, one but for 'frames'; the path itself for 'path'."""

    def write(self, target: Path) -> tuple[int, ...]:
        """Undo the base64 into a file; returns the length of each part.

        Raises:
            WireError: It is no base64, or a part is empty.
        """
        lengths = []
        with target.open("xb") as file:
            for text in self.content:
                try:
                    data = base64.b64decode(text, validate=True)
                except (binascii.Error, ValueError) as error:
                    raise WireError(f"{self.name}.{self.kind} must be base64: {error}") from error
                if not data:
                    raise WireError(f"{self.name}.{self.kind} must not be empty")
                lengths.append(len(data))
                file.write(data)
        return tuple(lengths)


@dataclass(frozen=True)
class Answer:
    """What became of one clip."""

    status: str
    """'scored'; 'unjudged': the judge gave no usable answer; 'refused': the clip breaks a rule;
    'failed': this server's fault."""
    score: float | None = None
    """P(clean), or what the reward returns; None unless scored."""
    error: str | None = None
    """Why there is no score."""
    report: Mapping[str, Any] | None = None
    """The whole report where the scorer gives one."""


def parse_json(body: bytes) -> dict[str, Any]:
    """Read a request's body.

    Raises:
        WireError: It is no JSON object, or holds NaN or infinity.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise WireError(f"body must be JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise WireError(f"body must be a JSON object, got {short(value)}")
    return value


def own_clips(
    body: Mapping[str, Any], settings: ServerSettings
) -> tuple[list[ClipRequest], float | None, bool]:
    """Read {"videos": [{"mp4" | "frames" | "safetensors" | "path", "prompt", "fps"}, ...]}.

    Returns:
        The clips, the deadline asked for in seconds, and whether reports are wanted.

    Raises:
        WireError: Naming the key, the rule and the value.
    """
    _check_keys("body", body, ("videos",), ("deadline_seconds", "reports"))
    clips = []
    for index, video in enumerate(_list("videos", body["videos"], settings.limits.max_clips)):
        name = f"videos[{index}]"
        _check_keys(name, video, (), (*SOURCES, "prompt", "fps"))
        kinds = [kind for kind in SOURCES if kind in video]
        if len(kinds) != 1:
            raise WireError(f"{name} must have one of {SOURCES}, got {kinds or 'none'}")
        fps = _rate(f"{name}.fps", video.get("fps"))
        clips.append(_clip(name, kinds[0], video[kinds[0]], video.get("prompt", ""), fps, settings))
    deadline = _rate("deadline_seconds", body.get("deadline_seconds"))
    reports = body.get("reports", True)
    if not isinstance(reports, bool):
        raise WireError(f"reports must be true or false, got {short(reports)}")
    return clips, deadline, reports


def own_reply(answers: Sequence[Answer], reports: bool) -> dict[str, Any]:
    """One result for each clip, in order."""
    results = [{"status": one.status, "score": one.score, "error": one.error} for one in answers]
    if reports:
        for result, one in zip(results, answers, strict=True):
            result["report"] = one.report  # type: ignore[assignment]
    return {"results": results}


def unirl_clips(body: Mapping[str, Any], settings: ServerSettings) -> list[ClipRequest]:
    """Read a request of UniRL's reward service, protocol version 1.

    The last turn of a history is judged. `metadata.fps` is believed over the file's rate.

    Raises:
        WireError: Naming the key, the rule and the value.
    """
    if body.get("protocol_version", PROTOCOL_VERSION) != PROTOCOL_VERSION:
        raise WireError(
            f"protocol_version must be {PROTOCOL_VERSION!r}, got {short(body['protocol_version'])}"
        )
    if body.get("grad_mode"):
        raise WireError("grad_mode must be false: this reward has no gradient")
    clips = []
    for index, one in enumerate(_list("requests", body.get("requests"), settings.limits.max_clips)):
        name = f"requests[{index}]"
        request = _object(name, one)
        rewards = request.get("required_rewards")
        if rewards != [REWARD]:
            raise WireError(f"{name}.required_rewards must be ['{REWARD}'], got {short(rewards)}")
        if request.get("scorer_version") is not None:
            raise WireError(f"{name}.scorer_version must be null: versions are not pinned here")
        turns = _list(f"{name}.history", request.get("history"), settings.limits.max_frames)
        if not turns:
            raise WireError(f"{name}.history must have at least one turn")
        name = f"{name}.history[{len(turns) - 1}]"
        turn = _object(name, turns[-1])
        given = [key for key in ("video_b64", "video_path") if turn.get(key) is not None]
        if len(given) != 1:
            raise WireError(f"{name} must have video_b64 or video_path, got {given or 'none'}")
        metadata = _object(f"{name}.metadata", request.get("metadata") or {})
        fps = _rate(f"{name}.metadata.fps", metadata.get("fps"))
        kind = "mp4" if given == ["video_b64"] else "path"
        clips.append(_clip(name, kind, turn[given[0]], turn.get("text"), fps, settings))
    return clips


def unirl_reply(body: Mapping[str, Any], answers: Sequence[Answer], judge: str) -> dict[str, Any]:
    """Scores and errors apart, and who asked for what echoed."""
    results = [{} if one.score is None else {REWARD: {METRIC: one.score}} for one in answers]
    errors = [{} if one.score is not None else {REWARD: str(one.error)} for one in answers]
    identities = [
        {**{key: request.get(key) for key in IDENTITY}, "scorer_version": judge}
        for request in body["requests"]
    ]
    return {
        "results": results,
        "errors": errors,
        "identities": identities,
        "protocol_version": PROTOCOL_VERSION,
    }


def flow_factory_clips(body: Mapping[str, Any], settings: ServerSettings) -> list[ClipRequest]:
    """Read a request of Flow-Factory's remote reward: prompts, and frames as base64 pictures.

    Its schema has no rate: it comes from `kwargs.fps` (`extra.fps`) or the server's --frames-fps.

    Raises:
        WireError: Naming the key, the rule and the value.
    """
    limits = settings.limits
    prompts = _list("prompt", body.get("prompt", body.get("prompts")), limits.max_clips)
    videos = _list("video", body.get("video", body.get("videos")), limits.max_clips)
    if len(prompts) != len(videos):
        raise WireError(
            f"video must hold one clip for each of {len(prompts)} prompts, got {len(videos)}"
        )
    more = body.get("kwargs") or body.get("extra") or {}
    fps = _rate("kwargs.fps", _object("kwargs", more).get("fps"))
    return [
        _clip(f"video[{index}]", "frames", frames, prompt, fps, settings)
        for index, (prompt, frames) in enumerate(zip(prompts, videos, strict=True))
    ]


def flow_factory_reply(answers: Sequence[Answer]) -> dict[str, Any]:
    """Rewards, or the error its client raises: its schema has no word for a missing reward."""
    missing = [(index, one) for index, one in enumerate(answers) if one.score is None]
    if missing:
        index, first = missing[0]
        text = f"{len(missing)} of {len(answers)} videos have no reward; video[{index}]: "
        return {"error": text + str(first.error), "rewards": [one.score for one in answers]}
    return {"rewards": [one.score for one in answers]}


def _clip(
    name: str, kind: str, value: object, prompt: object, fps: float | None, settings: ServerSettings
) -> ClipRequest:
    """Check one clip against the limits that can be checked before its base64 is undone."""
    limits = settings.limits
    if not isinstance(prompt, str) or len(prompt) > limits.max_prompt_characters:
        got = f"{len(prompt)} characters" if isinstance(prompt, str) else short(prompt)
        raise WireError(
            f"prompt of {name} must be text of at most {limits.max_prompt_characters} characters, "
            f"got {got}"
        )
    for text in (prompt, value):
        if isinstance(text, str) and not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise WireError(f"text of {name} must be Unicode: {error}") from error
    if kind in ("frames", "safetensors"):
        fps = settings.frames_fps if fps is None else fps
        if fps is None:
            raise WireError(
                f"{name}.fps must be given with {kind}, got none; a judge that answers in seconds "
                "needs the true rate (a server started with --frames-fps knows one)"
            )
    if kind == "frames":
        content = tuple(_list(f"{name}.frames", value, limits.max_frames))
    else:
        content = (value,)
    if not content or not all(isinstance(text, str) and text for text in content):
        raise WireError(f"{name}.{kind} must be text, got {short(value)}")
    # Four characters hold three bytes.
    size = sum(len(text) for text in content) * 3 // 4
    if kind != "path" and size > limits.max_clip_bytes:
        raise WireError(
            f"{name}.{kind} must stay within max_clip_bytes={limits.max_clip_bytes}, got {size}"
        )
    return ClipRequest(name, kind, prompt, fps, content)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"numbers must be finite, got {name}")


def _object(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise WireError(f"{name} must be an object, got {short(value)}")
    return value


def _list(name: str, value: object, limit: int) -> list[Any]:
    if not isinstance(value, list):
        raise WireError(f"{name} must be a list, got {short(value)}")
    if len(value) > limit:
        raise WireError(f"{name} must hold at most {limit}, got {len(value)}")
    return value


def _rate(name: str, value: object) -> float | None:
    if value is None:
        return None
    number = 0 if isinstance(value, bool) or not isinstance(value, int | float) else value
    if not 0 < number <= sys.float_info.max:
        raise WireError(f"{name} must be a number above 0, got {short(value)}")
    return float(number)


def _check_keys(name: str, value: object, needed: Sequence[str], optional: Sequence[str]) -> None:
    record = _object(name, value)
    missing = [key for key in needed if key not in record]
    unknown = [key for key in record if key not in (*needed, *optional)]
    if missing:
        raise WireError(f"{name} must have {missing[0]!r}, got {short(sorted(record))}")
    if unknown:
        known = sorted((*needed, *optional))
        raise WireError(f"{name} must have no key but {known}, got {short(unknown[0])}")
