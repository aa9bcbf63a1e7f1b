"""What a person sees before any verb runs: help, version, completion; and how answers are typed."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from helpers.models import Call, save_pico, texts, write_jsonl
from srmu.cli import main, output

VERBS = [
    "demo", "info", "unlearn", "auto", "sweep", "export", "eval", "ask", "attack", "compare", "inspect",
    "report", "verify", "testbed", "reproduce",
]  # fmt: skip
PROGRAM: Any = typer.main.get_command(main.app)


def test_the_verbs_stand_in_groups(call: Call) -> None:
    lines = call("--help").out.splitlines()
    places = {verb: next(i for i, line in enumerate(lines) if line[1:].startswith(f" {verb} ")) for verb in VERBS}
    assert [*PROGRAM.commands] == VERBS == sorted(VERBS, key=places.__getitem__)
    groups = {
        "Start": "demo", "Unlearn": "unlearn", "Measure": "eval", "Show and check": "report",
        "Study": "testbed",
    }  # fmt: skip
    for group, first in groups.items():
        assert f" {group} " in lines[places[first] - 1]


@pytest.mark.parametrize("verb", [*(verb for verb in VERBS if verb != "info"), "info cache"])
def test_help_has_room_at_80_columns(verb: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """No list of choices in the column of types takes it from the column that explains."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = call(*verb.split(), "--help").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert next(line.index("Show this message") for line in lines if " --help" in line) <= 41
    assert not any(
        "|" in line for line in lines if "│" in line and "MODEL|RUN|texts" not in line and "<ls|" not in line
    )


def test_version(call: Call) -> None:
    answer = call("--version")
    assert (answer.code, answer.out) == (0, "srmu 0.1.0\n")


def test_completion() -> None:
    """What a shell asks for when a person types `srmu att<tab>`."""
    words = {"_SRMU_COMPLETE": "complete_bash", "COMP_WORDS": "srmu att", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['srmu']; from srmu.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | words, capture_output=True, text=True)
    assert done.stdout.split() == ["attack"], done.stderr


def test_one_option_means_the_same_in_every_verb() -> None:
    """The same type; the same help but for what a verb adds in words of its own."""
    types: dict[str, dict[str, str]] = {}
    for name, command in PROGRAM.commands.items():
        for option in getattr(command, "params", ()):
            for word in option.opts:
                if word.startswith("--"):
                    # typer 0.19 has the type of click
                    kind = option.type_descriptor.annotation if hasattr(option, "type_descriptor") else option.type.name
                    kind = f"{kind} {option.multiple}"
                    types.setdefault(word, {})[name] = kind
    differ = {word: kinds for word, kinds in types.items() if len({*kinds.values()}) > 1}
    # how much is tried: reproduce takes the tier of its own settings where none is named
    assert set(differ) <= {"--tier"}, differ
    assert "--suite" not in types and "--from-record" not in types
    assert {"--oracle", "--tasks", "--metrics", "--budget", "--seeds", "--out"} <= set(types)


@pytest.mark.slow
def test_paths_with_spaces_are_quoted(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "my place"
    place.mkdir()
    monkeypatch.chdir(place)
    save_pico(place / "a model")
    write_jsonl(place / "forget.jsonl", texts(10, 1, range(30)))
    write_jsonl(place / "retain.jsonl", texts(7, 2, range(20, 60)))
    options = ["--model", "a model", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    quick = ["method.layer=2", "train.max_steps=2", "train.learning_rate=1e-2", "runs_dir=the runs"]
    shown = call("unlearn", *options, *quick).out.splitlines()
    (following,) = (line.removeprefix("next: ") for line in shown if line.startswith("next: "))
    words = shlex.split(following)
    assert words[:2] == ["srmu", "eval"] and Path(words[2], "record.json").is_file()
    shown = call("verify", words[2]).out
    assert f"next: srmu verify {shlex.quote(words[2])} --rerun" in shown


@pytest.mark.parametrize("text", ["", "0,1,2", " 3 , 3,4"])
def test_seeds_are_a_list(text: str) -> None:
    assert output.split_seeds(text) == {"": (), "0,1,2": (0, 1, 2)}.get(text, (3, 4))


def test_a_terminal_without_utf8_loses_a_sign_but_not_the_answer(tmp_path: Path) -> None:
    """lm-eval's scores have a ±, which ASCII has not."""
    code = (
        "import sys; sys.argv = ['srmu', '--version']; from srmu.cli import main; "
        "main.run_verb = lambda words: print('1 ± 2') or 0; main.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "1 ? 2\n"), done.stderr
