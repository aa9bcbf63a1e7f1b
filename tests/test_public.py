"""What `import srmu` gives: the names, lazily, and what a person sees of them."""

import pydoc
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import srmu
from srmu.methods import METHODS

NAMES = {
    "unlearn", "Config", "load_config", "make_config", "Run", "Method", "Objective", "Edit",
    "State", "Topic", "Site", "EditableModel", "evaluate", "attack", "compare", "SrmuError",
    "DivergedError",
}  # fmt: skip
ROOMS = [
    path.name for path in Path(srmu.__file__).parent.iterdir() if (path / "__init__.py").exists()
]


def test_public_names() -> None:
    assert set(srmu.__all__) == NAMES | {cls.__name__ for cls in METHODS.values()}
    for name in srmu.__all__:
        assert callable(getattr(srmu, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = srmu.nothing


def test_no_function_has_a_packages_name() -> None:
    """After all of them were imported `srmu.attacks` and the others are packages still."""
    for name in srmu.__all__:
        getattr(srmu, name)
    for room in ROOMS:
        assert isinstance(import_module(f"srmu.{room}"), ModuleType)
        assert isinstance(getattr(srmu, room), ModuleType) and room not in srmu.__all__


def test_dir_and_help_show_the_public_names() -> None:
    assert set(srmu.__all__) <= set(dir(srmu))
    page = pydoc.plain(pydoc.render_doc(srmu))
    for name in srmu.__all__:
        assert name in page, name
    assert "method=srmu.RMU()" in page


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = "import sys, srmu; dir(srmu); srmu.SrmuError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_users_types_are_checked(tmp_path: Path) -> None:
    """mypy knows what both forms of `unlearn` give, and that a config has a Method."""
    mypy = pytest.importorskip("mypy.api")
    file = tmp_path / "use.py"
    file.write_text(
        "import srmu\n"
        "reveal_type(srmu.load_config('c.yaml').method)\n"
        "reveal_type(srmu.unlearn(srmu.load_config('c.yaml')))\n"
        "srmu.make_config('m', 'f', method=srmu.RMU(kappa=16))\n"
        "srmu.make_config('m', 'f', method=3)\n"
    )
    out, _, _ = mypy.run(["--follow-imports=silent", "--cache-dir", str(tmp_path), str(file)])
    lines = out.splitlines()
    assert "srmu.methods.base.Method" in lines[0] and ":2: note" in lines[0]
    assert "srmu.runs.run.Run" in lines[1] and ":3: note" in lines[1]
    assert [line.split(":")[1] for line in lines if ": error:" in line] == ["5"]
