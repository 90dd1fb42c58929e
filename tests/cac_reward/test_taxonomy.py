"""Families, leaf types and the names of other data."""

import pytest

from cac_reward.taxonomy import (
    EVENT_SOURCES,
    EVENT_TYPES,
    FAMILIES,
    LEAF_TYPES,
    SOURCES,
    event_type,
    leaf_type,
)


def test_every_leaf_belongs_to_a_family_and_every_family_has_leaves() -> None:
    assert {leaf.family for leaf in LEAF_TYPES.values()} == set(FAMILIES)
    assert all(name == leaf.name for name, leaf in LEAF_TYPES.items())
    assert all(leaf.description for leaf in LEAF_TYPES.values())


@pytest.mark.parametrize("source", SOURCES)
def test_every_name_of_other_data_has_a_leaf(source: str) -> None:
    for name in SOURCES[source]:
        assert leaf_type(name, source).name in LEAF_TYPES


def test_all_23_types_of_vif_cot_4k_are_known() -> None:
    assert len(SOURCES["vif_cot_4k"]) == 23


def test_every_event_of_other_data_is_known_and_no_fault() -> None:
    for source, names in EVENT_SOURCES.items():
        assert {event_type(name, source) for name in names} <= set(EVENT_TYPES)
    assert not set(EVENT_TYPES) & set(LEAF_TYPES)
    used = {event for names in EVENT_SOURCES.values() for event in names.values()}
    assert used == set(EVENT_TYPES)
    with pytest.raises(ValueError, match="class of ucf_crime must be .* did you mean 'Stealing'"):
        event_type("Steeling", "ucf_crime")


def test_the_toy_world_faults_are_known() -> None:
    world = pytest.importorskip("examples.toy_world.world", reason="the toy world is not here")
    assert set(SOURCES["toy_world"]) == set(world.FAULTS)


def test_an_unknown_name_is_refused_with_near_ones() -> None:
    with pytest.raises(ValueError, match="got 'flickr'; did you mean 'flicker'"):
        leaf_type("flickr")
    with pytest.raises(ValueError, match="got 'zzzz'; known: vanish, teleport"):
        leaf_type("zzzz", "toy_world")
    with pytest.raises(ValueError, match="source must be a known name, got 'toy'; did you mean"):
        leaf_type("vanish", "toy")
