"""A random CogVideoXPipeline of stock parts, small enough to sample in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from tests.tiny_wan import WORDS, build_tokenizer

SIZE = {"height": 16, "width": 16, "num_frames": 9, "fps": 8.0, "max_sequence_length": 12}


def build_tiny_cogvideox(*, version: str = "5b", **scheduler: Any) -> CogVideoXPipeline:
    """The pipeline in memory; `version` is "2b", "5b" (rotary) or "1.5" (paired frames)."""
    newest = {"patch_size_t": 2, "patch_bias": False} if version == "1.5" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=16,
            num_layers=2,
            sample_width=2,
            sample_height=2,
            sample_frames=9,
            max_text_seq_length=12,
            use_rotary_positional_embeddings=version != "2b",
            **newest,
        )
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.7,
        )
        text = T5Config(
            vocab_size=len(WORDS) + 3,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=1,
        )
        text_encoder = T5EncoderModel(text)
    settings = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "snr_shift_scale": 3.0 if version == "2b" else 1.0,
    }
    return CogVideoXPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=CogVideoXDDIMScheduler(**{**settings, **scheduler}),
    )
