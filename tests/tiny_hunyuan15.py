"""A random HunyuanVideo15Pipeline of stock parts, small enough to sample in milliseconds."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
)

from tests.tiny_wan import WORDS, build_tokenizer

SIZE = {"height": 16, "width": 16, "num_frames": 5, "fps": 24.0, "max_sequence_length": 12}
# The pipeline cuts off as many tokens, those of its system message; the prompt's end follows it.
TEMPLATE = "{% for _ in range(108) %}over {% endfor %}{{ messages[1]['content'] }} still"


def build_tiny_hunyuan15() -> HunyuanVideo15Pipeline:
    """The pipeline in memory."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=8,
            image_embed_dim=8,
            rope_axes_dim=(4, 4, 4),
            target_size=16,
            task_type="t2v",
        )
        vae = AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(16, 16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        )
        text = Qwen2_5_VLTextConfig(
            vocab_size=len(WORDS) + 3,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
        )
        quoted = T5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        parts = {
            "text_encoder": Qwen2_5_VLTextModel(text),
            "text_encoder_2": T5EncoderModel(quoted),
            "transformer": transformer,
            "vae": vae,
        }
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return HunyuanVideo15Pipeline(
        **{name: part.eval() for name, part in parts.items()},
        tokenizer=tokenizer,
        tokenizer_2=ByT5Tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )
