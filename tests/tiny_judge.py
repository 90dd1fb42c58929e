"""A stock Qwen3-VL folder with random weights, small enough to build inside a test."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen3VLForConditionalGeneration

from examples.toy_world.judge_folder import (
    CORPUS,
    build_config,
    build_processor,
    build_tokenizer,
)

logger = logging.getLogger(__name__)


def build_tiny_judge(
    folder: str | Path,
    *,
    hidden_size: int = 32,
    layers: int = 2,
    heads: int = 2,
    vision_layers: int = 1,
    patch_size: int = 8,
    merge_size: int = 1,
    corpus: Sequence[str] = CORPUS,
    vocab_size: int = 512,
    whole_tokens: Sequence[str] = (),
    seed: int = 0,
    settings: dict | None = None,
) -> Path:
    """Save a judge with random weights that loads like any published Qwen3-VL.

    Args:
        folder: where the files go; made when missing.
        hidden_size: width of text and vision; a multiple of 4 * `heads`.
        layers: text layers.
        heads: attention heads of text and vision.
        vision_layers: vision layers.
        patch_size: side of a vision patch in pixels.
        merge_size: patches merged per side into one token; 1 merges none.
        corpus: texts whose pieces become tokens; pass all texts the judge will speak.
        vocab_size: upper limit, special tokens included.
        whole_tokens: texts that become one token each, e.g. time stamps such as "<0.25 seconds>"
            (seven tokens otherwise), which makes prompts shorter and the judge faster.
        seed: of the random weights; torch's global generator is left as it was.
        settings: written as `cac_judge.json` when given.

    Returns:
        `folder` as a Path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(corpus, vocab_size, whole_tokens)
    config = build_config(
        tokenizer,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        vision_layers=vision_layers,
        patch_size=patch_size,
        merge_size=merge_size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    build_processor(tokenizer, patch_size, merge_size).save_pretrained(folder)
    if settings is not None:
        (folder / "cac_judge.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    logger.info("built %s with %d parameters", folder, model.num_parameters())
    return folder
