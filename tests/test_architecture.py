"""Dependency floors and house rules, read from the source: nothing is imported to check this."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = {"autopar.errors", "autopar.core"}
PLANNING = CORE | {"autopar.rules", "autopar.program", "autopar.stages"}
# floor -> (third-party roots it may import, autopar floors it may import)
FLOORS: dict[str, tuple[set[str], set[str]]] = {
    "autopar.errors": (set(), set()),
    "autopar.core": ({"numpy", "tomlkit"}, {"autopar.errors", "autopar.core"}),
    "autopar.rules": (set(), CORE),
    "autopar.program": (set(), CORE),
    "autopar.stages": (set(), CORE | {"autopar.program"}),
    "autopar.schedules": (set(), CORE | {"autopar.stages"}),
    "autopar.cost_models": ({"numpy"}, CORE),
    "autopar.search": ({"numpy", "networkx", "ortools"}, CORE),
    # the command stands where people look for it and does its work above: an entry, which nothing imports
    "autopar.cost_models.validate": (set(), {"autopar.forecast"}),
    "autopar.forecast": ({"typer", "rich"}, PLANNING | {"autopar.schedules", "autopar.cost_models", "autopar.search", "autopar.planner"}),
    "autopar.planner": ({"numpy"}, PLANNING | {"autopar.schedules", "autopar.cost_models", "autopar.search"}),
    "autopar.joint": ({"numpy"}, PLANNING | {"autopar.schedules", "autopar.cost_models", "autopar.search", "autopar.planner"}),
    "autopar.trace": ({"torch"}, CORE | {"autopar.runtime"}),
    "autopar.runtime": ({"torch"}, CORE | {"autopar.program", "autopar.stages", "autopar.schedules"}),
    "autopar.rewrite": ({"torch"}, CORE | {"autopar.program", "autopar.stages", "autopar.trace", "autopar.runtime"}),
    "autopar.checkpoint": ({"torch", "safetensors"}, CORE | {"autopar.runtime"}),
    "autopar.models": ({"torch", "transformers"}, CORE),
    "autopar.verification": ({"torch"}, PLANNING | {"autopar.schedules", "autopar.planner", "autopar.trace", "autopar.rewrite", "autopar.runtime"}),
    "autopar.request": ({"torch"}, PLANNING | {"autopar.schedules", "autopar.planner", "autopar.joint", "autopar.trace", "autopar.runtime", "autopar.verification"}),
    "autopar.choice": (set(), CORE | {"autopar.request"}),
    "autopar.alternatives": (set(), CORE | {"autopar.planner", "autopar.request"}),
    "autopar.api": ({"torch"}, PLANNING | {"autopar.schedules", "autopar.choice", "autopar.planner", "autopar.trace", "autopar.rewrite", "autopar.runtime", "autopar.verification", "autopar.request"}),
    "autopar.profiler": ({"numpy", "torch"}, PLANNING | {"autopar.cost_models", "autopar.planner", "autopar.trace", "autopar.runtime", "autopar.models", "autopar.api"}),
    "autopar.cli": ({"typer", "rich", "torch"}, PLANNING | {"autopar", "autopar.planner", "autopar.api", "autopar.request", "autopar.verification", "autopar.models", "autopar.runtime", "autopar.profiler", "autopar.choice", "autopar.alternatives"}),
    "autopar.__main__": (set(), {"autopar.cli"}),
    "autopar": (set(), CORE | {"autopar.api", "autopar.verification", "autopar.checkpoint"}),
}
THIRD_PARTY = {"torch", "numpy", "networkx", "ortools", "transformers", "typer", "rich", "tomlkit", "pydantic", "safetensors", "hypothesis", "pytest"}
BARE = {"cost_models", "search"}
MAX_LINES, MAX_FUNCTION_LINES = 400, 60


def floor_of(module: str) -> str:
    return max((f for f in FLOORS if f == module or module.startswith(f + ".")), key=len)


def sources() -> list[tuple[str, Path]]:
    found = []
    for top, prefix in (("autopar", "autopar"), ("cost_models", "autopar.cost_models"), ("search", "autopar.search")):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT / top).with_suffix("").parts
            if top == "autopar" and parts[0] in BARE:
                continue  # reached through the link; checked under its own folder
            found.append((".".join((prefix, *parts)).removesuffix(".__init__"), path))
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imported(tree: ast.Module) -> list[tuple[str, int]]:
    skipped = {child for node in ast.walk(tree) if is_type_checking(node) for child in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(a.name, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", node.lineno)]
    return found


@pytest.mark.parametrize("module,path", sources(), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_stay_on_their_floor(module: str, path: Path) -> None:
    third_party, floors = FLOORS[floor_of(module)]
    for name, line in imported(ast.parse(path.read_text())):
        root, where = name.split(".")[0], f"{path.relative_to(ROOT)}:{line}"
        assert root not in BARE, f"{where} imports {name}: write autopar.{name}"
        assert root not in THIRD_PARTY or root in third_party, f"{where}: {floor_of(module)} may not import {root}"
        if root == "autopar" and floor_of(name) != floor_of(module):
            assert floor_of(name) in floors, f"{where}: {floor_of(module)} may not import {floor_of(name)}"


@pytest.mark.parametrize("module,path", sources(), ids=lambda v: v if isinstance(v, str) else "")
def test_house_rules(module: str, path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_LINES, f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Global), f"{where}: global"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno <= MAX_FUNCTION_LINES, f"{where}: {node.name} is {node.end_lineno - node.lineno} lines long"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{where}: {node.func.id}"
    for name, line in imported(ast.parse(text)):
        assert name.split(".")[0] not in ("pickle", "dill"), f"{path.relative_to(ROOT)}:{line}: {name}"


@pytest.mark.parametrize("name", sorted(BARE))
def test_folder_is_linked_into_the_package(name: str) -> None:
    assert (ROOT / "autopar" / name).resolve() == ROOT / name, f"autopar/{name} must link to ../{name}"
