"""The layout that CONTRIBUTING.md describes: imports point down only, files are short, scripts are shorter."""

import ast
from pathlib import Path

from tests.conftest import ROOT

ROOMS = ("networks", "datasets", "utils", "benchmarks")
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
FILES = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]
MAY_IMPORT = {"networks": {"networks"}, "datasets": {"datasets"}, "utils": {"utils", "datasets", "networks"}}
"""Rooms that each room may import; scripts and benchmarks may import every room."""


def imports(path: Path) -> list[tuple[int, str]]:
    """Return line and first name of every absolute import of a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.lineno, node.module.split(".")[0]))
    return found


def test_imports_point_down_only():
    wrong = []
    for path in FILES:
        room = path.parent.name if path.parent != ROOT else "scripts"
        allowed = MAY_IMPORT.get(room, set(ROOMS)) - ({"benchmarks"} if room == "scripts" else set())
        forbidden = {*ROOMS, *SCRIPTS, "tests"} - allowed
        wrong += [f"{path}:{line} imports {name}" for line, name in imports(path) if name in forbidden]
    assert not wrong


def test_a_file_has_one_idea_and_a_script_of_a_data_set_only_its_settings():
    wrong = []
    for path in FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = 39 if path.parent == ROOT and path.stem.startswith(("train_", "test_")) else 400
        wrong += [f"{path} has {lines} lines, at most {limit}: split it by idea"] if lines > limit else []
    assert not wrong
