"""Wan 2.1 text-to-video through diffusers' own WanPipeline parts.

Axes as in `generators/base.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a WanPipeline loads; a hub repository also holds pictures and original checkpoints.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


class WanGenerator(AbstractVideoGenerator):
    """Wan behind the loop's interface; the pipeline stays a stock `WanPipeline`.

    The rollout takes Euler steps over the pipeline's own sigmas. A pipeline whose scheduler is
    `FlowMatchEulerDiscreteScheduler` therefore gives the very same videos; one with UniPC differs
    by its higher-order corrections.

    Args:
        pipeline: a loaded `WanPipeline` with one transformer.
        height: pixels, a multiple of 16.
        width: pixels, a multiple of 16.
        num_frames: frames of a video, 1 more than a multiple of the autoencoder's time factor.
        fps: frames per second the model was trained at.
        max_sequence_length: text tokens a prompt is padded or cut to.
        batched_guidance: one pass of 2 B for guidance, the faster way; False takes two passes of
            B as `WanPipeline` does, half the memory and equal to it to the last bit.
    """

    transformer: WanTransformer3DModel

    def __init__(
        self,
        pipeline: WanPipeline,
        *,
        height: int,
        width: int,
        num_frames: int,
        fps: float,
        max_sequence_length: int,
        batched_guidance: bool = True,
    ) -> None:
        _check_pipeline(pipeline)
        patch = pipeline.transformer.config.patch_size
        factors = {
            "height": (height, pipeline.vae_scale_factor_spatial * patch[1]),
            "width": (width, pipeline.vae_scale_factor_spatial * patch[2]),
        }
        for name, (value, factor) in factors.items():
            if value < factor or value % factor or value % 16:
                rule = f"a positive multiple of {factor} and of 16"
                raise ValueError(f"{name} must be {rule}, got {value}")
        if num_frames < 1 or (num_frames - 1) % pipeline.vae_scale_factor_temporal:
            raise ValueError(
                f"num_frames must be 1 more than a multiple of "
                f"{pipeline.vae_scale_factor_temporal}, got {num_frames}"
            )
        self.pipeline = pipeline
        self.transformer = pipeline.transformer
        self.height, self.width, self.num_frames, self.fps = height, width, num_frames, fps
        self.max_sequence_length = max_sequence_length
        self.batched_guidance = batched_guidance
        for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
            part.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        local_path: str | Path | None = None,
        revision: str | None = None,
        **size: Any,
    ) -> WanGenerator:
        """Load a `WanPipeline` folder, or a hub model from the cache or the network.

        Args:
            path_or_hub_id: a folder, or an id such as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`.
            dtype: of transformer and text encoder; the autoencoder stays in float32, where its
                decoding is stable.
            device: `cpu`, `cuda`, `cuda:1`, ...
            local_path: a folder to read instead of the hub; the id stays as the name.
            revision: of the hub model.
            **size: height, width, num_frames, fps, max_sequence_length.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        folder = _find_folder(path_or_hub_id, local_path, revision)
        dtypes = {"default": DTYPES[dtype], "vae": torch.float32}
        pipeline = WanPipeline.from_pretrained(folder, dtype=dtypes, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline.to(device), **size)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return (
            self.transformer.config.in_channels,
            (self.num_frames - 1) // self.pipeline.vae_scale_factor_temporal + 1,
            self.height // self.pipeline.vae_scale_factor_spatial,
            self.width // self.pipeline.vae_scale_factor_spatial,
        )

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
        if self.pipeline.text_encoder is None:
            raise RuntimeError(
                "encode_prompts must be called before release_text_encoder; "
                "the text encoder is gone, load the generator again for other prompts"
            )
        if not prompts:
            raise ValueError("prompts must be at least one text, got none")
        rows = [self._encode(prompt) for prompt in prompts]
        return PromptEmbeddings(torch.cat(rows), self._encode(""))

    def _encode(self, prompt: str) -> Tensor:
        embedding, _ = self.pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return embedding

    def release_text_encoder(self) -> None:
        self.pipeline.text_encoder = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def sigmas(self, num_steps: int) -> Tensor:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.to(torch.float32)

    def predict(
        self, latent: Tensor, sigma: Tensor, embeddings: PromptEmbeddings, guidance_scale: float
    ) -> Tensor:
        sigma = sigma.to(latent.device, torch.float32).expand(len(latent))
        timestep = sigma * self.pipeline.scheduler.config.num_train_timesteps
        text = embeddings.conditional.to(latent.device, self.transformer.dtype)
        latent = latent.to(self.transformer.dtype)
        if guidance_scale == 1.0:
            return self._velocity(latent, timestep, text)
        empty = embeddings.unconditional.to(text).expand_as(text)
        if self.batched_guidance:
            both = self._velocity(
                torch.cat([latent, latent]),
                torch.cat([timestep, timestep]),
                torch.cat([text, empty]),
            )
            conditional, unconditional = both.chunk(2)
        else:
            conditional = self._velocity(latent, timestep, text)
            unconditional = self._velocity(latent, timestep, empty)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _velocity(self, latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.transformer(latent, timestep, text, return_dict=False)[0].float()

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latent = latent.to(vae.device, vae.dtype)
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(latent)
        # Divided by a reciprocal, as WanPipeline does, so that the videos agree to the last bit.
        inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(latent)
        decoded = vae.decode(latent / inverse_std + mean, return_dict=False)[0]
        return self.pipeline.video_processor.postprocess_video(decoded, output_type="pt").float()


def _check_pipeline(pipeline: WanPipeline) -> None:
    """Refuse a pipeline this family's interface would run wrongly."""
    if pipeline.transformer is None or getattr(pipeline, "transformer_2", None) is not None:
        raise ValueError(
            "pipeline must have exactly one transformer (Wan 2.1 text-to-video), "
            "got a two-stage Wan 2.2 pipeline"
        )
    if pipeline.config.expand_timesteps:
        raise ValueError("pipeline must have expand_timesteps=False (Wan 2.1), got True (Wan 2.2)")
    config = pipeline.scheduler.config
    flow = "FlowMatch" in type(pipeline.scheduler).__name__ or config.get("use_flow_sigmas")
    if not flow:
        raise ValueError(
            "pipeline.scheduler must be a flow-matching one (FlowMatchEulerDiscreteScheduler, or "
            f"UniPC with use_flow_sigmas), got {type(pipeline.scheduler).__name__}"
        )


def _find_folder(
    path_or_hub_id: str | Path, local_path: str | Path | None, revision: str | None
) -> str:
    """The folder to load from; one error names the id, the cache and the way round the hub."""
    folder = Path(local_path or path_or_hub_id)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"generator.path must be a diffusers pipeline folder with a model_index.json, "
                f"got {folder}"
            )
        return str(folder)
    if local_path is not None:
        raise FileNotFoundError(f"--local-path must be an existing folder, got {local_path}")
    try:
        return snapshot_download(
            str(path_or_hub_id), revision=revision, allow_patterns=HUB_FILES, etag_timeout=5
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"generator.path must be a folder or a reachable hub id, got {path_or_hub_id}; "
            f"it is neither a folder, nor in the cache {HF_HUB_CACHE}, nor reachable on the hub "
            f"({type(error).__name__}); download it elsewhere and pass --local-path FOLDER"
        ) from error
