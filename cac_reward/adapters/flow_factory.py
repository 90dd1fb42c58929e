"""Flow-Factory: a `PointwiseRewardModel` by dotted path.

In its YAML, no code:

    rewards:
      - name: cac
        reward_model: cac_reward.adapters.flow_factory.CaCRewardModel
        judge: Qwen/Qwen3-VL-4B-Instruct
        fps: 16

Keys that Flow-Factory does not know reach the model as `config.extra_kwargs`; here they are the
fields of `ScorerSettings`. Videos are lists of tensors [T C H W] float in [0, 1], of any lengths.

Source:
    X-GenGroup/Flow-Factory, src/flow_factory/rewards/{abc,registry,reward_processor}.py and
    hparams/abc.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from cac_reward.adapters.base import missing_package
from cac_reward.adapters.settings import ScorerSettings, dtype_name
from cac_reward.inputs import check_rate


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
