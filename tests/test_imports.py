"""Imports go one way, and the command line answers before torch is loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "srmu"

# A room imports only those to its left.
ROOMS = (
    "errors", "engine", "data", "testbed", "methods", "runs", "evals", "attacks", "report",
    "search", "reproduce", "cli",
)  # fmt: skip


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports from, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "srmu":
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("srmu.")}
    return names & {*ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_one_way(room: str) -> None:
    allowed = {*ROOMS[: ROOMS.index(room) + 1]}
    for path in [SOURCE / f"{room}.py"] if room == "errors" else (SOURCE / room).rglob("*.py"):
        climbs = imported_rooms(path) - allowed
        assert not climbs, f"{path.relative_to(SOURCE)} imports {climbs}"


def test_every_module_has_a_room() -> None:
    assert {path.stem for path in SOURCE.glob("*.py")} == {"__init__", "__main__", "errors"}
    assert {path.name for path in SOURCE.iterdir() if path.is_dir()} - {"__pycache__"} == {*ROOMS} - {"errors"}


def test_methods_import_base_only() -> None:
    """Inside the room: __init__ may import every method, a method its base and its parent."""
    for path in (SOURCE / "methods").glob("*.py"):
        text = path.read_text()
        if path.stem == "base":
            assert "from srmu.methods" not in text
        elif path.stem not in ("__init__", "reference"):
            assert "from srmu.methods import" not in text


def test_no_test_imports_another() -> None:
    for path in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            assert not any(name.split(".")[-1].startswith("test_") for name in modules), path


def test_cli_starts_without_torch() -> None:
    heavy = {"torch", "numpy", "pandas", "scipy", "plotly", "jinja2", "optuna", "lm_eval", "transformers"}
    code = f"import sys, srmu.cli.main; sys.exit(', '.join({heavy} & {{*sys.modules}}) or None)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).stderr == b""


def test_verbs_that_load_no_model_start_without_transformers() -> None:
    """Which takes seconds to import."""
    verbs = (
        "srmu.methods, srmu.evals.compare, srmu.report.build, srmu.runs.verify, srmu.attacks.suite, srmu.data.topics"
    )
    code = (
        f"import sys, {verbs}; print([name for name in ('transformers', 'datasets', 'lm_eval') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
