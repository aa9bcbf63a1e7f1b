"""Imports go one way, and the command line answers before torch is loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "srmu"

# A module may import those of a lower rank only.
RANK = {
    "__init__": 22, "__main__": 21, "cli": 20, "measuring": 19, "searching": 19, "auto": 18,
    "reproduce": 18, "frontier": 18, "frontier_tables": 17, "reasons": 17, "places": 17,
    "needs": 17, "tables": 17, "demo": 17,
    "strength": 16, "claims": 16, "report": 16, "sweep": 16, "yardstick": 15, "sections": 15,
    "studies": 15, "compare": 15, "recovery": 14, "robustness": 14, "jobs": 14, "matched": 14,
    "outcomes": 13, "attacks": 13, "analyses": 13, "separability": 13, "scoring": 13, "rerun": 13,
    "evals": 12,
    "run": 12, "plan": 12, "meter": 11, "config": 10, "catalogue": 10, "methods": 9, "sampling": 8,
    "organism": 8, "train": 7, "anchors": 7, "data": 6, "model": 5, "card": 5, "verify": 5,
    "open_world": 4,
    "marks": 4, "loading": 4, "figures": 4, "record": 4, "pages": 3, "study": 3, "space": 3,
    "terminal": 3, "weights": 3, "likelihoods": 3, "cache": 3, "losses": 3, "importance": 3,
    "directions": 3, "world": 3, "entanglement": 3, "ensemble": 3, "checkpoint": 3, "statistics": 2,
    "files": 2, "console": 2, "errors": 1, "relearning": 13,
}  # fmt: skip
PACKAGES = ("methods", "attacks")  # whose files import each other


def imported(path: Path) -> set[str]:
    """The srmu modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "srmu":
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("srmu.")}
    return names


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_go_down(path: Path) -> None:
    module = path.parent.name if path.parent.name in PACKAGES else path.stem
    for name in imported(path) - ({module} & {*PACKAGES}):
        assert RANK[name] < RANK[module], f"{module} imports {name}"


def test_methods_import_base_only() -> None:
    """Inside the package: __init__ may import every method, a method its base and its parent."""
    for path in (SOURCE / "methods").glob("*.py"):
        text = path.read_text()
        if path.stem == "base":
            assert "from srmu.methods" not in text
        elif path.stem != "__init__":
            assert "from srmu.methods import" not in text


def test_public_names() -> None:
    import srmu

    assert srmu.__all__ == [
        "METHODS", "Config", "Diverged", "Run", "UserError", "evaluate", "load_config",
        "make_config", "score", "unlearn",
    ]  # fmt: skip
    assert set(srmu._HOME) == set(srmu.__all__)
    for name in srmu.__all__:
        assert getattr(srmu, name) is not None


def test_cli_starts_without_torch() -> None:
    code = "import sys, srmu.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
