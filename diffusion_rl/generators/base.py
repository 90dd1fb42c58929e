"""What the training loop needs of a text-to-video generator.

Axes: N prompts, B videos, K denoising steps, L text tokens, D text channels, F frames,
latents [B C T H W] with T latent frames, videos [B F C H W].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

# The name that diffusers gives a LoRA by default, and ours for a second transformer's.
LORA_FILE = "pytorch_lora_weights.safetensors"
SECOND_LORA_FILE = "pytorch_lora_weights_2.safetensors"


@dataclass(frozen=True)
class PromptEmbeddings:
    """Text as the transformer reads it, so that every prompt is encoded once in a run."""

    conditional: Tensor
    """[N L D], one row for each prompt."""
    unconditional: Tensor
    """[1 L D], the empty prompt, for guidance."""
    conditional_extras: Mapping[str, Tensor] = field(default_factory=dict)
    """[N ...] further text inputs by the transformer's names for them: masks, a second encoder."""
    unconditional_extras: Mapping[str, Tensor] = field(default_factory=dict)
    """[1 ...] the same of the empty prompt."""

    def __len__(self) -> int:
        return len(self.conditional)

    def __getitem__(self, index: Tensor) -> PromptEmbeddings:
        """Rows `index` ([B] long); the same prompt may be taken many times."""
        index = index.to(self.conditional.device)
        extras = {name: value[index] for name, value in self.conditional_extras.items()}
        return PromptEmbeddings(
            self.conditional[index], self.unconditional, extras, self.unconditional_extras
        )


class AbstractVideoGenerator(ABC):
    """A generator taken apart, in the terms of flow matching: embed, start, predict, decode.

    A latent at noise level sigma is (1 - sigma) * data + sigma * noise, and the prediction is
    the velocity noise - data. The transformer is the part that learns.
    """

    transformer: nn.Module
    """Predicts the velocity; carries the LoRA. Where two transformers learn, a ModuleDict of
    both."""
    lora_files: Mapping[str, str] = MappingProxyType({LORA_FILE: ""})
    """Files of a saved LoRA, and the place in `transformer` of the part that each is for."""
    learning_sigmas: tuple[float, float] = (0.0, math.inf)
    """Noise levels, from the first up to but without the second, at which `transformer` predicts;
    all, but for a generator of which only one of two transformers learns."""
    idle: tuple[nn.Module, ...] = ()
    """Transformers that predict at other noise levels, and never learn."""
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

    @property
    def frame_groups(self) -> tuple[range, ...]:
        """The frames of the video that each latent frame stands for.

        Of a causal autoencoder, which all families have: the first frame alone, then groups of
        equal size. A family that cuts latent frames off before decoding gives those an empty range.
        """
        later = self.latent_shape[1] - 1
        size = (self.num_frames - 1) // later if later else 0
        if size * later != self.num_frames - 1:
            raise ValueError(
                f"frame_groups must be given by a generator whose {self.num_frames} frames are not "
                f"one and {later} equal groups, got none from {type(self).__name__}"
            )
        return (range(1), *(range(1 + size * i, 1 + size * (i + 1)) for i in range(later)))

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

    def learning_steps(self, sigmas: Tensor) -> list[int]:
        """Places of the steps of a schedule [K+1] whose prediction comes from what learns."""
        low, high = self.learning_sigmas
        return [place for place, sigma in enumerate(sigmas[:-1].tolist()) if low <= sigma < high]

    def learning_schedule(self, sigmas: Tensor) -> Tensor:
        """The part of a schedule [K+1] within `learning_sigmas`, its ends put at their edge."""
        low, high = (torch.tensor(level).to(sigmas) for level in self.learning_sigmas)
        first = torch.minimum(sigmas[0], torch.nextafter(high, torch.zeros_like(high)))
        last = torch.maximum(sigmas[-1], low)
        between = sigmas[(sigmas < first) & (sigmas > last)]
        return torch.cat([first[None], between, last[None]])
