"""What every test relies on: fixed seeds, one thread, no network, and a reason for each skip."""

import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

# Before torch and huggingface_hub are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
CHECKPOINTS = REPOSITORY / "examples" / "toy_world" / "checkpoints"
LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the command line ask for the network, and refuse files that were skipped wholly."""
    parser.addoption("--network", action="store_true", help="run the tests marked network too")
    parser.addoption(
        "--fail-on-skipped-file",
        action="store_true",
        help="fail when all tests of a file were skipped, unless they need a GPU or the network",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Keep the hub out of reach, here and in the processes that tests start."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if not config.getoption("--network"):
        os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="gpu: this machine has no CUDA device"))
        if item.get_closest_marker("network") and not config.getoption("--network"):
            item.add_marker(pytest.mark.skip(reason="network: asked for with --network only"))


def wholly_skipped_files(reports: list[tuple[str, str, str]]) -> list[str]:
    """Files of which no test ran, from (test id, outcome, reason of the skip) of each test."""
    ran, skipped = set(), set()
    for test_id, outcome, reason in reports:
        file = test_id.partition("::")[0]
        if outcome != "skipped":
            ran.add(file)
        elif "gpu: " not in reason and "network: " not in reason:
            skipped.add(file)
    return sorted(skipped - ran)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run that only passed because a whole file of tests did not run."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if not session.config.getoption("--fail-on-skipped-file") or terminal is None:
        return
    reports = [
        (report.nodeid, report.outcome, str(report.longrepr))
        for outcome in ("passed", "failed", "skipped")
        for report in terminal.stats.get(outcome, [])
    ]
    missing = wholly_skipped_files(reports)
    if missing and exitstatus == pytest.ExitCode.OK:
        terminal.write_line("every test was skipped in: " + ", ".join(missing), red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections that leave this machine, except in tests marked network."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in LOCAL_HOSTS:
            raise RuntimeError(f"tests must not use the network, got a connection to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def toy_generator_folder() -> Path:
    """The shipped toy generator, a stock WanPipeline folder."""
    return _checkpoint("generator", "model_index.json")


@pytest.fixture(scope="session")
def toy_judge_folder() -> Path:
    """The shipped toy judge, a stock Qwen3-VL folder."""
    return _checkpoint("judge", "config.json")


@pytest.fixture
def toy_videos() -> torch.Tensor:
    """Two clips [2 13 3 32 32] in [0, 1]: a square that moves right, and the same one standing."""
    videos = torch.full((2, 13, 3, 32, 32), 0.25)
    for frame in range(13):
        videos[0, frame, 0, 12:20, 4 + frame : 12 + frame] = 1.0
        videos[1, frame, 0, 12:20, 4:12] = 1.0
    return videos


@pytest.fixture
def single_thread() -> Iterator[None]:
    """One torch thread, for results that must agree bit for bit between runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _checkpoint(name: str, file: str) -> Path:
    folder = CHECKPOINTS / name
    if not (folder / file).exists():
        pytest.skip(f"{folder.relative_to(REPOSITORY)} is missing; make toy-checkpoints makes it")
    return folder
