"""Options of the test suite, and one thread per process so that runs side by side do not fight over cores."""

import multiprocessing
from multiprocessing import forkserver

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="check every strategy and pair instead of a fixed sample")
    parser.addoption("--programs", type=int, default=300, metavar="N", help="how many random (program, mesh, plan) cases to run")
    parser.addoption("--kills", type=int, default=50, metavar="N", help="how often a training run is killed and must come back")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the run may take hours."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> int:
    """How many times a training run is killed."""
    return int(request.config.getoption("--kills"))


@pytest.fixture(scope="session")
def warm_ranks() -> None:
    """Ranks of this session are forked from a process that has behind it what all of them need."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        forkserver.set_forkserver_preload(["tests.warm"])
        forkserver.ensure_running()


@pytest.fixture(autouse=True)
def _ranks(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gloo"):
        request.getfixturevalue("warm_ranks")
