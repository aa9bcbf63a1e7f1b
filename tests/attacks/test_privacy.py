"""No file that a command writes holds a sentence of the forget set."""

import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from helpers import attack_world, processes
from helpers.models import write_jsonl
from srmu.cli import main
from srmu.errors import SrmuError

# Words of the tiny world in an order that no other text has: the tokenizer knows each.
CANARY = "w3 w59 w7 w41 w3 w22 w58 w13 w40 w9"
TEXTS = "--forget forget.jsonl --retain neutral.jsonl"
COMMANDS = {
    "unlearn": "unlearn config.yaml",
    "a run that diverges": "unlearn config.yaml train.learning_rate=1e30 runs_dir=lost --debug",
    "eval": "eval RUN",
    "attack": "attack RUN --tasks hazard --utility harmless --limit 40",
    "export": "export RUN exported",
    "verify": "verify RUN --summary summary.md",
    "entanglement": f"inspect texts {TEXTS} --model model",
    "confidence": "inspect RUN --what confidence",
    "alignment": "inspect RUN --what alignment",
    "report": "report RUN -o report.html",
    "auto": f"auto model {TEXTS} --utility harmless --budget 0.9 --trials 1",
    "a bad line": "unlearn config.yaml topics.topic.forget=broken.jsonl --debug",
    "again": "verify RUN --rerun",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = attack_world.write(tmp_path_factory.mktemp("place"))
    texts = [json.loads(line)["text"] for line in (folder / "forget.jsonl").open()]
    write_jsonl(folder / "forget.jsonl", [CANARY, *texts])
    (folder / "broken.jsonl").write_text(json.dumps({"text": CANARY}) + f'\n{{"text": "{CANARY}')
    config = """\
model: model
method: {name: srmu, layer: 2}
topics: {topic: {forget: forget.jsonl, retain: neutral.jsonl}}
train: {max_steps: %d, learning_rate: 3.0e-3, checkpoint_seconds: 0}
eval: [hazard, harmless]
tasks_dir: tasks
runs_dir: %s
"""
    (folder / "config.yaml").write_text(config % (8, "runs"))
    (folder / "killed.yaml").write_text(config % (400, "killed"))
    return folder


def run(command: str) -> int:
    """The exit code of `srmu ...` in this process, which prints into `output.txt`."""
    name = next((p.name for p in Path("runs").glob("*-srmu")), "none")
    words = [word.replace("RUN", f"runs/{name}") for word in command.split()]
    with Path("output.txt").open("a") as output, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["srmu", *words])
        for stream in ("stdout", "stderr"):
            patch.setattr(sys, stream, output)
        try:
            main.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        except SrmuError:  # with --debug
            traceback.print_exc()
            return 1
    return 0


def killed(config: str, until: str) -> int:
    """The exit code of a process that is killed as soon as such a file is there."""
    said = Path("output.txt")
    process = processes.start("-m", "srmu", "unlearn", config, out=said.absolute(), err=said.absolute())
    while process.poll() is None and not [*Path().rglob(until)]:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    return process.wait()


def forms(tokenizer: Any) -> Iterator[bytes]:
    """The canary as text, and as its tokens' numbers in a file of tensors or of JSON."""
    yield CANARY.encode()
    ids = tokenizer(CANARY, add_special_tokens=False)["input_ids"]
    yield b", ".join(b"%d" % i for i in ids)
    yield b"".join(i.to_bytes(8, "little") for i in ids)
    yield b"".join(i.to_bytes(4, "little") for i in ids)


@pytest.mark.slow
def test_no_file_holds_the_canary(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("SRMU_CACHE", str(place / "cache"))
    given = {path for path in place.rglob("*") if path.is_file()}
    for name, command in COMMANDS.items():
        code = run(command)
        failed = name in ("a run that diverges", "a bad line")
        assert code == failed, (name, Path("output.txt").read_text()[-2000:])
    assert killed("killed.yaml", "checkpoint/state.safetensors") == -signal.SIGKILL
    made = {path for path in place.rglob("*") if path.is_file()} - given
    named = {path.name for path in made}
    assert {"record.json", "results.json", "summary.md", "report.html", "README.md"} <= named
    assert [path for path in made if "checkpoint" in path.parts]
    assert [path for path in made if "activations" in path.parts]
    wanted = [*forms(PreTrainedTokenizerFast.from_pretrained(place / "model"))]
    for path in made:
        data = path.read_bytes()
        for form in wanted:
            assert form not in data, f"{path.relative_to(place)} holds the canary"


def test_the_search_finds_what_is_there(place: Path) -> None:
    wanted = [*forms(PreTrainedTokenizerFast.from_pretrained(place / "model"))]
    assert wanted[0] in (place / "forget.jsonl").read_bytes()
