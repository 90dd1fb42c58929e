"""What differs between the model families that judge, in one table.

Time stamps do not differ: every frame goes in as a picture behind its time in text, so that no
family's own clock (Qwen2.5-VL's rotary one, Qwen3-VL's stamps of merged frame pairs) is involved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cac_reward.answers import (
    BoxReader,
    BoxWriter,
    pixel_reader,
    pixel_writer,
    read_thousandths,
    write_thousandths,
)

VISION_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


@dataclass(frozen=True, kw_only=True)
class Family:
    """The conventions of one model family."""

    name: str
    """`model_type` of the model's config."""
    box_units: str = "thousandths"
    """One of `questions.BOX_UNITS`: of the frame, or pixels of the frame as it is shown."""
    call_format: str = "json"
    """One of `answers.CALL_TAGS`: how a tool call is written."""
    template_knows_tools: bool = True
    """Whether the chat template describes tools and has turns for what they return."""
    template_options: Mapping[str, object] = field(default_factory=dict)
    """Further arguments of the chat template, such as the switch that turns thinking off: the
    protocol's answers begin at once, and what is thought is written into the findings."""
    picture_options: Mapping[str, object] = field(
        default_factory=lambda: {"do_resize": False, "do_rescale": False}
    )
    """Arguments of the image processor. Frames come at the size that `budget_size` chose, in
    [0, 1]; a family's own pixel budget (min_pixels, max_pixels or size) would shift boxes."""
    never_written: tuple[str, ...] = VISION_TOKENS
    """Tokens that stand for pictures; a judge that writes one breaks the next turn."""
    factor: int = 32
    """Patch side times merge size of the published models, in pixels."""

    def box_reader(self, height: int, width: int) -> BoxReader:
        """How to read boxes in frames shown at this size."""
        return read_thousandths if self.box_units == "thousandths" else pixel_reader(height, width)

    def box_writer(self, height: int, width: int) -> BoxWriter:
        """How to write boxes in frames shown at this size; for training."""
        return write_thousandths if self.box_units == "thousandths" else pixel_writer(height, width)


FAMILIES: Mapping[str, Family] = {
    one.name: one
    for one in (
        Family(name="qwen3_vl"),
        Family(name="qwen3_vl_moe"),
        Family(name="qwen2_5_vl", box_units="pixels", template_knows_tools=False, factor=28),
        *(
            Family(name=name, call_format="xml", template_options={"enable_thinking": False})
            for name in ("qwen3_5", "qwen3_5_moe")
        ),
    )
}
"""By name. Qwen2.5-VL has no mixture of experts."""


def find_family(model_type: str) -> Family:
    """Row of the table for a model.

    Raises:
        ValueError: If there is none.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"judge must be of a family in {list(FAMILIES)}, got {model_type!r}")
    return FAMILIES[model_type]
