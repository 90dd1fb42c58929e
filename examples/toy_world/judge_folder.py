"""Stock Qwen3-VL folders with random weights: where the toy judge and test judges begin.

A folder holds nothing of ours: `AutoProcessor.from_pretrained` and
`AutoModelForImageTextToText.from_pretrained` load it like a published checkpoint.
"""

import json
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

CHAT_TEMPLATE = """
{%- macro render(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'text' -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools or messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role == 'system' -%}
{{- render(messages[0].content) -}}
{%- endif -%}
{%- if tools -%}
{{- '\\n\\n# Tools\\n\\n<tools>' -}}
{%- for tool in tools -%}
{{- '\\n' + (tool | tojson) -}}
{%- endfor -%}
{{- '\\n</tools>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' -}}
{{- render(message.content) + '\\n</tool_response><|im_end|>\\n' -}}
{%- elif message.role != 'system' -%}
{{- '<|im_start|>' + message.role + '\\n' + render(message.content) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# Numbers are split into digits and words from punctuation, as Qwen's own tokenizer does.
WORDS = r"""[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""

CORPUS = (
    "<0.25 seconds>",
    "Scan.",
    "Judge.",
    "Verdict: clean",
    "Verdict: anomalous",
    "Yes",
    "No",
    "Does this clip show: a red circle moves left? Answer yes or no.",
    '{"name": "inspect", "arguments": {"windows": [[0.25, 1.00], [1.25, 1.50]]}}',
    '{"findings": [{"type": "vanish", "window": [0.25, 1.00], "boxes": [{"time": 0.25, '
    '"box": [312, 250, 640, 588]}], "severity": 2, "why": "red circle vanishes"}]}',
    '{"findings": []}',
    "system\n",
    "user\n",
    "assistant\n",
)


def build_tokenizer(
    corpus: Sequence[str] = CORPUS, vocab_size: int = 512, whole_tokens: Sequence[str] = ()
) -> Qwen2Tokenizer:
    """Byte-level BPE learnt from `corpus`; any text can be written, `corpus` in few tokens."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(PLAIN_TAGS) - len(whole_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    tokenizer.add_tokens([*PLAIN_TAGS, *whole_tokens])
    return tokenizer


def build_processor(
    tokenizer: Qwen2Tokenizer, patch_size: int = 8, merge_size: int = 1
) -> Qwen3VLProcessor:
    """A stock Qwen3-VL processor around `tokenizer`; frames keep any size up to 4,096 squared."""
    factor = patch_size * merge_size
    geometry = {
        "patch_size": patch_size,
        "merge_size": merge_size,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": factor**2, "longest_edge": 4096**2},
    }
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**geometry),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**geometry),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(
    tokenizer: Qwen2Tokenizer,
    *,
    hidden_size: int = 32,
    layers: int = 2,
    heads: int = 2,
    vision_layers: int = 1,
    patch_size: int = 8,
    merge_size: int = 1,
) -> Qwen3VLConfig:
    """Qwen3-VL's architecture at a chosen size, text and vision equally wide."""
    head_size = hidden_size // heads
    side = head_size // 2 // 3
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": head_size,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_interleaved": True,
                "mrope_section": [head_size // 2 - 2 * side, side, side],
            },
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_heads": heads,
            "patch_size": patch_size,
            "spatial_merge_size": merge_size,
            "temporal_patch_size": 2,
            "out_hidden_size": hidden_size,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [vision_layers - 1],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
