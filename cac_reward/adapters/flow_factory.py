"""Flow-Factory: a `PointwiseRewardModel` by dotted path, and the payload of its /compute route.

In its YAML, no code:

    rewards:
      - name: cac
        reward_model: cac_reward.adapters.flow_factory.CaCRewardModel
        judge: Qwen/Qwen3-VL-4B-Instruct
        fps: 16

Keys that Flow-Factory does not know reach the model as `config.extra_kwargs`; here they are the
fields of `ScorerSettings`. Videos are lists of tensors [T C H W] float in [0, 1], of any lengths.

Source:
    X-GenGroup/Flow-Factory, src/flow_factory/rewards/{abc,registry,reward_processor}.py,
    my_reward_remote.py (the client of /compute) and hparams/abc.py.
"""

from __future__ import annotations

import base64
import binascii
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cac_reward.adapters.base import Outcome, missing_package
from cac_reward.adapters.settings import ScorerSettings, dtype_name
from cac_reward.inputs import check_prompts, check_rate, frames_to_clip
from cac_reward.video import VideoLimits

FRAME_FORMATS = ("PNG", "JPEG")


def __getattr__(name: str) -> type:
    """`CaCRewardModel`, made when it is first asked for."""
    if name == "CaCRewardModel":
        return _reward_model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _reward_model_class() -> type:
    try:
        from flow_factory.rewards.abc import PointwiseRewardModel, RewardModelOutput
    except ImportError as error:
        how = "install X-GenGroup/Flow-Factory from its repository"
        raise missing_package("CaCRewardModel", "flow_factory", how) from error

    class CaCRewardModel(PointwiseRewardModel):
        """P(clean) of each video.

        Args:
            config: its extra_kwargs are the fields of `ScorerSettings`; `judge` and `fps` must be
                among them. Device and dtype are those of the config.
            accelerator: Flow-Factory's.
        """

        required_fields = ("prompt", "video")
        use_tensor_inputs = True

        def __init__(self, config: Any, accelerator: Any) -> None:
            super().__init__(config, accelerator)
            settings = ScorerSettings.from_mapping(
                config.extra_kwargs, device=str(self.device), dtype=dtype_name(self.dtype)
            )
            check_rate(settings.fps)
            self._reward = settings.reward()

        def __call__(
            self,
            prompt: Sequence[str],
            image: object = None,
            video: Sequence[Tensor] | Sequence[Sequence[Image.Image]] | Tensor | None = None,
            audio: object = None,
            condition_images: object = None,
            condition_videos: object = None,
            **kwargs: object,
        ) -> Any:
            """Rewards [B] float32 of B videos [T 3 H W], with the errors of those not judged."""
            if video is None:
                raise ValueError("video must be given, got None; CaC judges videos, not images")
            outcome = self._reward(video, prompt)
            return RewardModelOutput(
                rewards=outcome.scores.to(self.device), extra_info={"errors": list(outcome.errors)}
            )

    CaCRewardModel.__qualname__ = "CaCRewardModel"  # So that pickle finds it by __getattr__.
    return CaCRewardModel


@dataclass(frozen=True)
class ComputeRequest:
    """What a client of /compute asks."""

    videos: tuple[Tensor, ...]
    """B clips [F 3 H W] uint8 of any sizes, for `VideoReward(value_range='0..255')`."""
    prompts: tuple[str, ...]
    """What each was generated from."""
    fps: float | None
    """The videos' rate where the client states it; Flow-Factory's own payload has no place for it
    but its free `kwargs`."""


def parse_compute(payload: object, *, limits: VideoLimits = VideoLimits()) -> ComputeRequest:
    """Read the JSON body of POST /compute: {"prompt": [B], "video": [B][F] base64, "kwargs": {}}.

    Args:
        payload: the decoded JSON; frames are PNG or JPEG. Other media in it are not looked at.
        limits: checked on each picture's header before it is decoded.

    Raises:
        ValueError: Naming what is wrong with it.
    """
    if not isinstance(payload, Mapping):
        raise ValueError(f"payload must be an object, got {type(payload).__name__}")
    prompts, videos = payload.get("prompt"), payload.get("video")
    if not isinstance(videos, list) or not all(isinstance(one, list) for one in videos):
        raise ValueError("video must be a list of lists of base64 frames; CaC judges videos only")
    if not isinstance(prompts, list):
        raise ValueError(f"prompt must be a list of texts, got {type(prompts).__name__}")
    check_prompts(prompts, len(videos))
    options = {} if payload.get("kwargs") is None else payload["kwargs"]
    if not isinstance(options, Mapping):
        raise ValueError(f"kwargs must be an object or null, got {type(options).__name__}")
    fps = options.get("fps")
    return ComputeRequest(
        videos=tuple(
            _decode_frames(f"video[{row}]", one, limits) for row, one in enumerate(videos)
        ),
        prompts=tuple(prompts),
        fps=None if fps is None else check_rate(fps),
    )


def compute_reply(outcome: Outcome) -> dict[str, object]:
    """The JSON body of the answer: {"rewards": [B]}, or {"error": text}.

    The format has no word for a missing reward, and Flow-Factory's client raises on `error`; so one
    video that could not be judged fails the request, unless `on_failure` put a number in its place.
    """
    missing = outcome.scores.isnan().nonzero().flatten().tolist()
    if missing:
        return {"error": f"video {missing[0]} could not be judged: {outcome.errors[missing[0]]}"}
    return {"rewards": outcome.scores.tolist()}


def _decode_frames(name: str, frames: Sequence[object], limits: VideoLimits) -> Tensor:
    """[F 3 H W] uint8 of base64 pictures; sizes are checked before pixels are decoded."""
    pictures = []
    for index, text in enumerate(frames):
        here = f"{name}[{index}]"
        if not isinstance(text, str):
            raise ValueError(f"{here} must be base64 text, got {type(text).__name__}")
        try:
            raw = base64.b64decode(text, validate=True)
            picture = Image.open(io.BytesIO(raw), formats=FRAME_FORMATS)
            limits.check(here, len(frames), picture.height, picture.width)
            pictures.append(picture.convert("RGB"))
        except (binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{here} must be a base64 {' or '.join(FRAME_FORMATS)} picture, got {error}"
            ) from error
    if len(pictures) < 2:
        raise ValueError(f"{name} must have at least 2 frames, got {len(pictures)}")
    return frames_to_clip(pictures).contiguous().to(torch.uint8)
