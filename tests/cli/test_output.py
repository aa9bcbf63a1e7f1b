"""How the verbs answer."""

import json
from pathlib import Path

import pytest

from helpers.models import ARCHITECTURES, Call, save_pico
from srmu.cli.output import confirm_work, shorten_path
from srmu.errors import SrmuError
from srmu.runs.plan import load_tokenizer


def test_a_path_has_no_steps_back_unless_a_link_needs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("configs", "runs", "far/configs"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert (
        shorten_path(tmp_path / "configs/../runs/one") == shorten_path(Path("configs/../runs/one")) == Path("runs/one")
    )
    (tmp_path / "link").symlink_to("far/configs")
    assert shorten_path(tmp_path / "link/../runs") == Path("link/../runs")


def test_long_work_is_asked_about(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A person answers; where there is none, or `--yes` answers, the cost is printed."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    assert confirm_work("it takes hours.", yes=True) and not confirm_work("it takes hours.", yes=False)
    assert capsys.readouterr().err.splitlines() == [
        "it takes hours.",
        "it takes hours. It is left out; --yes starts it.",
    ]
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda text, err: text == "it takes hours. Run it?")
    assert confirm_work("it takes hours.", yes=False)


def test_a_run_of_a_config_in_a_folder_lies_beside_it(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("srmu.runs.estimate.speed_elsewhere", lambda *given: 1e12)
    (tmp_path / "configs").mkdir()
    topic = "topics: {t: {forget: [{path: f.jsonl}], retain: [{path: f.jsonl}]}}"
    kind, sizes = ARCHITECTURES["llama"]
    kind(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "dimensions")
    (tmp_path / "configs/one.yaml").write_text(
        f"model: {tmp_path / 'dimensions'}\nmethod: npo\nruns_dir: ../runs\n{topic}\n"
    )
    done = call("unlearn", "configs/one.yaml", "--dry-run")
    assert done.code == 0, done.err
    assert f"run      {tmp_path}/runs/" in done.out
    assert "next: hf download OWNER/NAME" in done.out.splitlines()[-1]
    planned = json.loads(call("unlearn", "configs/one.yaml", "--dry-run", "--json").out)
    assert Path(planned["run"]).parent == tmp_path / "runs"


def test_a_model_without_a_tokenizer_says_what_to_fetch(tmp_path: Path) -> None:
    folder = save_pico(tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(SrmuError, match=r"has no tokenizer; copy its tokenizer.json there, or .*hf download"):
        load_tokenizer(folder)
