"""The table of faults: what each is called, what plants it, and the words for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from cac_reward.data.synthesis import moments, places, surfaces
from cac_reward.data.synthesis.blending import Canvas
from cac_reward.data.synthesis.targets import Target
from cac_reward.taxonomy import leaf_type


class PlantFunction(Protocol):
    """Edits the frames of a target; False where this fault cannot befall this target."""

    def __call__(self, canvas: Canvas, target: Target, random: np.random.Generator) -> bool: ...


@dataclass(frozen=True)
class Fault:
    """One kind of fault that can be planted."""

    name: str
    why: str
    """What is to be seen, with {place} for where it is."""
    plant: PlantFunction | None
    """None: the fault is in the text that was written into the clip."""
    ahead: bool = False
    """Whether it needs the target behind the fault's end too."""

    @property
    def type(self) -> str:
        """Its leaf type in `cac_reward.taxonomy`."""
        return leaf_type(self.name, "synthesis").name


FAULTS: Mapping[str, Fault] = MappingProxyType(
    {
        one.name: one
        for one in (
            Fault(
                "vanish",
                "something that moves {place} is gone, though nothing hides it",
                places.vanish,
            ),
            Fault("appear", "something comes from nowhere {place}", places.appear),
            Fault(
                "duplicate",
                "something that moves is doubled: a copy goes along with it {place}",
                places.duplicate,
            ),
            Fault(
                "teleport",
                "something that moves is suddenly in another place, {place}",
                places.teleport,
            ),
            Fault("deform", "a shape bends and swells like rubber {place}", surfaces.deform),
            Fault("melt", "something runs down and melts {place}", surfaces.melt),
            Fault(
                "texture_flicker",
                "a surface boils: its detail changes from frame to frame {place}",
                surfaces.texture_flicker,
            ),
            Fault("freeze", "something stops dead {place} while the rest moves on", moments.freeze),
            Fault(
                "time_jump",
                "something leaps ahead of its own movement {place}",
                moments.time_jump,
                ahead=True,
            ),
            Fault("identity", "something turns into something else {place}", surfaces.identity),
            Fault("recolour", "something changes its colour {place}", surfaces.recolour),
            Fault(
                "cross",
                "something slides through something else {place}, and both are seen at once",
                places.cross,
            ),
            Fault("text_scramble", "letters change and bend {place}", None),
            Fault("blur", "something is out of focus {place} and nothing around it", surfaces.blur),
        )
    }
)
"""All faults by name, in the order of the documentation."""
