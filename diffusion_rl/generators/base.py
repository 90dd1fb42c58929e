"""What the training loop needs of a text-to-video generator.

Axes: N prompts, B videos, K denoising steps, L text tokens, D text channels, F frames,
latents [B C T H W] with T latent frames, videos [B F C H W].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PromptEmbeddings:
    """Text as the transformer reads it, so that every prompt is encoded once in a run."""

    conditional: Tensor
    """[N L D], one row for each prompt."""
    unconditional: Tensor
    """[1 L D], the empty prompt, for guidance."""

    def __len__(self) -> int:
        return len(self.conditional)

    def __getitem__(self, index: Tensor) -> PromptEmbeddings:
        """Rows `index` ([B] long); the same prompt may be taken many times."""
        index = index.to(self.conditional.device)
        return PromptEmbeddings(self.conditional[index], self.unconditional)


class AbstractVideoGenerator(ABC):
    """A flow-matching generator taken apart: embed, start, predict, decode.

    A latent at noise level sigma is (1 - sigma) * data + sigma * noise, and the prediction is
    the velocity noise - data. The transformer is the part that learns.
    """

    transformer: nn.Module
    """Predicts the velocity; carries the LoRA."""
    fps: float
    """Frames per second of the decoded videos."""
    num_frames: int
    """Frames of a decoded video."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""

    @property
    def device(self) -> torch.device:
        """Where the transformer is, and with it the latents."""
        return next(self.transformer.parameters()).device

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one video's latent."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Embed the prompts and the empty prompt."""

    @abstractmethod
    def release_text_encoder(self) -> None:
        """Free the text encoder's memory; `encode_prompts` is refused from then on."""

    @abstractmethod
    def sigmas(self, num_steps: int) -> Tensor:
        """Noise levels [K+1] of a K-step schedule in float32, from about 1 down to 0."""

    @abstractmethod
    def predict(
        self, latent: Tensor, sigma: Tensor, embeddings: PromptEmbeddings, guidance_scale: float
    ) -> Tensor:
        """Velocity [B C T H W] in float32, gradient through the transformer's LoRA.

        prediction = unconditional + guidance_scale * (conditional - unconditional)

        Args:
            latent: [B C T H W] float32.
            sigma: 0-d, or [B] for a noise level of its own for each video.
            embeddings: one row for each of the B videos.
            guidance_scale: 1.0 means no guidance (one pass of B instead of one pass of 2 B).
        """

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Videos [B F C H W], float32 in [0, 1]; no gradient."""

    def initial_latents(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal noise [B C T H W]; a seed gives the same noise in any batch."""
        noise = [
            torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(int(seed)))
            for seed in seeds
        ]
        return torch.stack(noise).to(self.device)
