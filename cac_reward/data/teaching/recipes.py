"""The recipes by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from cac_reward.data.teaching import srvau, vanguard
from cac_reward.data.teaching.lessons import Recipe

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {"vanguard": vanguard.RECIPE, "srvau": srvau.RECIPE}
)
