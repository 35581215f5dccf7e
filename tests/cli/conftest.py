"""The command line as a fixture, and a plan file to work with."""

import json
from pathlib import Path
from typing import Any

import pytest

from autopar.cli.main import main
from tests.cli.calling import Call

PLANNED = ("mlp-tiny", "--cluster", "local:4", "--pin", "dp=2", "--pin", "tp=2")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return Call(capsys)


@pytest.fixture(scope="session")
def plan_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The plan that `PLANNED` makes."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    assert main(["plan", *PLANNED, "--json", "-o", str(path)]) == 0
    return path.read_text()


@pytest.fixture
def plan_file(tmp_path: Path, plan_text: str) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(plan_text)
    return path


@pytest.fixture
def plan_data(plan_text: str) -> dict[str, Any]:
    return json.loads(plan_text)
