"""Wan 2.2 text-to-video: A14B with two transformers, TI2V-5B with a timestep for each token.

Axes as in `generators/base.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_rl.generators.base import LORA_FILE, SECOND_LORA_FILE
from diffusion_rl.generators.pipeline import check_flow_scheduler
from diffusion_rl.generators.wan import WanGenerator
from diffusion_rl.sharding import rows_in_step

LEARNERS = ("high", "low", "both")


class Wan22Generator(WanGenerator):
    """Wan 2.2 behind the loop's interface.

    Of the two transformers of A14B the first predicts at noise levels of `boundary_ratio` and
    above, the second below. Steps that are not the learner's are taken, but never learn.

    Args:
        pipeline: a loaded `WanPipeline` of Wan 2.2.
        learns: `high`, `low` or `both` transformers of A14B; None is both. A LoRA of the second
            is saved in a file of its own, which `load_lora_weights` reads with
            `load_into_transformer_2=True`. TI2V-5B has one transformer and takes None.
        guidance_scale_2: guidance of the second transformer where there is guidance at all, at
            least 1; None is that of the first.
        **size: as `AbstractPipelineGenerator` takes it.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        learns: str | None = None,
        guidance_scale_2: float | None = None,
        **size: Any,
    ) -> None:
        super().__init__(pipeline, **size)
        self.guidance_scale_2 = guidance_scale_2
        if guidance_scale_2 is not None and not 1 <= guidance_scale_2 < math.inf:
            raise ValueError(
                f"guidance_scale_2 must be at least 1 and finite, got {guidance_scale_2}"
            )
        if pipeline.transformer_2 is None:
            for name, value in (("learns", learns), ("guidance_scale_2", guidance_scale_2)):
                if value is not None:
                    raise ValueError(
                        f"{name} must be left out for a pipeline with one transformer, got {value}"
                    )
            return
        boundary, second = pipeline.config.boundary_ratio, pipeline.transformer_2
        if learns not in (None, *LEARNERS):
            raise ValueError(f"learns must be one of {', '.join(LEARNERS)}, got {learns}")
        if learns == "high":
            self.learning_sigmas, self.idle = (boundary, math.inf), (second,)
        elif learns == "low":
            self.transformer, self.learning_sigmas = second, (0.0, boundary)
            self.idle = (pipeline.transformer,)
            self.lora_files = {SECOND_LORA_FILE: ""}
        else:
            self.transformer = nn.ModuleDict({"high": pipeline.transformer, "low": second})
            self.lora_files = {LORA_FILE: "high", SECOND_LORA_FILE: "low"}

    def check_pipeline(self) -> None:
        pipeline = self.pipeline
        two = pipeline.transformer_2 is not None
        if pipeline.transformer is None or two == (pipeline.config.boundary_ratio is None):
            raise ValueError(
                "pipeline must have a transformer, and a second one exactly where it has a "
                f"boundary_ratio, got boundary_ratio={pipeline.config.boundary_ratio} and "
                f"{'a' if two else 'no'} transformer_2; load the whole pipeline"
            )
        if not two and not pipeline.config.expand_timesteps:
            raise ValueError(
                "pipeline must be of Wan 2.2 (two transformers, or expand_timesteps=True), got "
                "one of Wan 2.1; use generator.family=wan"
            )
        check_flow_scheduler(pipeline.scheduler)

    def guidance_at(self, sigma: Tensor, guidance_scale: float) -> float | Tensor:
        if self.guidance_scale_2 is None:
            return guidance_scale
        high = sigma >= self.pipeline.config.boundary_ratio
        scale = torch.full_like(sigma, self.guidance_scale_2).masked_fill(high, guidance_scale)
        return scale.view(-1, 1, 1, 1, 1)

    def velocity(
        self, latent: Tensor, sigma: Tensor, text: Tensor, extras: Mapping[str, Tensor]
    ) -> Tensor:
        timestep = sigma * self.pipeline.scheduler.config.num_train_timesteps
        if self.pipeline.config.expand_timesteps:
            # All alike: only an image to start from would set a frame's tokens to 0. The pipeline
            # counts patches of 2 x 2 whatever the transformer's are.
            _, _, frames, height, width = latent.shape
            tokens = frames * math.ceil(height / 2) * math.ceil(width / 2)
            timestep = timestep[:, None].expand(-1, tokens)
        parts = (latent.to(self.dtype), timestep, text)
        first, second = self.pipeline.transformer, self.pipeline.transformer_2
        if second is None:
            return first(*parts, return_dict=False)[0].float()
        high = sigma >= self.pipeline.config.boundary_ratio
        velocity, sides = torch.empty_like(latent), (high, ~high)
        passing = rows_in_step(self.transformer, sides)
        for own, rows, transformer in zip(sides, passing, (first, second), strict=True):
            if len(rows):
                made = transformer(*(part[rows] for part in parts), return_dict=False)[0]
                velocity[own] = made[: int(own.sum())].float()
        return velocity
