"""From a conversation to the tokens that a model family reads, with its own chat template.

Axes: C channels (3), H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cac_reward.judges.base import Conversation
from cac_reward.judges.families import Family
from cac_reward.questions import Message, plain_tool_turn, tools_turn


class ControlTokenError(ValueError):
    """A text that would speak to the model as its template does."""


@dataclass(frozen=True, eq=False)
class TokenizedConversation:
    """One conversation as the model reads it."""

    tokens: list[int]
    """Every token, those that stand for frames included."""
    frames: list[Tensor]
    """[C H W] each."""


class Renderer:
    """Writes conversations as a family's chat template has them.

    Args:
        processor: of the model.
        family: its conventions.
    """

    def __init__(self, processor: Any, family: Family) -> None:
        self.processor = processor
        self.family = family
        self.tokenizer = processor.tokenizer
        self.patch_size = processor.image_processor.patch_size
        self.patch_factor = self.patch_size * processor.image_processor.merge_size
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(processor.image_token)

    def tokenize(
        self,
        conversations: Sequence[Conversation],
        prefixes: Sequence[str],
        tools: Sequence[Mapping[str, object]],
    ) -> list[TokenizedConversation]:
        """Conversations up to the end of the prefixes with which their answers begin.

        Raises:
            ControlTokenError: If a text holds control tokens.
            ValueError: If a frame does not fit the patches.
        """
        texts = [
            self.render(conversation, tools) + prefix
            for conversation, prefix in zip(conversations, prefixes, strict=True)
        ]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        tokenized = []
        for conversation, short in zip(conversations, encoded, strict=True):
            frames = [frame for message in conversation for frame in message.frames]
            tokenized.append(TokenizedConversation(self.expand(short, frames), frames))
        return tokenized

    def render(
        self,
        conversation: Conversation,
        tools: Sequence[Mapping[str, object]],
        *,
        answering: bool = True,
    ) -> str:
        """The text of a conversation, one image token for each frame.

        Args:
            conversation: turns, the first of them never the judge's.
            tools: that the judge may call.
            answering: end with what opens the judge's next turn.

        Raises:
            ControlTokenError: If a text holds control tokens.
            ValueError: If the template makes the judge think first.
        """
        for message in conversation:
            self.check_text(message.text)
        given = list(tools)
        if not self.family.template_knows_tools:
            conversation, given = _without_tools(conversation, tools), []
        text = self.processor.apply_chat_template(
            [_template_message(message) for message in conversation],
            tools=given or None,
            add_generation_prompt=answering,
            tokenize=False,
            **self.family.template_options,
        )
        if text.rstrip().endswith("<think>"):
            raise ValueError(
                "judge must answer without thinking first, got a chat template that opens <think> "
                f"even with {dict(self.family.template_options)}; use the instruct variant of the "
                "checkpoint, or its template with a thinking switch"
            )
        return text

    def check_text(self, text: str) -> None:
        """Raises ControlTokenError where a text holds control tokens."""
        found = [one for one in self.tokenizer.all_special_tokens if one in text]
        if found:
            raise ControlTokenError(
                f"messages must not hold the model's control tokens, got {found[0]!r} in "
                f"{text[:200]!r}"
            )

    def expand(self, short: Sequence[int], frames: Sequence[Tensor]) -> list[int]:
        """Tokens with as many image tokens in the place of each as its frame fills."""
        counts = iter([self.count_tokens(frame) for frame in frames])
        tokens: list[int] = []
        for token in short:
            tokens += [token] * (next(counts) if token == self.image_token_id else 1)
        return tokens

    def count_tokens(self, frame: Tensor) -> int:
        """Image tokens of a frame [C H W].

        Raises:
            ValueError: If its sides are no multiples of `patch_factor`.
        """
        height, width = frame.shape[-2:]
        if height % self.patch_factor or width % self.patch_factor:
            raise ValueError(
                f"frames must have sides that are multiples of {self.patch_factor}, "
                f"got {height}x{width}; resize_to_budget makes them so"
            )
        return (height // self.patch_factor) * (width // self.patch_factor)

    def grid(self, frame: Tensor) -> tuple[int, int, int]:
        """Patches of a frame [C H W] in time, height and width."""
        return (1, frame.shape[-2] // self.patch_size, frame.shape[-1] // self.patch_size)


def _template_message(message: Message) -> dict[str, object]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in message.content
    ]
    return {"role": message.role, "content": content}


def _without_tools(
    conversation: Conversation, tools: Sequence[Mapping[str, object]]
) -> list[Message]:
    """A conversation for a template that knows no tools: they stand in its system turn."""
    turns = [plain_tool_turn(one) if one.role == "tool" else one for one in conversation]
    if not tools:
        return turns
    system = turns.pop(0).text if turns[0].role == "system" else ""
    return [tools_turn(tools, system), *turns]
