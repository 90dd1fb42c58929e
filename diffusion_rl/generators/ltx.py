"""LTX-Video text-to-video through diffusers' own LTXPipeline parts.

Axes as in `generators/base.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import LTXPipeline
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from torch import Tensor

from diffusion_rl.generators.pipeline import AbstractPipelineGenerator, check_flow_scheduler


class LtxGenerator(AbstractPipelineGenerator):
    """LTX-Video behind the loop's interface.

    The autoencoder of 0.9.1 and later draws noise; here always the same for every video.

    Args:
        pipeline: a loaded `LTXPipeline`.
        decode_timestep: noise level such an autoencoder takes the latent to have, in [0, 1].
        decode_noise_scale: share of noise put into the latent before, in [0, 1]; None is the same.
        **size: as `AbstractPipelineGenerator` takes it; fps also sets the positions in time.
    """

    pipeline_class = LTXPipeline

    def __init__(
        self,
        pipeline: LTXPipeline,
        *,
        decode_timestep: float = 0.0,
        decode_noise_scale: float | None = None,
        **size: Any,
    ) -> None:
        super().__init__(pipeline, **size)
        noise = decode_timestep if decode_noise_scale is None else decode_noise_scale
        for name, value in (("decode_timestep", decode_timestep), ("decode_noise_scale", noise)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
            if value and not pipeline.vae.config.timestep_conditioning:
                rule = "left out for an autoencoder without timestep_conditioning"
                raise ValueError(f"{name} must be {rule}, got {value}")
        self.decode_timestep, self.decode_noise_scale = decode_timestep, noise

    def check_pipeline(self) -> None:
        check_flow_scheduler(self.pipeline.scheduler)

    @property
    def compression(self) -> tuple[int, int]:
        vae = self.pipeline.vae
        return vae.temporal_compression_ratio, vae.spatial_compression_ratio

    @property
    def pixel_factor(self) -> int:
        # The pipeline asks for multiples of 32 whatever its parts could do.
        return math.lcm(32, self.compression[1])

    def schedule(self, scheduler: Any, num_steps: int) -> Tensor:
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        of_length = (scheduler.config[name] for name in names)
        shift = calculate_shift(math.prod(self.latent_shape[1:]), *of_length)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=shift)
        return scheduler.sigmas

    def encode_one(self, prompt: str) -> tuple[Tensor, dict[str, Tensor]]:
        embedding, mask, *_ = self.pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return embedding, {"encoder_attention_mask": mask}

    def velocity(
        self, latent: Tensor, sigma: Tensor, text: Tensor, extras: Mapping[str, Tensor]
    ) -> Tensor:
        frames, height, width = latent.shape[2:]
        time, space = self.compression
        output = self.pipeline.transformer(
            latent.flatten(2).transpose(1, 2).to(self.dtype),  # One token for each position.
            text,
            sigma * self.pipeline.scheduler.config.num_train_timesteps,
            **extras,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(time / self.fps, space, space),
            return_dict=False,
        )[0]
        return output.float().transpose(1, 2).unflatten(2, (frames, height, width))

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        vae = self.pipeline.vae
        own = self.pipeline._denormalize_latents(
            latent, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )
        videos = torch.cat([self._decode_one(one[None].to(vae.dtype)) for one in own])
        return self.pipeline.video_processor.postprocess_video(videos, output_type="pt").float()

    def _decode_one(self, latent: Tensor) -> Tensor:
        """[1 C T H W] to pixels in [-1, 1]; every video meets the same noise."""
        vae, timestep = self.pipeline.vae, None
        gpus = range(torch.cuda.device_count())  # All: manual_seed seeds those of judges, too.
        with torch.random.fork_rng(gpus):
            torch.manual_seed(0)
            if vae.config.timestep_conditioning:
                noise = torch.randn(latent.shape).to(latent)
                latent = latent + self.decode_noise_scale * (noise - latent)
                timestep = torch.tensor([self.decode_timestep]).to(latent)
            return vae.decode(latent, timestep, return_dict=False)[0]
