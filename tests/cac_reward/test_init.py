"""The package's front door: every exported name is there, and nothing else pretends to be."""

import pytest

import cac_reward

LIGHT_NAMES = sorted(set(cac_reward.__all__) - {"CaCScorer", "PromptAlignment"})


def test_every_exported_name_has_a_home() -> None:
    assert sorted(cac_reward._HOME) == sorted(cac_reward.__all__)
    assert set(cac_reward.__all__) <= set(dir(cac_reward))


@pytest.mark.parametrize("name", LIGHT_NAMES)
def test_an_exported_name_is_the_one_of_its_module(name: str) -> None:
    thing = getattr(cac_reward, name)
    assert thing.__name__ == name
    assert thing.__module__ == f"cac_reward.{cac_reward._HOME[name]}"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'cac_reward' has no attribute 'CacScorer'"):
        _ = cac_reward.CacScorer
