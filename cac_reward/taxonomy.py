"""Kinds of faults in generated video: four families, their leaf types, and names used elsewhere.

The families are those that CaC names; the leaf types are ours, kept few enough to tell apart. A
judge may also speak the names of the data it was trained on: `leaf_type` translates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "structure": "something has a wrong or melting shape",
        "physics": "something breaks a law of nature or of cause and effect",
        "time": "something is not the same thing, or not there, from one moment to the next",
        "text": "letters are malformed, crawl or change",
    }
)


@dataclass(frozen=True)
class LeafType:
    """One kind of fault."""

    name: str
    family: str
    description: str


LEAF_TYPES: Mapping[str, LeafType] = MappingProxyType(
    {
        name: LeafType(name, family, description)
        for family, name, description in (
            ("structure", "body_structure", "a person or animal has a wrong limb, hand or face"),
            ("structure", "object_structure", "an object is put together in an impossible way"),
            ("structure", "deformation", "a shape bends, melts or stretches without cause"),
            ("structure", "texture", "a surface boils, smears or is blurred where it should not"),
            ("physics", "interpenetration", "solid things pass through each other"),
            ("physics", "merging", "separate things grow together"),
            ("physics", "splitting", "one thing falls into several, or is doubled"),
            ("physics", "motion", "something moves as no such thing can, or stops dead"),
            ("physics", "force", "gravity, inertia, fluid or contact is ignored"),
            ("physics", "causality", "an effect without its cause, or a cause without its effect"),
            ("time", "disappearance", "something vanishes with nothing to hide it"),
            ("time", "appearance", "something comes from nowhere"),
            ("time", "jump", "something is suddenly in another place"),
            ("time", "identity", "someone or something turns into another"),
            ("time", "colour", "a thing changes its colour without cause"),
            ("time", "flicker", "something blinks, or is now clear and now faint"),
            ("time", "lighting", "light or shadow changes without cause"),
            ("time", "camera", "the view jumps or drifts in an impossible way"),
            ("text", "text", "letters or digits are malformed, crawl or change"),
        )
    }
)

_VIF_COT_4K = {
    "Structure Anomaly": "object_structure",
    "Texture Jittering": "texture",
    "Unnatural Blur": "texture",
    "Color Over-saturation": "colour",
    "Lighting Inconsistency": "lighting",
    "Camera Motion Inconsistency": "camera",
    "Abnormal Object Disappearance": "disappearance",
    "Abnormal Object Appearance": "appearance",
    "Person Identity Inconsistency": "identity",
    "General Object Identity Inconsistency": "identity",
    "Shape Distortion": "deformation",
    "Abnormal Rigid-Body Crossing": "interpenetration",
    "Abnormal Multi-Object Merging": "merging",
    "Abnormal Object Splitting": "splitting",
    "General Interaction Anomaly": "force",
    "Unnatural Human Movement": "motion",
    "Unnatural Animal Movement": "motion",
    "Unnatural General Object Movement": "motion",
    "Violation of Physical Law": "force",
    "Violation of General Causality Law": "causality",
    "Abnormal Human Body Structure": "body_structure",
    "Abnormal General Object Structure": "object_structure",
    "Text Distortion": "text",
}

_TOY_WORLD = {
    "vanish": "disappearance",
    "teleport": "jump",
    "recolour": "colour",
    "deform": "deformation",
    "duplicate": "appearance",
    "freeze": "motion",
    "flicker": "flicker",
}

SOURCES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"vif_cot_4k": MappingProxyType(_VIF_COT_4K), "toy_world": MappingProxyType(_TOY_WORLD)}
)


def leaf_type(name: str, source: str | None = None) -> LeafType:
    """Find a leaf type by our name for it, or by the name that a dataset uses.

    Args:
        name: For example 'flicker', or 'Texture Jittering' with source 'vif_cot_4k'.
        source: A key of `SOURCES`, or None for our own names.

    Raises:
        ValueError: If the name or the source is unknown; near names are given.

    Example:
        >>> leaf_type("Texture Jittering", "vif_cot_4k").family
        'structure'
    """
    if source is None:
        return LEAF_TYPES[_known("type", name, LEAF_TYPES)]
    names = SOURCES[_known("source", source, SOURCES)]
    return LEAF_TYPES[names[_known(f"type of {source}", name, names)]]


def _known(what: str, name: str, names: Mapping[str, object]) -> str:
    if name in names:
        return name
    near = get_close_matches(name, list(names), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(names)}"
    raise ValueError(f"{what} must be a known name, got {name!r}; {hint}")
