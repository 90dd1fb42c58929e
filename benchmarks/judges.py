"""Judges for measuring: what they read is counted, and they may be told what to answer.

Axes: B conversations, N choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from cac_reward.answers import write_findings, write_tool_call
from cac_reward.judges.base import Conversation
from cac_reward.judges.local import LocalJudge
from cac_reward.questions import FINDINGS_PREFIX, TOOL_CALL_PREFIX
from cac_reward.report import Box, Finding, TimeWindow

WINDOW = TimeWindow(1.0, 3.0)
FINDING = Finding("vanish", WINDOW, (Box(1.5, 0.25, 0.25, 0.5, 0.5),))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a published Qwen3-VL, as its config.json states them."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    tied: bool
    vision_depth: int
    vision_hidden: int
    vision_intermediate: int
    deepstack: tuple[int, ...]


SHAPES = {
    "qwen3-vl-4b": Shape(
        hidden=2560,
        layers=36,
        heads=32,
        intermediate=9728,
        tied=True,
        vision_depth=24,
        vision_hidden=1024,
        vision_intermediate=4096,
        deepstack=(5, 11, 17),
    ),
    "qwen3-vl-8b": Shape(
        hidden=4096,
        layers=36,
        heads=32,
        intermediate=12288,
        tied=False,
        vision_depth=27,
        vision_hidden=1152,
        vision_intermediate=4304,
        deepstack=(8, 16, 24),
    ),
}


@dataclass
class Count:
    """What a model did since the last reset."""

    tokens_read: int = 0
    """Tokens that went into the language model in passes of more than one, padding included."""
    tokens_written: int = 0
    """Tokens that went in one at a time, behind what was read before."""
    encoder_calls: int = 0
    """Passes of the vision encoder."""
    frames_encoded: int = 0
    """Frames in those passes; a frame that is encoded twice counts twice."""


class MeasuredJudge(LocalJudge):
    """A local judge that counts; `scripted` answers are well formed, whatever the model wrote.

    The model does all its work either way: with random weights its own answers could not be read,
    and no clip would see its second turn.
    """

    scripted = False
    forgetful = False
    """Whether each turn is read from scratch, as two separate calls would do."""
    _turns = 0

    def watch(self) -> Count:
        """Start counting; must be called once."""
        count = Count()
        model = self._reader.model

        def language(_: nn.Module, __: object, kwargs: dict[str, Any]) -> None:
            ids = kwargs["input_ids"]
            if ids.shape[1] == 1:
                count.tokens_written += ids.numel()
            else:
                count.tokens_read += ids.numel()

        def vision(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            count.encoder_calls += 1
            count.frames_encoded += len(kwargs["grid_thw"] if "grid_thw" in kwargs else args[1])

        model.register_forward_pre_hook(language, with_kwargs=True)
        model.model.visual.register_forward_pre_hook(vision, with_kwargs=True)
        return count

    def generate(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        prefix: str | Sequence[str] = "",
        tools: Sequence[Mapping[str, object]] = (),
    ) -> list[str]:
        self._forget(conversations)
        texts = super().generate(
            conversations, max_new_tokens=max_new_tokens, prefix=prefix, tools=tools
        )
        answers = {
            TOOL_CALL_PREFIX: write_tool_call([WINDOW], self.family.call_format),
            FINDINGS_PREFIX: write_findings([FINDING]).partition("\n")[0],
        }
        return [answers[str(prefix)]] * len(texts) if self.scripted else texts

    def choice_log_probs(
        self,
        conversations: Sequence[Conversation],
        *,
        choices: Sequence[str],
        prefix: str | Sequence[str] = "",
        tools: Sequence[Mapping[str, object]] = (),
    ) -> Tensor:
        self._forget(conversations)
        weighed = super().choice_log_probs(
            conversations, choices=choices, prefix=prefix, tools=tools
        )
        if not self.scripted:
            return weighed
        # Clean comes first; behind it comes what leads on.
        suspicious = torch.full_like(weighed, 1e-6)
        suspicious[:, 0], suspicious[:, 1] = 0.1, 0.9
        return suspicious.log()

    def _forget(self, conversations: Sequence[Conversation]) -> None:
        turns = max((len(one) for one in conversations), default=0)
        if self.forgetful and turns != self._turns and self._reader.memory is not None:
            self._reader.memory.clear()
        self._turns = turns


def random_config(name: str, tokenizer: Any) -> Qwen3VLConfig:
    """The architecture of a published model, with the toy tokenizer's numbers for its tokens."""
    shape = SHAPES[name]
    return Qwen3VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
            },
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": shape.tied,
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": 16,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": shape.hidden,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": list(shape.deepstack),
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=shape.tied,
    )


def random_judge(name: str, toy_judge: str, device: str, max_batch_tokens: int) -> MeasuredJudge:
    """A judge of a published size with random weights, scripted, in bfloat16.

    Args:
        name: One of `SHAPES`.
        toy_judge: Folder whose tokenizer speaks for it: a real one is not part of this checkout.
        device: Where it is made and runs.
        max_batch_tokens: Most tokens read in one pass.
    """
    from examples.toy_world.judge_folder import build_processor

    tokenizer = AutoProcessor.from_pretrained(toy_judge).tokenizer
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration._from_config(
            random_config(name, tokenizer), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    judge = MeasuredJudge(
        model.eval().requires_grad_(False),
        build_processor(tokenizer, patch_size=16, merge_size=2),
        judge_id=f"{name}, random weights",
        max_batch_tokens=max_batch_tokens,
        max_memory_bytes=2**36,
    )
    judge.scripted = True
    return judge
