"""CogVideoX text-to-video: a v-predicting diffusion model in the terms of flow matching.

Axes as in `generators/base.py`. The model's own latent is alpha * data + beta * noise, with alpha^2
= alphas_cumprod = 1 - beta^2, and it predicts alpha * noise - beta * data. Divided by alpha + beta
that latent is the loop's, at sigma = beta / (alpha + beta). Nothing is approximated: the loop's
deterministic step is DDIM's, and its step `ddim` is DDPO's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import CogVideoXPipeline
from torch import Tensor

from diffusion_rl.generators.pipeline import AbstractPipelineGenerator

# What all published checkpoints have; with it the schedule runs from pure noise to data.
SCHEDULER = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
}


class CogVideoXGenerator(AbstractPipelineGenerator):
    """CogVideoX 2B, 5B and 1.5 behind the loop's interface.

    Videos are those of `CogVideoXDDIMScheduler` where the steps divide the training timesteps.
    """

    pipeline_class = CogVideoXPipeline

    def check_pipeline(self) -> None:
        scheduler, length = self.pipeline.scheduler, self.max_sequence_length
        for name, value in SCHEDULER.items():
            if scheduler.config.get(name) != value:
                raise ValueError(
                    f"pipeline.scheduler must have {name}={value}, got "
                    f"{scheduler.config.get(name)} of {type(scheduler).__name__}; CogVideoX is a "
                    "diffusion model: use CogVideoXDDIMScheduler with its checkpoint's settings"
                )
        longest = self.pipeline.transformer.config.max_text_seq_length
        if length != longest:
            raise ValueError(f"max_sequence_length must be the model's {longest}, got {length}")

    @property
    def compression(self) -> tuple[int, int]:
        return self.pipeline.vae_scale_factor_temporal, self.pipeline.vae_scale_factor_spatial

    @property
    def pixel_factor(self) -> int:
        return self.compression[1] * self.pipeline.transformer.config.patch_size

    @property
    def frame_factor(self) -> int:
        # Of an even number of latent frames the autoencoder makes too many frames.
        return 2 * self.compression[0]

    @property
    def padding(self) -> int:
        """Latent frames put before the video's own, so that CogVideoX 1.5 can pair them."""
        return -super().latent_shape[1] % (self.pipeline.transformer.config.patch_size_t or 1)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        channels, frames, height, width = super().latent_shape
        return channels, frames + self.padding, height, width

    @property
    def frame_groups(self) -> tuple[range, ...]:
        size, frames = self.compression[0], super().latent_shape[1]
        later = (range(1 + size * i, 1 + size * (i + 1)) for i in range(frames - 1))
        return (*[range(0)] * self.padding, range(1), *later)

    @property
    def levels(self) -> Tensor:
        """Noise level of each training timestep, ascending, in float32."""
        kept = self.pipeline.scheduler.alphas_cumprod.double()
        return ((1 - kept).sqrt() / (kept.sqrt() + (1 - kept).sqrt())).float()

    def schedule(self, scheduler: Any, num_steps: int) -> Tensor:
        scheduler.set_timesteps(num_steps)
        return torch.cat([self.levels[scheduler.timesteps.cpu()], torch.zeros(1)])

    def timestep(self, sigma: Tensor) -> Tensor:
        """Timesteps [B] of noise levels; between two levels, the share of the way."""
        levels = self.levels.to(sigma)
        upper = torch.searchsorted(levels, sigma.contiguous()).clamp(1, len(levels) - 1)
        share = (sigma - levels[upper - 1]) / (levels[upper] - levels[upper - 1])
        return (upper - 1 + share).clamp(0, len(levels) - 1)

    def velocity(
        self, latent: Tensor, sigma: Tensor, text: Tensor, extras: Mapping[str, Tensor]
    ) -> Tensor:
        level = sigma.view(-1, 1, 1, 1, 1)
        norm = torch.sqrt((1 - level) ** 2 + level**2)  # 1 / (alpha + beta)
        alpha, beta, own = (1 - level) / norm, level / norm, latent / norm
        config, rotary = self.pipeline.transformer.config, None
        if config.use_rotary_positional_embeddings:
            shape = (self.height, self.width, latent.shape[2], latent.device)
            rotary = self.pipeline._prepare_rotary_positional_embeddings(*shape)
        # It wants [B T C H W].
        inputs = (own.transpose(1, 2).to(self.dtype), text, self.timestep(sigma))
        options = {"image_rotary_emb": rotary, "return_dict": False}
        prediction = self.pipeline.transformer(*inputs, **options)[0].float().transpose(1, 2)
        data = alpha * own - beta * prediction
        noise = beta * own + alpha * prediction
        return noise - data

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latent = latent[:, :, self.padding :].to(vae.device, vae.dtype)
        decoded = vae.decode(1 / vae.config.scaling_factor * latent, return_dict=False)[0]
        return self.pipeline.video_processor.postprocess_video(decoded, output_type="pt").float()
