"""The layout that CONTRIBUTING.md describes: imports point down only, files are short, scripts are shorter."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = ("networks", "datasets", "utils", "benchmarks")
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
FILES = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]
MAY_IMPORT = {"networks": {"networks"}, "datasets": {"datasets"}, "utils": {"utils", "datasets", "networks"}}
"""Rooms that each room may import; scripts and benchmarks may import every room."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> list[tuple[int, str]]:
    """Return line and first name of every absolute import of a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.lineno, node.module.split(".")[0]))
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down_only(path):
    room = path.parent.name if path.parent != ROOT else "scripts"
    allowed = MAY_IMPORT.get(room, set(ROOMS)) - ({"benchmarks"} if room == "scripts" else set())
    wrong = [(line, name) for line, name in imports(path) if name in {*ROOMS, *SCRIPTS, "tests"} - allowed]
    assert not wrong, "; ".join(f"{name_of(path)}:{line} imports {name}, which {room} must not" for line, name in wrong)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_has_one_idea_and_a_script_of_a_data_set_only_its_settings(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    limit = 39 if path.parent == ROOT and path.stem.startswith(("train_", "test_")) else 400
    assert lines <= limit, f"{name_of(path)} has {lines} lines, at most {limit}: split it by idea"
