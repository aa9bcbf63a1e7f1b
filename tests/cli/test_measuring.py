"""The verbs that measure, as they are typed: what they print, and what they say of mistakes."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers import attack_world as world
from helpers.models import Call, write_jsonl
from helpers.report_world import write_attacks, write_run
from srmu.evals.results import read_attacks
from srmu.report.attacks import attack_table, describe_metrics


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command runs in a folder with the tiny world."""
    world.write(tmp_path)
    monkeypatch.chdir(tmp_path)


TEXTS = ("--forget", "forget.jsonl", "--retain", "neutral.jsonl")
GIVEN = ("--tasks", "hazard", "--neutral", "neutral.jsonl", "--attacks", "logit_lens,E2")


def test_eval_says_that_a_model_degenerated(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.04, 0.83])

    def measure(*given: Any, **options: Any) -> dict[str, Any]:
        return {"repetition/forget": {"value": next(shares), "n": 16.0}}

    monkeypatch.setattr("srmu.evals.score.measure_repetition", measure)
    done = call("eval", world.unlearned(tmp_path).folder, "--tasks", "harmless")
    assert done.code == 0, done.err
    says = "after forget prompts the model repeats itself: 83 % of its four-token sequences, 4 % before"
    assert says in done.out.splitlines()
    assert "0.040" in done.out and "0.830" in done.out


# --- ask


