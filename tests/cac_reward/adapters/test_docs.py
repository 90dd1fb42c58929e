"""Every adapter stands in the README and in docs/adapters.md, under names that exist."""

import importlib
import re
from pathlib import Path

import pytest

from tests.cac_reward.adapters.test_base import ADAPTERS

REPOSITORY = Path(__file__).resolve().parents[3]
SHARED = {"base", "settings", "texts"}
FRAMEWORKS = {"flow_factory", "reward_service", "torchmetrics"}


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("adapter", sorted(set(ADAPTERS) - SHARED))
def test_every_adapter_has_a_row(adapter: str) -> None:
    assert f"cac_reward.adapters.{adapter}" in text_of("README.md")


def names_in_readme() -> list[tuple[str, str]]:
    """(module, name) of every row: what is called beside the module that is named."""
    found = []
    for row in text_of("README.md").splitlines():
        module = re.search(r"cac_reward\.adapters\.(\w+)", row)
        if module is None or not row.startswith("|"):
            continue
        cell = row.split("|")[2]
        imported = re.findall(r"import (\w+)|adapters\.\w+\.(\w+)|name=(\w+)", cell)
        called = re.findall(r"(\w+)\(", cell)
        names = [name for group in imported for name in group if name] or called[-1:]
        found += [(module[1], name) for name in names]
    return found


@pytest.mark.parametrize(("module", "name"), names_in_readme())
def test_names_in_the_readme_exist(module: str, name: str) -> None:
    adapter = importlib.import_module(f"cac_reward.adapters.{module}")
    if name == "register":  # UniRL's own.
        name = "CaCVideoScorer"
    try:
        assert callable(getattr(adapter, name))
    except ImportError as error:  # The framework is not installed here.
        assert error.name in FRAMEWORKS  # noqa: PT017


def test_the_readme_check_sees_every_row() -> None:
    assert {module for module, _ in names_in_readme()} == set(ADAPTERS) - SHARED - {"genrl"}


def test_every_variable_is_documented() -> None:
    from dataclasses import fields

    from cac_reward.adapters.settings import ENVIRONMENT, ScorerSettings

    for one in fields(ScorerSettings):
        assert f"`{ENVIRONMENT}{one.name.upper()}`" in text_of("docs/adapters.md")
