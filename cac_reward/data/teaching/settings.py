"""What a teacher is asked, and how far a run may go."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from cac_reward.taxonomy import EVENT_TYPES, LEAF_TYPES

RECIPES = ("vanguard", "srvau")
TASKS = ("auto", "qa", "grounding", "classification")
SCHEMAS = ("auto", "always", "never")
TYPES: Mapping[str, Mapping[str, str]] = {
    "faults": {name: leaf.description for name, leaf in LEAF_TYPES.items()},
    "events": EVENT_TYPES,
}
"""Kinds of anomaly with their descriptions: of generated video, and of the real world."""
WORDING_VERSION = 1
"""Changes with the wording of the questions."""
_RESERVED_KEYS = ("model", "messages", "stream", "n", "response_format")


@dataclass(frozen=True, kw_only=True)
class TeachSettings:
    """What the answers depend on; answers to other settings never go into one file."""

    model: str
    """The server's name of the teacher."""
    recipe: str
    """One of `RECIPES`."""
    types: str = "faults"
    """One of `TYPES`: which kinds of anomaly there are to choose from."""
    task: str = "auto"
    """Of the recipe 'srvau', one of `TASKS`; 'auto': 'qa' where a clip has a question with options
    and its answer, else 'grounding'."""
    classes: tuple[str, ...] = ()
    """Of the task 'classification', at least two."""
    subclip_seconds: float = 8.0
    """Of the recipe 'vanguard': longest sub-clip, above 0."""
    fps: float = 2.0
    """Frames shown per second of clip, above 0."""
    max_frames: int = 16
    """Most frames of a request's first turn, at least 2."""
    pixels: int = 262144
    """Most pixels of a frame, at least 1; smaller frames stay as they are."""
    min_iou: float = 0.5
    """Least overlap of a window with the annotated one, in [0, 1]; more than none in any case."""
    answer_tokens: int = 2048
    """Most tokens of an answer, at least 1, sent as max_tokens."""
    temperature: float | None = None
    """At least 0; None leaves it to the server."""
    seed: int = 0
    """Of sampling; every try of every question has a seed of its own that follows from it."""
    body: Mapping[str, object] = field(default_factory=dict)
    """More of the request by name; null takes a name out, for servers that refuse it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if not self.model:
            raise ValueError("model must be the server's name of a model, got ''")
        for name, known in (("recipe", RECIPES), ("types", tuple(TYPES)), ("task", TASKS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        for name in ("subclip_seconds", "fps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name, least in (("max_frames", 2), ("pixels", 1), ("answer_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.min_iou <= 1:
            raise ValueError(f"min_iou must be in [0, 1], got {self.min_iou}")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        for name in _RESERVED_KEYS:
            if name in self.body:
                raise ValueError(f"body must not set {name!r}, which the recipe does")
        self._check_task()

    def _check_task(self) -> None:
        if self.recipe != "srvau" and self.task != "auto":
            raise ValueError(f"task must be left out unless the recipe is srvau, got {self.task!r}")
        if (self.task == "classification") != bool(self.classes):
            raise ValueError(
                f"classes must be given exactly where the task is classification, got "
                f"{self.classes} for {self.task!r}"
            )
        if self.classes and (len(set(self.classes)) != len(self.classes) or len(self.classes) < 2):
            raise ValueError(f"classes must be at least two different names, got {self.classes}")

    def to_json(self) -> str:
        """Everything, in one line."""
        plain = {"wording": WORDING_VERSION, **asdict(self)}
        return json.dumps(plain, sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class TeachLimits:
    """How a run goes and where it stops; nothing of it changes what is asked."""

    concurrency: int = 8
    """Requests under way at once, at least 1."""
    tries: int = 3
    """Answers to one question before the clip is left, at least 1."""
    retries: int = 4
    """More requests after a failure that may pass (no connection, time-out, 408, 409, 429, 5xx, no
    JSON), at least 0; pauses double, or are as long as the server asks."""
    timeout_seconds: float = 300.0
    """Of one request, above 0."""
    schema: str = "auto"
    """One of `SCHEMAS`: whether the form goes along as response_format; 'auto': unless the server
    refuses it."""
    max_requests: int | None = None
    """Requests of this run, failed ones too, at least 1; None for any number."""
    max_tokens: int | None = None
    """Tokens of this run, read and written, as the server counts them, at least 1; no request is
    begun once they are spent, so that those under way may pass it. None for any number."""
    max_failures: int | None = 100
    """Clips that may fail, at least 0; one more stops the run. None for any number."""

    def __post_init__(self) -> None:
        for name, least in (
            *(("concurrency", 1), ("tries", 1), ("retries", 0)),
            *(("max_requests", 1), ("max_tokens", 1), ("max_failures", 0)),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 < self.timeout_seconds < math.inf:
            raise ValueError(f"timeout_seconds must be above 0, got {self.timeout_seconds}")
        if self.schema not in SCHEMAS:
            raise ValueError(f"schema must be one of {SCHEMAS}, got {self.schema!r}")
