"""Conversations and answers as the OpenAI-compatible chat API has them."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cac_reward.judges.base import Conversation
from cac_reward.questions import TOOL_CALL_END, TOOL_CALL_PREFIX, Message, plain_tool_turn


def write_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """A conversation as the chat API has it; a tool's turn comes from the user, in its tags.

    The API has no pictures in tool turns, and Qwen's own template writes them this way.
    """
    return [_write_message(message) for message in conversation]


def _write_message(message: Message) -> dict[str, Any]:
    if message.role in ("assistant", "system"):
        return {"role": message.role, "content": message.text}
    content = (plain_tool_turn(message) if message.role == "tool" else message).content
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, Tensor):
            parts.append({"type": "image_url", "image_url": {"url": picture_url(part)}})
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += part
        else:
            parts.append({"type": "text", "text": part})
    return {"role": "user", "content": parts}


def picture_url(frame: Tensor) -> str:
    """A frame [C H W] in [0, 1] as the data URL of a lossless PNG, 8 bits a channel."""
    pixels = (frame * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def message_text(message: Any, call_format: str = "json") -> str:
    """What an answer says; a tool call that the server has taken apart is written out again."""
    text = message.content or ""
    for call in message.tool_calls or ():
        name, arguments = call.function.name, call.function.arguments
        body = json.dumps({"name": name, "arguments": "@"}).replace('"@"', arguments)
        if call_format == "xml":
            body = f"<function={name}>\n{_parameters(arguments)}</function>"
        text += f"{TOOL_CALL_PREFIX}\n{body}\n{TOOL_CALL_END}"
    return text


def _parameters(arguments: str) -> str:
    """A call's arguments in tags; what is no JSON object is left for the parser to refuse."""
    try:
        items = json.loads(arguments).items()
    except (json.JSONDecodeError, AttributeError):
        return arguments
    return "".join(
        f"<parameter={name}>\n{json.dumps(value)}\n</parameter>\n" for name, value in items
    )
