"""Stock folders of every family with random weights, small enough for a test."""

import importlib.util
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from examples.toy_world.judge_folder import (
    CORPUS,
    build_config,
    build_processor,
    build_tokenizer,
)

logger = logging.getLogger(__name__)

PUBLISHED_TEMPLATES = {
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_5": "qwen3_5_think",
    "qwen3_5_moe": "qwen3_5_think",
}
"""TRL keeps the chat templates of published checkpoints, to know them again."""


def published_template(family: str) -> str:
    """The chat template that a family is published with."""
    (folder,) = importlib.util.find_spec("trl").submodule_search_locations
    path = Path(folder) / "chat_templates" / f"{PUBLISHED_TEMPLATES[family]}.jinja"
    return path.read_text(encoding="utf-8")


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
    family: str = "qwen3_vl",
) -> Path:
    """Save a judge with random weights that loads like any published one of its family.

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
        family: 'qwen3_vl', or another of `PUBLISHED_TEMPLATES` with its published chat template.

    Returns:
        `folder` as a Path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(corpus, vocab_size, whole_tokens)
    processor = build_processor(tokenizer, patch_size, merge_size)
    config = build_config(
        tokenizer,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        vision_layers=vision_layers,
        patch_size=patch_size,
        merge_size=merge_size,
    )
    if family in ("qwen3_5", "qwen3_5_moe"):
        tokenizer = processor.tokenizer = _qwen3_5_tokenizer(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build_model(family, config)
    if family != "qwen3_vl":
        template = published_template(family)
        if family == "qwen2_5_vl":
            parts = (processor.image_processor, tokenizer, processor.video_processor)
            processor = Qwen2_5_VLProcessor(*parts, chat_template=template)
        processor.chat_template = template
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if settings is not None:
        (folder / "cac_judge.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    logger.info("built %s with %d parameters", folder, model.num_parameters())
    return folder


def _qwen3_5_tokenizer(tokenizer: Qwen2Tokenizer) -> Qwen3_5Tokenizer:
    """The same words and control tokens in the class of Qwen3.5."""
    learnt = json.loads(tokenizer.backend_tokenizer.to_str())
    words = learnt["model"]["vocab"]
    other = Qwen3_5Tokenizer(
        vocab=words,
        merges=[tuple(pair) for pair in learnt["model"]["merges"]],
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        extra_special_tokens=list(tokenizer.extra_special_tokens),
    )
    added = [one["content"] for one in learnt["added_tokens"] if not one["special"]]
    other.add_tokens(added)
    assert other.get_vocab() == tokenizer.get_vocab()
    return other


def _build_model(family: str, config: object) -> PreTrainedModel:
    """A model of a family, at the sizes of a Qwen3-VL config."""
    if family == "qwen3_vl":
        return Qwen3VLForConditionalGeneration(config)
    record = config.to_dict()
    text, vision = record.pop("text_config"), record.pop("vision_config")
    ids = {name: value for name, value in record.items() if name.endswith("_token_id")}
    for part in (text, vision):
        for name in ("model_type", "architectures", "dtype"):
            part.pop(name, None)
    vision.pop("deepstack_visual_indexes")
    text |= {"bos_token_id": None, "eos_token_id": None}
    if family == "qwen2_5_vl":
        vision.pop("num_position_embeddings")
        vision.pop("hidden_act")
        text["rope_parameters"].pop("mrope_interleaved")
        vision["fullatt_block_indexes"] = [vision["depth"] - 1]
        vision["window_size"] = 2 * vision["patch_size"] * vision["spatial_merge_size"]
        return Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config=text, vision_config=vision, tie_word_embeddings=True, **ids
            )
        )
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    if family == "qwen3_vl_moe":
        text |= experts
        vision["deepstack_visual_indexes"] = [0]
        return Qwen3VLMoeForConditionalGeneration(
            Qwen3VLMoeConfig(
                text_config=text, vision_config=vision, tie_word_embeddings=True, **ids
            )
        )
    head_size = text["head_dim"]
    text |= {
        "layer_types": ["linear_attention", "full_attention"] * (text["num_hidden_layers"] // 2),
        "linear_key_head_dim": head_size,
        "linear_value_head_dim": head_size,
        "linear_num_key_heads": text["num_key_value_heads"],
        "linear_num_value_heads": 2 * text["num_key_value_heads"],
    }
    text["rope_parameters"] |= {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    if family == "qwen3_5_moe":
        text.pop("intermediate_size")
        text |= {**experts, "shared_expert_intermediate_size": 16}
        return Qwen3_5MoeForConditionalGeneration(
            Qwen3_5MoeConfig(
                text_config=text, vision_config=vision, tie_word_embeddings=True, **ids
            )
        )
    return Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    )
