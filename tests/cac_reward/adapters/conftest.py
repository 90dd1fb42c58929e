"""A running `cac-reward serve`, as the adapters find it at an address."""

from collections.abc import Iterator

import pytest

from cac_reward.adapters.settings import _load
from tests.serving import Server, running_server

TOKEN = "a token of the adapters' tests"


@pytest.fixture(scope="session")
def one_server() -> Iterator[Server]:
    with running_server("--scorer", "tests.serving:plain_reward", CAC_REWARD_TOKEN=TOKEN) as server:
        yield server


@pytest.fixture
def reward_server(one_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server process that scores by the first frame's red; NaN below 0.1. Its token is set."""
    monkeypatch.setenv("CAC_REWARD_TOKEN", TOKEN)
    yield one_server
    _load.cache_clear()
