"""Wan 2.1 text-to-video through diffusers' own WanPipeline parts.

Axes as in `generators/base.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from diffusers import WanPipeline
from torch import Tensor

from diffusion_rl.generators.pipeline import AbstractPipelineGenerator, check_flow_scheduler


class WanGenerator(AbstractPipelineGenerator):
    """Wan 2.1 behind the loop's interface.

    A pipeline whose scheduler is `FlowMatchEulerDiscreteScheduler` gives the very same videos as
    the rollout; one with UniPC differs by its higher-order corrections. Without
    `batched_guidance` they are equal to the last bit.
    """

    pipeline_class = WanPipeline

    def check_pipeline(self) -> None:
        if self.pipeline.transformer is None or self.pipeline.transformer_2 is not None:
            raise ValueError(
                "pipeline must have exactly one transformer (Wan 2.1 text-to-video), got a "
                "two-stage Wan 2.2 pipeline; use generator.family=wan2.2"
            )
        if self.pipeline.config.expand_timesteps:
            raise ValueError(
                "pipeline must have expand_timesteps=False (Wan 2.1), got True (Wan 2.2); use "
                "generator.family=wan2.2"
            )
        check_flow_scheduler(self.pipeline.scheduler)

    @property
    def compression(self) -> tuple[int, int]:
        return self.pipeline.vae_scale_factor_temporal, self.pipeline.vae_scale_factor_spatial

    @property
    def pixel_factor(self) -> int:
        # The pipeline asks for multiples of 16 whatever its parts could do.
        patch = self.pipeline.transformer.config.patch_size
        return math.lcm(16, *(self.compression[1] * size for size in patch[1:]))

    def velocity(
        self, latent: Tensor, sigma: Tensor, text: Tensor, extras: Mapping[str, Tensor]
    ) -> Tensor:
        timestep = sigma * self.pipeline.scheduler.config.num_train_timesteps
        inputs = (latent.to(self.dtype), timestep, text)
        return self.pipeline.transformer(*inputs, return_dict=False)[0].float()

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latent = latent.to(vae.device, vae.dtype)
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(latent)
        # Divided by a reciprocal, as WanPipeline does, so that the videos agree to the last bit.
        inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(latent)
        decoded = vae.decode(latent / inverse_std + mean, return_dict=False)[0]
        return self.pipeline.video_processor.postprocess_video(decoded, output_type="pt").float()
