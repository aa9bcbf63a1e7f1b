"""The verb that looks inside: a model, a run, or texts before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from srmu.cli import options, output
from srmu.engine.progress import show_progress, silence_libraries
from srmu.errors import SrmuError

if TYPE_CHECKING:
    from srmu.evals.figures import Analysis

verbs = typer.Typer()

TEXTS = "texts"  # the target that is neither a model nor a run
OF_TEXTS, OF_RUNS = ("entanglement", "names"), ("alignment", "layers")
What = Literal["reach", "confidence", "sensitivity", "alignment", "layers", "entanglement", "names"]
Subject = Annotated[
    What | None,
    Option(
        help="Of a model or a run: reach (default), confidence, sensitivity; of a run: alignment, "
        "layers; of texts: entanglement (default), names."
    ),
]
Definition = Annotated[
    Literal["pair_containment", "pair_multiset", "corpus_jaccard"],
    Option(help="entanglement: which overlap of n-grams."),
]
Tokens = Annotated[Literal["predicted", "generated"], Option(help="confidence: of which tokens.")]


@verbs.command("inspect", rich_help_panel="Measure")
def inspect_command(
    target: Annotated[str, Argument(metavar="MODEL|RUN|texts", help="A model, a run, or the word: texts.")],
    settings: Annotated[list[str] | None, Argument(metavar="key=value", help="reach: method.layer=3.")] = None,
    what: Subject = None,
    method: Annotated[str, Option(help="reach: one method; default: all.")] = "",
    forget: options.Forget = None,
    retain: options.Retain = None,
    model: Annotated[str, Option(help="entanglement: compare its activations, too.")] = "",
    tasks: Annotated[str, Option(help="entanglement: are they in the texts? a,b")] = "",
    tasks_dir: options.TasksDir = None,
    definition: Definition = "pair_containment",
    tokens: Tokens = "predicted",
    metrics: options.Metrics = "",
    device: options.Device = "auto",
    out: Annotated[Path | None, Option(help="The page, WHAT.html; names: a .txt file.")] = None,
    as_json: options.Json = False,
) -> None:
    """Look inside a model, a run or texts: what a method changes, how entangled texts are."""
    silence_libraries()
    what = what or ("entanglement" if target == TEXTS else "reach")
    if (what in OF_TEXTS) != (target == TEXTS):
        wanted = "a run" if what in OF_RUNS else "a model or a run"
        wanted = "the word texts" if what in OF_TEXTS else wanted
        raise SrmuError(f"inspect {target} --what {what}: {what} is of {wanted}; name that instead")
    if what == "reach":
        print_reach(target, method, settings or [], as_json)
        return
    texts = {"forget": read_files(forget), "retain": read_files(retain)}
    required = {"entanglement": ["forget", "retain"], "names": ["forget"]}.get(what, [])
    if missing := [role for role in required if not texts[role]]:
        raise SrmuError(f"--{missing[0]}: name a file of texts")
    if what == "names":
        list_names(texts, out, as_json)
        return
    from srmu.report.studies import write_analysis

    if what == "entanglement":
        found = compare_texts(texts, tasks, tasks_dir, model, definition, device)
    else:
        found = measure_activations(what, target, texts, tokens, metrics, device)
    page = write_analysis(found, out or Path(f"{what}.html"))
    answer = {"numbers": found.numbers, "sentences": found.sentences, "page": str(page)}
    output.print_result(answer, as_json, *found.sentences, f"wrote {page}", output.open_in_browser(page))


def read_files(paths: list[str] | None) -> list[str]:
    from srmu.data.sources import Source, read_texts

    return read_texts([Source(path=path) for path in paths or []])


def print_reach(target: str, method: str, settings: list[str], as_json: bool) -> None:
    """What a method would load and change in a model; what a run has changed."""
    from srmu.runs.plan import measure_reach
    from srmu.runs.run import Run, list_changes

    if (Path(target) / "record.json").exists():
        if method or settings:
            raise SrmuError(f"{target} is a run, which has its method: leave out --method")
        answer, rows = list_changes(Run.open(target))
        following = output.next_command("inspect", target, "--what", "sensitivity")
    else:
        answer, rows = measure_reach(target, method or "srmu", settings)
        following = output.next_command("unlearn", "--model", target, "--forget", "F", "--retain", "R")
    output.print_result(answer, as_json, answer["sentence"], following, table=rows)


def list_names(texts: dict[str, list[str]], out: Path | None, as_json: bool) -> None:
    """List what look like names in forget texts, for a review: rename_scrub swaps them."""
    from srmu.data.names import find_names
    from srmu.engine.files import require_free, write_whole

    if out is not None:
        if out.suffix != ".txt":
            raise SrmuError(f"--out {out}: expected a .txt file")
        require_free(out)
    names = find_names(texts["forget"], texts["retain"])
    counts = {name: sum(name in text for text in texts["forget"]) for name in names}
    lines = [f"{len(names)} look like names: strike those that are none, add what is missing"]
    if out is None:
        lines.append("next: the same with --out names.txt, and edit that file")
    else:
        write_whole(out, "".join(f"{name}\n" for name in names))
        method = ("method.name=rename_scrub", f"method.names={out}")
        lines += [f"wrote {out}", output.next_command("unlearn", "CONFIG", *method)]
    table = [{"name": name, "texts": str(count)} for name, count in counts.items()]
    output.print_result({"names": counts}, as_json, *lines, table=table)


def compare_texts(
    texts: dict[str, list[str]], tasks: str, tasks_dir: Path | None, model: str, definition: Definition, device: str
) -> Analysis:
    """How entangled two sets of texts are, and what to do about it."""
    from srmu.evals.analyses import open_model
    from srmu.evals.lm_eval import load_questions
    from srmu.evals.separability import measure_entanglement

    questions = [
        (question.prompt, question.answer, question.entry)
        for task in output.split_names(tasks)
        for question in load_questions(task, tasks_dir)
    ]
    opened = open_model(model, device) if model else None
    inside = (opened[0].module, opened[1]) if opened else None
    return measure_entanglement(
        texts["forget"], texts["retain"], questions, inside, definition=definition, watch=show_progress
    )


def measure_activations(
    what: str, target: str, texts: dict[str, list[str]], tokens: Tokens, metrics: str, device: str
) -> Analysis:
    """One of the analyses of arXiv 2408.06223, of a model or a run."""
    from srmu.evals import analyses
    from srmu.evals.score import score_model
    from srmu.runs.run import find_run

    run = find_run(target)
    if what in OF_RUNS:
        if run is None:
            raise SrmuError(f"{what} needs a run, which {target} is not: srmu unlearn makes one")
        if what == "alignment":
            return analyses.measure_alignment(run, *analyses.open_model(target, device), watch=show_progress)
        if not metrics:
            raise SrmuError("--metrics: name those that should fall, such as wmdp_bio/acc")
        return analyses.sweep_layers(run.config, score_model, output.split_names(metrics), watch=show_progress)
    if run and not any(texts.values()):
        texts = analyses.read_topic_texts(run.config)
    read = {role: rows for role, rows in texts.items() if rows}
    if not read:
        raise SrmuError(f"name texts to read {target} on: --forget F, --retain R, or both")
    model = analyses.open_model(target, device)
    if what == "confidence":
        return analyses.measure_confidence(*model, read, tokens=tokens, watch=show_progress)
    return analyses.measure_sensitivity(*model, read, watch=show_progress)
