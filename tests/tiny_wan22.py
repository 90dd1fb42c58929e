"""Random WanPipelines of Wan 2.2's two kinds, of stock parts."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, WanPipeline

from tests.tiny_wan import build_tiny_wan

A14B_SIZE = {"height": 16, "width": 16, "num_frames": 5, "fps": 16.0, "max_sequence_length": 12}
TI2V_SIZE = {**A14B_SIZE, "height": 32, "width": 32, "fps": 24.0}


def build_tiny_a14b(*, boundary_ratio: float = 0.8) -> WanPipeline:
    """Two transformers of different weights, as T2V-A14B has them."""
    first, second = build_tiny_wan(seed=0), build_tiny_wan(seed=1)
    parts = {name: part for name, part in first.components.items() if name != "transformer_2"}
    return WanPipeline(**parts, transformer_2=second.transformer, boundary_ratio=boundary_ratio)


def build_tiny_ti2v() -> WanPipeline:
    """One transformer of patches of 2 x 2 with a timestep for each token, as TI2V-5B has it."""
    parts = build_tiny_wan(patch_size=(1, 2, 2)).components
    with torch.random.fork_rng():
        torch.manual_seed(2)
        parts["vae"] = AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=8,
            dim_mult=[1, 1, 1, 1],
            z_dim=4,
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            is_residual=True,
            patch_size=2,
            in_channels=12,
            out_channels=12,
            latents_mean=[0.1, 0.0, -0.1, 0.2],
            latents_std=[1.0, 0.9, 1.1, 1.3],
            scale_factor_spatial=16,
            scale_factor_temporal=4,
        ).eval()
    return WanPipeline(**parts, expand_timesteps=True)
