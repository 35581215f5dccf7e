"""Options of the test suite, and one thread per process so that runs side by side do not fight over cores."""

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
