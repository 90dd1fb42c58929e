"""A random LTXPipeline of stock parts, small enough to sample in milliseconds."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from tests.tiny_wan import WORDS, build_tokenizer

SIZE = {"height": 32, "width": 32, "num_frames": 5, "fps": 25.0, "max_sequence_length": 12}


def build_tiny_ltx(*, noisy_decoder: bool = False) -> LTXPipeline:
    """The pipeline in memory; `noisy_decoder` is the autoencoder of LTX-Video 0.9.1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=2,
            caption_channels=16,
        )
        vae = AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            decoder_block_out_channels=(4, 4, 4, 4),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(noisy_decoder,) * 5,
            timestep_conditioning=noisy_decoder,
            patch_size=2,
        )
        vae.latents_mean.copy_(torch.tensor([0.1, 0.0, -0.1, 0.2]))
        vae.latents_std.copy_(torch.tensor([1.0, 0.9, 1.1, 1.3]))
        for name, parameter in vae.named_parameters():
            if "per_channel_scale" in name:  # Zero at first, which would hide the noise.
                parameter.data.fill_(0.1)
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
    return LTXPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        # As LTX-Video has it, but for the lengths, so that a few tokens are shifted too.
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=4,
            max_image_seq_len=64,
            shift_terminal=0.1,
        ),
    )
