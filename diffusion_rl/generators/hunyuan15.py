"""HunyuanVideo 1.5 text-to-video through diffusers' own HunyuanVideo15Pipeline parts.

Axes as in `generators/base.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import HunyuanVideo15Pipeline
from torch import Tensor

from diffusion_rl.generators.pipeline import AbstractPipelineGenerator, check_flow_scheduler


class HunyuanVideo15Generator(AbstractPipelineGenerator):
    """HunyuanVideo 1.5 behind the loop's interface.

    The pipeline keeps its guidance in its guider; here the rollout's counts, and 1 is right for
    the distilled checkpoints. A prompt's max_sequence_length becomes the pipeline's too (its own
    is 1000); what it reads besides, text in quotation marks, keeps the pipeline's length.
    """

    pipeline_class = HunyuanVideo15Pipeline
    text_encoders = ("text_encoder", "text_encoder_2")

    def check_pipeline(self) -> None:
        check_flow_scheduler(self.pipeline.scheduler)
        channels, inputs = (
            getattr(self.pipeline.transformer.config, name)
            for name in ("out_channels", "in_channels")
        )
        if inputs != 2 * channels + 1:
            raise ValueError(
                f"pipeline.transformer must have 2 * out_channels + 1 = {2 * channels + 1} "
                f"in_channels (latent, first frame, mask), got {inputs}"
            )
        self.pipeline.tokenizer_max_length = self.max_sequence_length

    @property
    def compression(self) -> tuple[int, int]:
        return self.pipeline.vae_scale_factor_temporal, self.pipeline.vae_scale_factor_spatial

    @property
    def pixel_factor(self) -> int:
        return self.compression[1] * self.pipeline.transformer.config.patch_size

    def schedule(self, scheduler: Any, num_steps: int) -> Tensor:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, num_steps + 1)[:-1])
        return scheduler.sigmas

    def encode_one(self, prompt: str) -> tuple[Tensor, dict[str, Tensor]]:
        embedding, mask, quoted, quoted_mask = self.pipeline.encode_prompt(
            prompt, device=self.device, dtype=self.dtype
        )
        return embedding, {
            "encoder_attention_mask": mask,
            "encoder_hidden_states_2": quoted,
            "encoder_attention_mask_2": quoted_mask,
        }

    def velocity(
        self, latent: Tensor, sigma: Tensor, text: Tensor, extras: Mapping[str, Tensor]
    ) -> Tensor:
        timestep = sigma * self.pipeline.scheduler.config.num_train_timesteps
        # No image to start from: neither its latent, nor its mask, nor its embedding.
        parts = (latent, torch.zeros_like(latent), torch.zeros_like(latent[:, :1]))
        image = (self.pipeline.vision_num_semantic_tokens, self.pipeline.vision_states_dim)
        return self.pipeline.transformer(
            torch.cat(parts, dim=1).to(self.dtype),
            timestep.to(self.dtype),  # As the pipeline rounds it.
            text,
            **extras,
            image_embeds=torch.zeros(len(latent), *image, dtype=self.dtype, device=latent.device),
            return_dict=False,
        )[0].float()

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latent = latent.to(vae.device, vae.dtype) / vae.config.scaling_factor
        # One by one: its attention takes no batch in diffusers 0.42.1.
        videos = torch.cat([vae.decode(one[None], return_dict=False)[0] for one in latent])
        return self.pipeline.video_processor.postprocess_video(videos, output_type="pt").float()
