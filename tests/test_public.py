"""What `import srmu` gives: the names, lazily, and what a person sees of them."""

import ast
import pydoc
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import get_overloads

import pytest
from transformers import PreTrainedModel

import srmu
from srmu.methods import METHODS
from srmu.runs.in_memory import InMemoryResult

NAMES = {
    "unlearn", "Config", "load_config", "make_config", "Run", "Method", "Objective", "Edit",
    "State", "Topic", "Site", "EditableModel", "evaluate", "attack", "compare", "SrmuError",
    "DivergedError",
}  # fmt: skip
ROOMS = [path.name for path in Path(srmu.__file__).parent.iterdir() if (path / "__init__.py").exists()]


def test_public_names() -> None:
    assert set(srmu.__all__) == NAMES | {cls.__name__ for cls in METHODS.values()}
    for name in srmu.__all__:
        assert callable(getattr(srmu, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = srmu.nothing


def test_errors_of_public_functions_name_arguments_not_options() -> None:
    """Python has no `--tasks`: an option with dashes stands in a command to type, or after the argument's name."""
    home = Path(srmu.__file__).parent
    rooms = [path for room in ("engine", "data", "methods", "attacks") for path in (home / room).rglob("*.py")]
    files = ["runs/config.py", "runs/plan.py", "runs/run.py", "runs/training.py", "runs/in_memory.py"]
    files += ["evals/compare.py", "evals/lm_eval.py", "evals/local_tasks.py"]
    wrong = [
        ast.unparse(part)
        for path in (*rooms, *(home / file for file in files))
        for part in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(part, ast.Raise) and re.search(r"(?<![a-z}] )(?<!, )--[a-z]", ast.unparse(part).split("srmu ")[0])
    ]
    assert not wrong


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


def test_types_that_a_user_sees() -> None:
    """Both forms of `unlearn` say what they give, and a config has a Method."""
    config, in_memory = get_overloads(srmu.unlearn)
    assert config.__annotations__["config"] is srmu.Config
    assert config.__annotations__["return"] is srmu.Run
    assert in_memory.__annotations__["method"] == srmu.Method | type[srmu.Method] | str
    assert in_memory.__annotations__["return"] == tuple[PreTrainedModel, InMemoryResult]
    assert srmu.Config.model_fields["method"].annotation is srmu.Method
    assert (Path(srmu.__file__).parent / "py.typed").exists()
