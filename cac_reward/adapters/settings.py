"""A scorer from plain values: for frameworks whose configuration can carry nothing else."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cac_reward.adapters.base import Scorer, VideoReward, check_on_failure
from cac_reward.client import RewardClient
from cac_reward.inputs import check_rate
from cac_reward.judge_options import SCHEMES, JudgeOptions

ENVIRONMENT = "CAC_REWARD_"
"""Beginning of the variables that `ScorerSettings.from_environment` reads."""
TOKEN_VARIABLE = ENVIRONMENT + "TOKEN"
"""What a server of `cac-reward serve` asks for; no field, so that it is never printed."""

_LOADING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class ScorerSettings:
    """A scorer in plain values, for frameworks whose configuration can carry nothing else."""

    judge: str
    """Folder of the judge, or its id on the hub; or the address of a running `cac-reward serve`, as
    in http://127.0.0.1:8000; or, with `model`, that of an OpenAI-compatible server."""
    model: str | None = None
    """The OpenAI-compatible server's name of the judge; None where the judge is no such server."""
    fps: float | None = None
    """Frames per second of the videos; needed where they come without files."""
    device: str = "cuda"
    """Where the judge runs; a server has its own."""
    dtype: str = "bfloat16"
    """'float32', 'bfloat16' or 'float16'; a server has its own."""
    attention: str = "sdpa"
    """transformers' name of the attention kernel."""
    mode: str = "full"
    """'full' writes findings before the verdict, 'fast' asks for the verdict only."""
    revision: str | None = None
    """Branch, tag or commit of the hub id."""
    on_failure: str | float = "raise"
    """As for `VideoReward`; a number may be given as text."""

    def __post_init__(self) -> None:
        if not self.judge:
            raise ValueError("judge must name a folder or a hub id, got ''")
        for name in ("fps", "on_failure"):
            object.__setattr__(self, name, _number_in(getattr(self, name)))
        if self.fps is not None:
            check_rate(self.fps)
        check_on_failure(self.on_failure)
        self._check_server()

    @property
    def is_server(self) -> bool:
        """Whether the judge runs elsewhere."""
        return self.judge.startswith(SCHEMES)

    def _check_server(self) -> None:
        """Refuse what a server would not hear of."""
        if self.model is not None and not self.is_server:
            raise ValueError(
                f"model must be left out where judge is a folder or hub id, got {self.model!r}; it "
                "is the name of a judge at an address"
            )
        decided = ("attention", "revision", *(() if self.model else ("mode",)))
        for one in fields(self):
            if self.is_server and one.name in decided and getattr(self, one.name) != one.default:
                raise ValueError(
                    f"{one.name} must be left out where judge is an address, got "
                    f"{getattr(self, one.name)!r}; the server is started with its own"
                )

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], **framework: Any) -> ScorerSettings:
        """Read a framework's free options; `framework` holds what it decides itself.

        Raises:
            ValueError: If `judge` is missing, or an option is unknown.
        """
        names = [one.name for one in fields(cls)]
        for name in options:
            if name not in names:
                raise ValueError(f"options must be among {names}, got {name!r}")
        if "judge" not in options:
            raise ValueError(f"judge must be given among the options, got {sorted(options)}")
        return cls(**{**framework, **options})

    @classmethod
    def from_environment(cls, **framework: Any) -> ScorerSettings:
        """Read CAC_REWARD_JUDGE, CAC_REWARD_FPS and so on, one variable for each field.

        Raises:
            ValueError: If CAC_REWARD_JUDGE is not set, or a value breaks its rule.
        """
        variables = {one.name: ENVIRONMENT + one.name.upper() for one in fields(cls)}
        given = {name: os.environ[key] for name, key in variables.items() if key in os.environ}
        if "judge" not in given:
            raise ValueError(
                f"{variables['judge']} must be set to the judge's folder, hub id or address (and "
                f"{variables['fps']} to the videos' rate), got an environment without it"
            )
        return cls.from_mapping(given, **framework)

    def load(self) -> Scorer:
        """The scorer of these settings; the same one each time."""
        with _LOADING:
            return _load(dataclasses.replace(self, fps=None, on_failure="raise"))

    def reward(self, *, layout: str = "FCHW", value_range: str = "0..1") -> VideoReward:
        """The scorer of these settings, for videos in this form."""
        return VideoReward(
            scorer=self.load(),
            fps=self.fps,
            layout=layout,
            value_range=value_range,
            on_failure=self.on_failure,
        )


@functools.cache
def _load(settings: ScorerSettings) -> Scorer:
    if settings.model is not None:
        options = JudgeOptions(judge=settings.model, endpoint=settings.judge, mode=settings.mode)
        return options.load()
    if settings.is_server:
        return RewardClient(settings.judge, token=os.environ.get(TOKEN_VARIABLE))
    names = ("judge", "device", "dtype", "attention", "revision", "mode")
    return JudgeOptions(**{name: getattr(settings, name) for name in names}).load()


def scorer_of(
    judge: str | Path | Scorer,
    *,
    device: object,
    dtype: object,
    mode: str = "full",
    revision: str | None = None,
    model: str | None = None,
) -> Scorer:
    """Take a scorer as it is, or load one as `ScorerSettings` do.

    Args:
        judge: a scorer, or where its judge is: folder, hub id or address.
        device: 'cpu', 'cuda:0' or a torch.device.
        dtype: 'bfloat16' or a torch.dtype.
        mode: as for `ScorerSettings`.
        revision: as for `ScorerSettings`.
        model: as for `ScorerSettings`.
    """
    if not isinstance(judge, str | Path):
        return judge
    return ScorerSettings(
        judge=str(judge),
        model=model,
        device=str(device),
        dtype=dtype_name(dtype),
        mode=mode,
        revision=revision,
    ).load()


def dtype_name(dtype: object) -> str:
    """'bfloat16' for torch.bfloat16 or for itself."""
    return str(dtype).removeprefix("torch.")


def _number_in(value: object) -> object:
    """A number given as text, or the value itself."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
