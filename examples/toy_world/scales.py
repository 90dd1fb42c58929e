"""Sizes of the toy world's judges: two for two cores, and one for a GPU at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from examples.toy_world.world import WorldSettings


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large clips are, how much of them each turn shows, and how large the judge is."""

    world: WorldSettings
    """Size and number of frames."""
    scan_side: int
    """Height and width at which turn 1 sees every frame."""
    inspect_side: int
    """And turn 2 up to `inspect_frames` frames."""
    inspect_frames: int = 8
    whole_side: int
    """At which every frame has about as many pixels, all together, as both turns."""
    hidden_size: int = 128
    """Of the language model and the vision tower."""
    layers: int = 4
    heads: int = 4
    vision_layers: int = 2


SCALES: Mapping[str, Scale] = {
    "small": Scale(
        world=WorldSettings(),
        scan_side=24,
        inspect_side=32,
        whole_side=32,
    ),
    "medium": Scale(
        world=WorldSettings(size=48, num_frames=24),
        scan_side=16,
        inspect_side=48,
        whole_side=32,
    ),
    "large": Scale(
        world=WorldSettings(size=64, num_frames=25),
        scan_side=24,
        inspect_side=64,
        whole_side=40,
        hidden_size=512,
        layers=6,
        heads=8,
        vision_layers=4,
    ),
}
"""The judges of 'small' and 'medium' have 1.4M weights and learn on two cores; that of 'large' has
33M. In 'small', turn 1 sees more than half of the pixels; in the others a ninth or a seventh."""
