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

_DEEPTRACE_REWARD = {
    "object distortion": "deformation",
    "background distortion": "deformation",
    "sudden blurring": "texture",
    "object trajectory": "motion",
    "unexpected move": "motion",
    "redundant object": "appearance",
    "object disappearance": "disappearance",
    "object merging": "merging",
    "object splitting": "splitting",
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

_SYNTHESIS = {
    "vanish": "disappearance",
    "appear": "appearance",
    "duplicate": "splitting",
    "teleport": "jump",
    "deform": "deformation",
    "melt": "deformation",
    "texture_flicker": "texture",
    "freeze": "motion",
    "time_jump": "jump",
    "identity": "identity",
    "recolour": "colour",
    "cross": "interpenetration",
    "text_scramble": "text",
    "blur": "texture",
}

SOURCES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "vif_cot_4k": MappingProxyType(_VIF_COT_4K),
        "deeptrace_reward": MappingProxyType(_DEEPTRACE_REWARD),
        "toy_world": MappingProxyType(_TOY_WORLD),
        "synthesis": MappingProxyType(_SYNTHESIS),
    }
)

EVENT_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "abuse": "a person or animal is mistreated",
        "agriculture": "harm to crops, livestock or farm machines",
        "arrest": "someone is taken by the police",
        "arson": "a fire is laid",
        "assault": "someone is attacked",
        "burglary": "someone breaks into a place",
        "explosion": "something explodes",
        "fighting": "people fight each other",
        "fire": "something burns",
        "food_safety": "food is handled in a harmful way",
        "medical": "someone is taken ill",
        "natural_hazard": "flood, storm, landslide and the like",
        "object_fall": "a thing falls",
        "person_fall": "a person falls",
        "riot": "a crowd is violent",
        "robbery": "something is taken by force",
        "shooting": "a gun is fired",
        "shoplifting": "goods are taken from a shop",
        "stealing": "something is taken in secret",
        "traffic_accident": "vehicles or people collide in traffic",
        "vandalism": "things are damaged on purpose",
        "water_incident": "someone or something is in danger in water",
    }
)
"""Unusual events of the real world, the anomalies of surveillance data: no faults of a generator,
so no judge of generated video is asked for them."""

_VAU_BENCH = {
    "Abuse": "abuse",
    "Agriculture": "agriculture",
    "Arrest": "arrest",
    "Arson": "arson",
    "Assault": "assault",
    "Explosion": "explosion",
    "Fighting": "fighting",
    "Fire": "fire",
    "Food Safety": "food_safety",
    "Medical Abnormality": "medical",
    "Natural Hazard": "natural_hazard",
    "Object_falling": "object_fall",
    "People_falling": "person_fall",
    "Robbery": "robbery",
    "Shooting": "shooting",
    "Stealing": "stealing",
    "Traffic_accident": "traffic_accident",
    "Vandalism": "vandalism",
    "Water_incident": "water_incident",
}

_UCF_CRIME = {
    "Abuse": "abuse",
    "Arrest": "arrest",
    "Arson": "arson",
    "Assault": "assault",
    "Burglary": "burglary",
    "Explosion": "explosion",
    "Fighting": "fighting",
    "RoadAccidents": "traffic_accident",
    "Robbery": "robbery",
    "Shooting": "shooting",
    "Shoplifting": "shoplifting",
    "Stealing": "stealing",
    "Vandalism": "vandalism",
}

_XD_VIOLENCE = {
    "B1": "fighting",
    "B2": "shooting",
    "B4": "riot",
    "B5": "abuse",
    "B6": "traffic_accident",
    "G": "explosion",
}

EVENT_SOURCES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "vau_bench": MappingProxyType(_VAU_BENCH),
        "ucf_crime": MappingProxyType(_UCF_CRIME),
        "xd_violence": MappingProxyType(_XD_VIOLENCE),
    }
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


def event_type(name: str, source: str) -> str:
    """Find an event by the name that a data set of surveillance uses.

    Args:
        name: For example 'RoadAccidents' with source 'ucf_crime'.
        source: A key of `EVENT_SOURCES`.

    Returns:
        A key of `EVENT_TYPES`.

    Raises:
        ValueError: If the name or the source is unknown; near names are given.
    """
    names = EVENT_SOURCES[_known("source", source, EVENT_SOURCES)]
    return names[_known(f"class of {source}", name, names)]


def _known(what: str, name: str, names: Mapping[str, object]) -> str:
    if name in names:
        return name
    near = get_close_matches(name, list(names), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(names)}"
    raise ValueError(f"{what} must be a known name, got {name!r}; {hint}")
