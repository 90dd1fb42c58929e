"""A random WanPipeline of stock parts, small enough to sample in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = "a an the red green blue circle square moves left right up down and over still".split()
SIZE = {"height": 16, "width": 16, "num_frames": 5, "fps": 8.0, "max_sequence_length": 12}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words to numbers; padding 0 and end 1, as T5 has them."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def build_tiny_wan(
    *,
    seed: int = 0,
    scheduler: str = "euler",
    layers: int = 2,
    heads: int = 2,
    patch_size: tuple[int, int, int] = (1, 1, 1),
) -> WanPipeline:
    """The pipeline in memory; `scheduler` is "euler" or "unipc"."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(
            patch_size=patch_size,
            num_attention_heads=heads,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=layers,
            rope_max_seq_len=32,
        )
        vae = AutoencoderKLWan(
            base_dim=4,
            dim_mult=[1, 1, 1],
            z_dim=4,
            num_res_blocks=1,
            temperal_downsample=[True, True],
            patch_size=2,
            in_channels=12,
            out_channels=12,
            latents_mean=[0.1, 0.0, -0.1, 0.2],
            latents_std=[1.0, 0.9, 1.1, 1.3],
            scale_factor_spatial=8,
            scale_factor_temporal=4,
        )
        text = UMT5Config(
            vocab_size=len(WORDS) + 3,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=1,
        )
        text_encoder = UMT5EncoderModel(text)
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=_scheduler(scheduler),
    )


def _scheduler(name: str) -> FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler:
    if name == "unipc":
        return UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def save_tiny_wan(folder: Path, **options) -> Path:
    """The pipeline as a folder that `WanPipeline.from_pretrained` reads."""
    build_tiny_wan(**options).save_pretrained(folder)
    return folder