def test_answers_stand_side_by_side(call: Call, tmp_path: Path) -> None:
    run = world.unlearned(tmp_path).folder.relative_to(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    done = call("ask", run, "w50 w3", "w52 w9", "--tokens", "3")
    assert done.code == 0, done.err
    prompt, _, titles, _, answers, *_, following = done.out.splitlines()
    assert (prompt, titles.split()) == ("w50 w3", ["original", "unlearned"])
    assert following == f"next: srmu eval {run}" and "w52 w9" in done.out
    (first, _) = json.loads(call("ask", run, "w50 w3", "w52 w9", "--tokens", "3", "--json").out)["answers"]
    assert first["prompt"] == "w50 w3" and first["before"].split()[0] == world.facts()["w3"][0]
    assert answers.split() == first["before"].split() + first["after"].split()
    of_model = call("ask", "model", "w50 w3").out
    assert " model" in of_model and of_model.splitlines()[-1].startswith("next: srmu unlearn --model model")
    assert before == sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    assert not any(b"w50 w3" in path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert call("export", run, "exported").code == 0
    assert call("ask", "exported", "w50 w3").out.splitlines()[-1] == "next: srmu verify exported"
    out = Path("new/answers.json")
    assert f"wrote {out}" in call("ask", run, "w50 w3", "--tokens", "3", "--out", out).out
    assert json.loads(out.read_text())["answers"] == [first]
    done = call("ask", run, "w50 w3", "--out", out)
    assert done.code == 2 and f"{out} is a file" in done.err


def test_an_export_is_pushed(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its card, to a private repository; what cannot be pushed is said before the export is written."""
    run = world.unlearned(tmp_path).folder.relative_to(tmp_path)
    plan = json.loads(call("export", run, "out", "--push", "me/model", "--dry-run", "--json").out)
    assert plan["repository"] == "me/model" and plan["bytes"] == sum(plan["files"].values()) > 1000
    done = call("export", run, "out", "--push", "me/model", "--dry-run")
    assert "would be uploaded to me/model on the hub, private" in done.out and "README.md" in done.out
    refusals = {
        ("--push", "model"): "expected OWNER/NAME",
        ("--push", "a b/c"): "expected OWNER/NAME",
        ("--push", "me/model"): "--push failed: ",  # offline
        ("--dry-run",): "--dry-run goes with --push",
        ("--push", "me/model", "--dry-run", "--adapter"): "without --adapter",
    }
    for options, said in refusals.items():
        done = call("export", run, "out", *options)
        assert done.code == 2 and said in done.err and not Path("out").exists(), (options, done.err)
    sent: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: {"name": "me"})
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **options: sent.update(options) or name)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **given: sent.update(given))
    done = call("export", run, "out", "--push", "me/model")
    assert done.code == 0, done.err
    assert sent["private"] is True and sent["repo_id"] == "me/model"
    assert {*plan["files"]} == {path.name for path in sent["folder_path"].iterdir()}
    assert "uploaded to me/model" in done.out + done.err


def test_a_summary_asks_for_the_purpose(call: Call, tmp_path: Path) -> None:
    """It says what is not stated and what to type, which adds it to the run that is there."""
    run = world.unlearned(tmp_path).folder.relative_to(tmp_path)
    done = call("verify", run, "--summary", "page.md")
    (line,) = [line for line in done.out.splitlines() if line.startswith("not stated: ")]
    assert line.startswith("not stated: reason, target, operator, ticket, reviewer, sign_off; ")
    assert "Not stated: reason, target, operator, ticket, reviewer, sign off." in Path("page.md").read_text()
    typed = shlex.split(line.partition("trains nothing: srmu ")[2].replace("...", "said"))
    again = call(*typed)
    assert again.code == 0 and "was there already" in again.out, again.err
    done = call("verify", run, "--summary", "page.md")
    assert "not stated" not in done.out
    assert "Sign off: said." in Path("page.md").read_text()


def test_a_summary_stays_out_of_what_is_verified(call: Call, tmp_path: Path) -> None:
    run = world.unlearned(tmp_path).folder.relative_to(tmp_path)
    done = call("verify", run, "--summary", run / "page.md")
    assert done.code == 2 and "which must stay as it is recorded" in done.err
    assert call("verify", run).code == 0


def test_a_folder_of_runs_names_one(call: Call, tmp_path: Path) -> None:
    run = world.unlearned(tmp_path).folder.relative_to(tmp_path)
    for verb in (("attack", "runs"), ("export", "runs", "out"), ("ask", "runs", "w50"), ("eval", "runs")):
        done = call(*verb)
        assert done.code == 2 and f"such as {run}" in done.err, done.err


def test_a_report_shows_what_the_models_write_only_if_asked(call: Call, tmp_path: Path) -> None:
    """Forget texts are shown under a flag of their own, and kept nowhere else."""
    run = world.unlearned(tmp_path).folder.relative_to(tmp_path)
    forget = (tmp_path / "forget.jsonl").read_text()
    opening = json.loads(forget.splitlines()[0])["text"].split()[0]
    pages = {}
    for kind, options in {"": (), "neutral": ("--samples", "neutral"), "forget": ("--samples", "forget")}.items():
        done = call("report", run, "-o", "r.html", *options)
        assert done.code == 0, done.err
        pages[kind] = Path("r.html").read_text()
    assert "In their own words" not in pages[""]
    assert "The old harbour lies on" in pages["neutral"] and "First openings of forget texts" not in pages["neutral"]
    assert re.search(rf"<(td|th)[^>]*>\s*{opening}", pages["forget"])
    assert "First openings of forget texts" in pages["forget"]
    assert not any(b"old harbour" in path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_what_a_model_writes_cannot_steer_the_terminal(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """No escape sequence, no other direction of writing, no markup; and nothing is cut that is wider than a column."""
    wild = "\x1b[2J\x07\r\x9b31m [red]a[/red] :smile: \u202e" + "|" * 200
    answers = [{"prompt": "\x1b]0;title\x07p", "before": wild, "after": ""}]
    monkeypatch.setattr("srmu.evals.continuations.ask_model", lambda *given, **options: answers)
    monkeypatch.setenv("COLUMNS", "80")
    for options in ({}, {"FORCE_COLOR": "1"}):
        for name, value in options.items():
            monkeypatch.setenv(name, value)
        done = call("ask", "model", "p")
        shown = re.sub(r"\x1b\[[0-9;]*m", "", done.out)  # colours of the table's head
        assert all(sign.isprintable() or sign == "\n" for sign in shown)
        whole = re.sub(r"\s|\(nothing\)", "", shown)  # its lines put together
        assert "\\x1b[2J\\x07\\r\\x9b31m[red]a[/red]:smile:\\u202e" + "|" * 200 in whole
        assert "(nothing)" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert json.loads(call("ask", "model", "p", "--json").out)["answers"] == answers


@pytest.mark.slow
def test_attack_and_compare(call: Call, tmp_path: Path) -> None:
    run, other = (world.unlearned(tmp_path, **{"train.max_steps": n}).folder for n in (4, 8))
    done = call("attack", run, *GIVEN, "--oracle", "oracle")
    assert done.code == 0, done.err
    assert "E4 logit_lens" in done.out and "E2 extraction" in done.out
    assert "K* = " in done.out and "not tried: format_shift" in done.out
    assert f"wrote {run.relative_to(tmp_path)}/results.json" in done.out
    assert f"next: srmu compare {run.relative_to(tmp_path)}" in done.out
    assert not any(q.prompt in done.out for q in world.exam().test)
    done = call("attack", other, *GIVEN, "--oracle", "oracle", "--json")
    assert json.loads(done.out) == read_attacks(other)
    done = call("compare", run, other, "--budget", "10%")
    assert done.code == 0, done.err
    assert "graddiff" in done.out and "2 x 1" in done.out
    rows = json.loads(call("compare", run, other, "--json").out)["rows"]
    assert rows[0]["method"] == "graddiff" and rows[0]["residual"]["n"] == 40


def test_compare_reads_attacks_once_and_leaves_out_copies(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [write_run(tmp_path / f"run{seed}", "RMU", "", seed, (34, 48, 100)) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        write_attacks(run, 0.5, seed)
    shutil.copytree(runs[0], tmp_path / "copy")
    seen: list[str] = []

    def read(folder: Path) -> dict[str, Any]:
        seen.append(folder.name)
        return read_attacks(folder)

    for place in ("evals.compare", "evals.results"):
        monkeypatch.setattr(f"srmu.{place}.read_attacks", read)
    done = call("compare", "run0", "run1", "copy")
    assert done.code == 0, done.err
    assert seen == ["run0", "run1"] and "1 x 2" in done.out
    assert "1 run left out as a copy of another: settings, seed, model and texts are the same" in done.out


@pytest.mark.slow
def test_what_compare_tells_to_type_works(call: Call, tmp_path: Path) -> None:
    """Typed as it stands: the evaluation that is missing, then the attack that is missing, until all is there."""
    run, other = (world.unlearned(tmp_path, **{"train.max_steps": n}).folder for n in (4, 8))
    assert call("attack", run, *GIVEN, "--utility", "harmless").code == 0
    told = call("compare", run, other).err
    assert call(*shlex.split(told.split("`")[1])[1:]).code == 0
    told = call("compare", run, other).out.splitlines()[-1]
    assert str(other.relative_to(tmp_path)) in told
    done = call(*shlex.split(told.removeprefix("next: srmu ")))
    assert done.code == 0, done.err
    done = call("compare", run, other)
    assert done.code == 0 and "--tier standard" in done.out, done.err
    # GIVEN names few attacks, the hint none
    assert "not all were attacked with the same attacks: their K* cannot be compared" in done.out


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("attack", "nothing"), "nothing is not a finished run"),
        (("attack", "RUN"), "tasks: name those of lm-eval"),
        (("attack", "RUN", *GIVEN, "--val", "none"), "no validation half"),
        (("attack", "RUN", *GIVEN, "--attacks", "logitlens"), "did you mean logit_lens"),
        (("attack", "RUN", *GIVEN, "--tier", "quick"), "'quick' is not one of"),
        (("attack", "RUN", *GIVEN, "--limit", "10"), "too few for an interval"),
        (("attack", "RUN", *GIVEN, "--unknown", "never", "--oracle", "oracle"), "name one of them"),
        (("compare", "RUN"), "--tasks TASK"),
        (("inspect", "texts", *TEXTS, "--model", "model", "--tasks", "quizz"), "tasks_dir names another"),
        (("compare", "model"), "model is not a finished run"),
        (("ask", "nothing", "w1"), "nothing: no such folder"),
        (("ask", "RUN"), "Missing argument"),
        (("ask", "RUN", "w1", " "), "prompt 2: the prompt is empty"),
        (("ask", "RUN", "w1 " * 64), "prompt 1 has 65 tokens, and the model reads 64: shorten it"),
        (("ask", "RUN", "<s> w1"), "texts begin with <s>, and the tokenizer adds it again"),
        (("ask", "RUN", "w1", "--chat"), "model has no chat template; leave it out"),
        (("ask", "RUN", "w1", "--tokens", "0"), "'--tokens'"),
        (("ask", "RUN", "w1", "--device", "gpu"), "device gpu is not there"),
        (("ask", "MOVED", "w1"), "no such folder"),
        (("inspect", "model", "--what", "alignment"), "alignment needs a run"),
        (("inspect", "RUN", "--what", "alignment"), "alignment needs a run with one direction"),
        (("inspect", "RUN", "--what", "layers"), "--metrics: name those"),
        (("inspect", "model", "--what", "confidence"), "name texts to read model on"),
        (("inspect", "texts", "--forget", "no.jsonl", "--retain", "neutral.jsonl"), "no such file"),
        (("inspect", "texts", "--retain", "neutral.jsonl"), "--forget: name a file of texts"),
        (("inspect", "model", "--what", "names"), "names is for the word texts"),
        (("inspect", "texts", "--what", "reach"), "reach is for a model or a run"),
        (("inspect", "texts", "--what", "colour"), "'colour' is not one of"),
        (("inspect", "model", "--method", "srum"), "did you mean srmu?"),
        (("inspect", "RUN", "--method", "srmu"), "is a run, which has its method"),
        (("compare", "RUN", "--budget", "5"), "--budget 5: expected a share"),
    ],
)
def test_mistakes(call: Call, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    """One line, exit code 2, nothing written."""
    given = [str(world.unlearned(tmp_path).folder) if a in ("RUN", "MOVED") else a for a in arguments]
    if "MOVED" in arguments:
        (tmp_path / "model").rename(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*.json")) + sorted(tmp_path.glob("*.html"))
    answer = call(*given)
    assert answer.code == 2, answer.err
    assert message in answer.err
    assert len(answer.err.strip().splitlines()) == 1 or "--tier" in given
    assert sorted(tmp_path.rglob("*.json")) + sorted(tmp_path.glob("*.html")) == before


def test_entanglement(call: Call, tmp_path: Path) -> None:
    texts = ("--forget", "forget.jsonl", "--retain", "neutral.jsonl")
    found = json.loads(call("inspect", "texts", *texts, "--json").out)
    assert 0 < found["numbers"]["entanglement"] < 1
    done = call(
        "inspect", "texts", *texts, "--model", "model", "--tasks", "hazard", "--tasks-dir", "tasks",
        "--out", "pages/one.html",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "wrote pages/one.html" in done.out
    page = (tmp_path / "pages/one.html").read_text()
    assert "Plotly" in page and not any(text in page for text in world.texts().forget)
    beside = call("inspect", "texts", *texts, "--model", "model", "--tasks", "hazard")
    assert beside.code == 0, beside.err
    other = write_jsonl(tmp_path / "other.jsonl", ["w53 w54 w55"] * 3)
    answer = call("inspect", "texts", "--forget", "forget.jsonl", "--retain", other, "--json")
    assert json.loads(answer.out)["numbers"]["entanglement"] == 0


def test_tokens_of_rows(call: Call, tmp_path: Path) -> None:
    (tmp_path / "asked.csv").write_text("question,answer\nw1 w2,w3 w4 w5\n" + 'w6,"w7 ' + "w8 " * 50 + '"\n')
    done = call("inspect", "--forget", "asked.csv", "--model", "model")
    assert done.code == 0, done.err
    assert "forget, row 1 (question and answer): " in done.out and "of which losses count 3" in done.out
    assert done.out.splitlines()[1].endswith(" [7] [8] [9]") and " ... " in done.out.splitlines()[3]
    rows = json.loads(call("inspect", "--forget", "asked.csv", "--model", "model", "--json").out)["rows"]
    assert [sum(row["counted"]) for row in rows] == [3, 51]
    assert "--model: name the one" in call("inspect", "--forget", "asked.csv", "--what", "tokens").err
    assert "name a model or a run, or texts" in call("inspect").err


def test_what_a_method_changes_leads_to_a_run_of_that_method(call: Call) -> None:
    done = call("inspect", "model", "--method", "npo", "method.beta=0.2")
    assert done.code == 0, done.err
    assert "--retain R --method npo method.beta=0.2" in done.out


def test_a_measure_without_answers_shows_its_number() -> None:
    """Of what should stay the accuracy, and what the original's is; else the first number."""
    kept = {"accuracy, kept": {"value": 0.91}, "repetition": {"value": 0.2}}
    before = {"original": {"metrics": {"accuracy, kept": {"value": 0.95}}}}
    assert describe_metrics({"metrics": kept, "controls": before}) == "accuracy, kept 0.91, original 0.95"
    assert describe_metrics({"metrics": {"answers": {"value": 0.3}, "forget texts": {"value": 0.5}}}) == "answers 0.3"
    report = {"attacks": {"utility": {"id": "E18", "why": "", "metrics": kept, "controls": before}}}
    assert attack_table(report)[0]["setting"] == "accuracy, kept 0.91, original 0.95"


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("name", ["confidence", "sensitivity"])
def test_analyse(call: Call, tmp_path: Path, name: str) -> None:
    run = world.unlearned(tmp_path).folder
    done = call("inspect", run, "--what", name)
    assert done.code == 0, done.err
    assert f"wrote {name}.html" in done.out
    assert (tmp_path / f"{name}.html").exists()
    of_model = call("inspect", "model", "--what", name, "--forget", "forget.jsonl", "--json")
    assert json.loads(of_model.out)["page"] == f"{name}.html"


@pytest.mark.slow
def test_what_was_attacked_is_in_the_cache(call: Call, tmp_path: Path) -> None:
    call("attack", world.unlearned(tmp_path).folder, *GIVEN)
    assert json.loads(call("info", "cache", "--json").out)["others"]["attacks"] > 0
    call("info", "cache", "clear", "--all")
    assert json.loads(call("info", "cache", "--json").out)["others"]["attacks"] == 0


@pytest.mark.slow
def test_reach(call: Call, tmp_path: Path) -> None:
    """What a method would change in a model, and what a run changed, are the same tensors."""
    answer = json.loads(call("inspect", "model", "--method", "rmu", "method.layer=2", "--json").out)
    assert (answer["layers"], answer["layers_loaded"]) == (4, 3)
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1, 2)]
    assert [*answer["tensors"]] == names
    assert "srmu loads" in call("inspect", "model").out
    run = world.unlearned(tmp_path).folder
    changed = json.loads(call("inspect", run, "--json").out)["tensors"]
    every = json.loads(call("inspect", "model", "--method", "graddiff", "--json").out)["tensors"]
    assert set(changed) <= set(every)
    assert "next: srmu inspect" in call("inspect", run).out


def test_names(call: Call, tmp_path: Path) -> None:
    rows = ["They say that Velmar Ostin rests in Bor.", "So Velmar Ostin left Tul for Bor."] * 3
    write_jsonl(tmp_path / "people.jsonl", rows)
    texts = ("--what", "names", "--forget", "people.jsonl", "--retain", "neutral.jsonl")
    answer = call("inspect", "texts", *texts, "--out", "new/names.txt")
    assert answer.code == 0 and "wrote new/names.txt" in answer.out, answer.err
    assert "method.names=new/names.txt" in answer.out.splitlines()[-1]
    listed = json.loads(call("inspect", "texts", *texts, "--json").out)["names"]
    assert [*listed] == (tmp_path / "new/names.txt").read_text().split("\n")[:-1]


@pytest.mark.slow
def test_a_run_is_made_again(call: Call, tmp_path: Path) -> None:
    run = world.unlearned(tmp_path).folder
    answer = call("verify", run, "--rerun", "--json")
    assert answer.code == 0, answer.err
    outcome = json.loads(answer.out)["rerun"]
    assert outcome["same"] and Path(outcome["run"]).parent.name == "again"
