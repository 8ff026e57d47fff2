"""The layout that CONTRIBUTING.md describes: imports point down only, files are short, scripts are shorter."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

ROOMS = ("networks", "datasets", "utils", "benchmarks")
FILES = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]
MAY_IMPORT = {"networks": {"networks"}, "datasets": {"datasets"}, "utils": {"utils", "datasets", "networks"}}
"""Rooms that each room may import; scripts and benchmarks may import every room."""


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and first name of every absolute import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.split(".")[0]


def test_imports_point_down_only():
    wrong = []
    for path in FILES:
        room = path.parent.name if path.parent != ROOT else "scripts"
        allowed = MAY_IMPORT.get(room, set(ROOMS)) - ({"benchmarks"} if room == "scripts" else set())
        forbidden = {*ROOMS, *(script.stem for script in ROOT.glob("*.py")), "tests"} - allowed
        wrong += [f"{path}:{line} imports {name}" for line, name in imports(path) if name in forbidden]
    assert not wrong


def test_a_file_has_one_idea_and_a_script_of_a_data_set_only_its_settings():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    settings = {path for path in ROOT.glob("*.py") if path.stem.startswith(("train_", "test_"))}
    assert not {path: n for path, n in lines.items() if n > (39 if path in settings else 400)}, "split them by idea"
