"""Imports go one way, and the command line answers before torch is loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "srmu"

# A module may import those of a lower rank only.
RANK = {
    "__init__": 23, "__main__": 22, "cli": 21, "measuring": 20, "searching": 20, "auto": 19,
    "suites": 15, "suite_scores": 16, "suite_tables": 17, "people": 4, "recast": 5,
    "reproduce": 19, "frontier": 19, "frontier_tables": 18, "reasons": 18, "robust": 18,
    "places": 18, "needs": 18, "tables": 18, "demo": 19, "strength": 17, "claims": 17, "report": 18,
    "sweep": 17, "yardstick": 16, "sections": 16, "studies": 16, "compare": 16, "recovery": 15,
    "robustness": 15, "jobs": 15, "matched": 15, "outcomes": 14, "attacks": 14, "analyses": 14,
    "separability": 14, "scoring": 14, "rerun": 14, "relearning": 14, "evals": 13, "run": 13,
    "plan": 13, "meter": 12, "config": 11, "catalogue": 11, "methods": 10, "elicit": 9, "names": 2,
    "sampling": 8, "organism": 8, "train": 7, "anchors": 7, "data": 6, "model": 5, "card": 5,
    "verify": 5, "open_world": 4, "marks": 4, "loading": 4, "figures": 4, "record": 4, "pages": 3,
    "study": 3, "space": 3, "terminal": 3, "weights": 3, "likelihoods": 3, "cache": 3, "losses": 3,
    "importance": 3, "directions": 3, "world": 3, "entanglement": 3, "ensemble": 3, "checkpoint": 3,
    "statistics": 2, "scale": 2, "files": 2, "console": 2, "ranks": 2, "errors": 1,
}  # fmt: skip
PACKAGES = ("methods", "attacks", "suites")  # whose files import each other


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
