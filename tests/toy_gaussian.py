"""A generator with a known answer: clips of one noisy colour, drawn by the exact velocity.

Data are N(0, SPREAD^2) in every latent position, so the best velocity has a closed form; one
linear layer on top of it, zero at first, carries the LoRA and can shift any colour.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.lora import LoraSettings

SPREAD = 0.5
LORA = LoraSettings(rank=2, alpha=2, targets=("shift",))


class ToyTransformer(nn.Module):
    """Exact velocity of the Gaussian plus a linear layer of (latent, sigma, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Linear(5, 3, bias=False)
        nn.init.zeros_(self.shift.weight)

    def forward(self, latent: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Velocity [B 3 T H W]; `text` [B] moves the mean of the data."""
        level = sigma.view(-1, 1, 1, 1, 1)
        centred = latent - (1 - level) * text.view(-1, 1, 1, 1, 1)
        variance = (1 - level) ** 2 * SPREAD**2 + level**2
        velocity = (level - (1 - level) * SPREAD**2) / variance * centred
        velocity = velocity - text.view(-1, 1, 1, 1, 1)
        known = torch.stack(
            [level[:, 0].expand_as(latent[:, 0]), torch.ones_like(latent[:, 0])], -1
        )
        features = torch.cat([latent.movedim(1, -1), known], -1)
        return velocity + self.shift(features).movedim(-1, 1)


class ToyGenerator(AbstractVideoGenerator):
    """Videos of 4 frames of 4 x 4 pixels; pixel = 1/2 + latent / 4, so the mean is grey."""

    def __init__(self) -> None:
        self.transformer = ToyTransformer().requires_grad_(False)
        self.fps, self.num_frames, self.height, self.width = 8.0, 4, 4, 4
        self.released = False

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return 3, self.num_frames, self.height, self.width

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
        bright = torch.tensor([[["bright" in prompt]] for prompt in prompts]).float()
        return PromptEmbeddings(0.4 * bright, torch.zeros(1, 1, 1))

    def release_text_encoder(self) -> None:
        self.released = True

    def sigmas(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1)

    def predict(
        self, latent: Tensor, sigma: Tensor, embeddings: PromptEmbeddings, guidance_scale: float
    ) -> Tensor:
        level = sigma.expand(len(latent))
        text = embeddings.conditional.flatten()
        conditional = self.transformer(latent, level, text)
        if guidance_scale == 1.0:
            return conditional
        empty = self.transformer(latent, level, embeddings.unconditional.expand(len(latent), 1, 1))
        return empty + guidance_scale * (conditional - empty)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        return (0.5 + latent / 4).clamp(0, 1).transpose(1, 2)
