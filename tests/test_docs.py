"""What README and docs say to type works, and every command they name exists."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from helpers import attack_world as world
from srmu.attacks import ATTACKS
from srmu.cli import main
from srmu.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SLOW = {"demo", "testbed"}  # `make demo` runs them


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """The srmu commands of a page, continuation lines joined, comments dropped."""
    lines = "".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("srmu ")]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README calls own: the testbed that a table of facts becomes."""
    own = world.save_testbed(tmp_path / "own")
    config = f"model: model\nmethod: {{name: srmu, layer: 2}}\ntopics: {{facts: {{forget: {own}/forget.jsonl, "
    config += f"retain: {own}/retain-high.jsonl}}}}\ntrain: {{max_steps: 4, learning_rate: 1.0e-3}}\n"
    (own / "high.yaml").write_text(config + "eval: [testbed_hazard, testbed_general]\ntasks_dir: tasks\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["srmu", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    return int(stop.value.code or 0)


@pytest.mark.slow
def test_readme_commands_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for arguments in commands(ROOT / "README.md"):
        if arguments[0] in SLOW:
            continue
        made = (place / "own" / "runs").glob("*")
        newest = max(made, key=lambda p: p.stat().st_mtime, default="")
        arguments = [re.sub("^RUN(?=/|$)", str(newest), word) for word in arguments if word != "OTHER_RUN"]
        assert run(arguments, monkeypatch) == 0, arguments
        ran.append(arguments[0])
    assert {"unlearn", "eval", "ask", "attack", "report", "export", "verify", "auto", "compare", "info"} == {*ran}
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize(("name", "page"), [("demo-atlas.json", "README.md"), ("demo.json", "docs/testbed.md")])
def test_docs_have_the_numbers_of_the_demo(name: str, page: str) -> None:
    rows = json.loads((ROOT / "configs" / name).read_text())["rows"]
    both = [row | {"entangled": "either"} if row["method"] == "before" else row for row in rows]
    lines = dict.fromkeys(f"| {' | '.join(row.values())} |" for row in both)
    assert "|---|\n{}\n\n".format("\n".join(lines)) in (ROOT / page).read_text()


@pytest.mark.slow
def test_readme_python_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    told = iter(["w50 w1 w40", "w51 w1 w40", "w52 w2 w48", "w52 w3 w49"])  # in the words of the small model
    code = re.sub(r'"[^"]* is [^"]*\."', lambda _: repr(next(told)), code)
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "forget activations moved" in out and "{'after': {'testbed_hazard/acc': {" in out


def notebook_cells() -> list[dict[str, Any]]:
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_holds_no_output() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in notebook_cells())


@pytest.mark.slow
def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells in order, in a process of their own: a kernel would bring two dozen packages."""
    code = "\n".join("".join(cell["source"]) for cell in notebook_cells())
    code += "\nassert accuracy['after']['africa/acc'] < accuracy['after']['others/acc']"
    code += "\nassert before != after and before != of_run and len(curve) == 100"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "forget activations moved" in done.stdout


@pytest.mark.parametrize(("name", "method"), [("gaussian_rmu", "GaussianRMU"), ("half_ascent", "HalfAscent")])
def test_contributing_method_runs(place: Path, monkeypatch: pytest.MonkeyPatch, name: str, method: str) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(rf"```python title=\"{name}.py\"\n(.*?)```", text, flags=re.DOTALL)
    (place / f"{name}.py").write_text(code)
    named = f"method.name={name}.py:{method}"
    assert name != "gaussian_rmu" or f"`{named}`" in text
    paths = ["--model", "own/model", "--forget", "own/forget.jsonl", "--retain", "own/retain-high.jsonl"]
    options = [named, "train.max_steps=2", "train.learning_rate=0.01"]
    assert run(["unlearn", *paths, *options], monkeypatch) == 0
    assert list((place / "runs").glob(f"*-{name}/delta.safetensors"))


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in commands(page):
        assert run([arguments[0], "--help"], monkeypatch) == 0, arguments
    for target in re.findall(r"^make ([\w-]+)", "".join(blocks(page, "bash")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not link.startswith(("http:", "https:")):
            assert (page.parent / link).exists(), link


def test_forms_and_workflows_are_yaml_and_run_what_is_there() -> None:
    read = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github").rglob("*.yml")}
    for name in ("bug.yml", "feature.yml", "numbers.yml"):
        assert all("value" in part["attributes"] or "label" in part["attributes"] for part in read[name]["body"])
    steps = [step["run"] for name in ("ci.yml", "release.yml") for job in read[name]["jobs"].values()
             for step in job.get("steps", []) if "run" in step]  # fmt: skip
    assert ".ci/run" in steps and (ROOT / ".ci" / "run").exists()
    assert read["release.yml"]["jobs"]["publish"]["permissions"] == {"id-token": "write"}  # and no password


def test_words_we_do_not_use() -> None:
    for page in PAGES:
        assert not re.search(r"\b(certified|erased)\b", page.read_text()), page


def test_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "srmu", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "unlearn" in done.stdout


def test_every_attack_is_on_its_page() -> None:
    from srmu.attacks import ATTACKS

    page = (ROOT / "docs" / "attacks.md").read_text()
    rows = re.findall(r"^\| (E\d+) \| `(\w+)` \| (\w+)", page, flags=re.MULTILINE)
    assert rows == [(one.id, name, one.tier) for name, one in ATTACKS.items()]


def test_each_row_of_reliability_names_its_tests() -> None:
    rows = [
        line
        for line in (ROOT / "docs" / "reliability.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith("| what happens")
    ]
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, name in named:
            tests = [path.read_text() for path in (ROOT / "tests").rglob(file)]
            assert any(f"def {name}(" in text for text in tests), name


def test_what_others_have_is_named_as_here() -> None:
    """Each name on the page of peers is a method, an attack or a verb."""
    text = (ROOT / "docs" / "peers.md").read_text()
    cells = re.findall(r"^\| (.+?) \| (.+?) \|$", text, flags=re.MULTILINE)
    named = [name for _, cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    verbs = {name.split()[1] for name in named if name.startswith("srmu ")}
    assert verbs <= {*typer.main.get_command(main.app).commands}  # type: ignore[attr-defined]
    others = {name for name in named if not name.startswith("srmu ") and "=" not in name}
    assert others <= {*METHODS, *ATTACKS}
    assert {"ga", "npo", "gcg", "memorisation"} <= others
