"""Clips as the generator would have drawn them, with the renderer's truth still holding.

Each training clip passes through the autoencoder; a second copy is partly noised in latent space
and denoised by the toy generator at its own prompt. A copy is kept only while every object region
stays close to the render, so that planted faults survive and no new ones slip in unlabelled.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from torch import Tensor
from tqdm import tqdm

from examples.toy_world.train_generator import TEXT_LENGTH
from examples.toy_world.training_state import clips_to_tensor, render_batch, save_state
from examples.toy_world.world import Clip

STAGE = 4
BANK = 8_192
BATCH = 64
STEPS = 10
GUIDANCE = 3.0
STRENGTHS = (0.15, 0.55)
MAX_MEAN_ERROR = 0.06
MAX_FRAME_ERROR = 0.13


class LatentEditor:
    """Autoencoder and generator as one instrument: round trips and partial re-generation."""

    def __init__(self, generator: Path) -> None:
        self.pipeline = WanPipeline.from_pretrained(generator)
        self.pipeline.set_progress_bar_config(disable=True)
        settings = self.pipeline.vae.config
        self.mean = torch.tensor(settings.latents_mean).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(settings.latents_std).view(1, -1, 1, 1, 1)

    @torch.no_grad()
    def encode(self, clips: list[Clip]) -> Tensor:
        """Normalised latents [B C T H W]."""
        video = clips_to_tensor(clips)
        return (self.pipeline.vae.encode(video).latent_dist.mode() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latent: Tensor) -> np.ndarray:
        """[B F H W 3] uint8."""
        video = self.pipeline.vae.decode(latent * self.std + self.mean).sample
        frames = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return frames.permute(0, 2, 3, 4, 1).contiguous().numpy()

    @torch.no_grad()
    def redraw(self, latent: Tensor, prompts: list[str], start: int, seed: int) -> Tensor:
        """Noise latents to the level of denoising step `start` of STEPS and denoise them again."""
        pipeline = self.pipeline
        pipeline.scheduler.set_timesteps(STEPS)
        sigmas = pipeline.scheduler.sigmas
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
        state = (1 - sigmas[start]) * latent + sigmas[start] * noise
        text, blank = pipeline.encode_prompt(
            prompts, "", True, max_sequence_length=TEXT_LENGTH, device=torch.device("cpu")
        )
        both = torch.cat([text, blank])
        for step in range(start, STEPS):
            time = (sigmas[step] * 1000).expand(2 * len(latent))
            velocity = pipeline.transformer(torch.cat([state, state]), time, both).sample
            wanted, free = velocity.chunk(2)
            guided = free + GUIDANCE * (wanted - free)
            state = state + (sigmas[step + 1] - sigmas[step]) * guided
        return state


def truth_errors(clip: Clip, frames: np.ndarray) -> tuple[float, float]:
    """Mean and worst per-frame absolute error, in [0, 1], inside the regions of all objects."""
    size = frames.shape[1]
    difference = np.abs(frames.astype(np.float32) - clip.frames).mean(3) / 255
    errors = []
    for track in clip.tracks:
        for frame in range(len(frames)):
            x1, y1, x2, y2 = (np.array(track.box(frame)) * size).round().astype(int)
            patch = difference[frame, y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
            if patch.size:
                errors.append(patch.mean())
    return float(np.mean(errors)), float(np.max(errors))


def build_judge_bank(generator: Path, file: Path, count: int = BANK) -> dict[str, float]:
    """Write {"decoded", "redrawn", "kept"}: uint8 [N F H W 3] twice and whether truth survived."""
    editor = LatentEditor(generator)
    editor.pipeline.scheduler.set_timesteps(STEPS)
    sigmas = editor.pipeline.scheduler.sigmas
    allowed = [i for i in range(STEPS) if STRENGTHS[0] <= sigmas[i] <= STRENGTHS[1]]
    decoded, redrawn, kept = [], [], []
    for first in tqdm(range(0, count, BATCH), desc="judge bank"):
        clips = render_batch(STAGE, first, BATCH)
        latent = editor.encode(clips)
        start = allowed[(first // BATCH) % len(allowed)]
        drawn = editor.redraw(latent, [c.prompt for c in clips], start, STAGE * 1000 + first)
        decoded.append(torch.from_numpy(editor.decode(latent)))
        redrawn.append(torch.from_numpy(editor.decode(drawn)))
        for clip, frames in zip(clips, redrawn[-1].numpy()):
            mean, worst = truth_errors(clip, frames)
            kept.append(mean <= MAX_MEAN_ERROR and worst <= MAX_FRAME_ERROR)
    bank = {
        "decoded": torch.cat(decoded),
        "redrawn": torch.cat(redrawn),
        "kept": torch.tensor(kept),
    }
    save_state(file, bank)
    return {"count": count, "kept": float(np.mean(kept))}
