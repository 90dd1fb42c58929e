"""Generators of published sizes without their weights: random ones, or shapes alone.

The shapes are those of the checkpoints' config.json files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn

from diffusion_rl.generators.base import PromptEmbeddings
from diffusion_rl.generators.execution import place
from diffusion_rl.generators.pipeline import DTYPES
from diffusion_rl.generators.settings import ExecutionSettings
from diffusion_rl.generators.wan import WanGenerator


@dataclass(frozen=True)
class Shape:
    """Sizes of one Wan pipeline."""

    transformer: dict[str, Any]
    """Of WanTransformer3DModel."""
    vae: dict[str, Any]
    """Of AutoencoderKLWan; its defaults are Wan 2.1's."""
    text_encoder_parameters: int
    """Of the text encoder."""
    tokens: int = 512
    """Text tokens of a prompt."""


SHAPES = {
    # Wan-AI/Wan2.1-T2V-1.3B-Diffusers; the encoder of google/umt5-xxl.
    "wan2.1-1.3b": Shape(
        {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
        {},
        5_680_910_336,
    ),
    "tiny": Shape(
        {
            **{"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "num_layers": 2},
            **{"text_dim": 16, "freq_dim": 16, "in_channels": 4, "out_channels": 4},
        },
        {
            **{"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
            **{"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
        },
        0,
        tokens=8,
    ),
}


def build_generator(
    name: str,
    *,
    height: int,
    width: int,
    num_frames: int,
    dtype: str,
    device: str,
    execution: ExecutionSettings,
) -> WanGenerator:
    """A Wan generator of a published size with random weights, on "meta" with none."""
    shape = SHAPES[name]
    start = torch.device(device)
    with start:
        transformer = WanTransformer3DModel(**shape.transformer)
        vae = AutoencoderKLWan(**shape.vae)
    for path, parameter in transformer.named_parameters():
        # As from_pretrained does; what it keeps in float32 stays.
        if not set(transformer._keep_in_fp32_modules) & set(path.split(".")):
            parameter.data = parameter.data.to(DTYPES[dtype])
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    place(pipeline, execution, start, ())
    generator = WanGenerator(
        pipeline,
        height=height,
        width=width,
        num_frames=num_frames,
        fps=16.0,
        max_sequence_length=shape.tokens,
    )
    generator.execution = execution
    return generator


def random_embeddings(name: str, generator: WanGenerator, prompts: int = 1) -> PromptEmbeddings:
    """Embeddings of the right shape; what they say does not change the work."""
    shape = SHAPES[name]
    wide = generator.pipeline.transformer.config.text_dim
    options = {"device": generator.device, "dtype": generator.dtype}
    return PromptEmbeddings(
        torch.randn(prompts, shape.tokens, wide, **options),
        torch.randn(1, shape.tokens, wide, **options),
    )


def count_parameters(module: nn.Module) -> int:
    """Weights of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
