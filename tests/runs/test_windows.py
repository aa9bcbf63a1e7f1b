"""The rules of Windows, as far as Linux can keep them: a run, its results, an export and a sweep."""

from pathlib import Path

import pytest

from helpers.models import Call
from helpers.windows import FORBIDDEN, follow_windows
from srmu.engine.files import write_whole

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="it needs Linux")
QUIZ = Path(__file__).parents[1] / "tasks"


def test_open_files_stay_where_they_are(workplace: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    follow_windows(monkeypatch)
    texts = "topics: {topic: {forget: forget.jsonl, retain: retain.jsonl}}"
    quick = "train: {max_steps: 2, learning_rate: 0.01, checkpoint_seconds: 0.0001}"
    Path("run.yaml").write_text(f"model: model\n{texts}\n{quick}\nmethod: {{layer: 2}}\ntasks_dir: {QUIZ}\n")
    Path("sweep.yaml").write_text(
        "config: run.yaml\nsearch: {method.kappa: [4, 8]}\nobjectives: {quiz/acc: minimize}\n"
    )
    for verb in (["unlearn", "run.yaml", "--out", "out"], ["sweep", "sweep.yaml"], ["report", "sweeps/sweep"]):
        assert call(*verb).code == 0, verb
    (run,) = Path("runs").iterdir()
    for verb in (["eval", run, "--tasks", "quiz"], ["export", run, "again"], ["verify", run], ["verify", "again"]):
        answer = call(*verb)
        assert answer.code == 0, verb
        assert "not saved" not in answer.err
    assert not [*Path().rglob("*lock")]
    assert not [path for path in Path().rglob("*") if FORBIDDEN.search(path.name)]


def test_files_have_the_same_bytes_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of a text are compared with those of its file."""
    given = {}
    real = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda path, text, **how: given.update(how) or real(path, text, **how))
    write_whole(tmp_path / "a", "ü\n")
    assert given == {"encoding": "utf-8", "newline": "\n"}
    for source in (Path(__file__).parents[2] / "src").rglob("*.py"):  # all go that way, but into Linux' own files
        spots = [line for line in source.read_text().splitlines() if ".write_text(" in line and "/proc/" not in line]
        assert len(spots) == (source.name in ("files.py", "local_tasks.py")), source
