"""The verbs that measure a model, a run or texts, and change nothing."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from srmu.cli import options, output
from srmu.data.overlap import Definition
from srmu.engine.progress import show_progress
from srmu.errors import SrmuError

verbs = typer.Typer()
GROUP = "Measure"

TEXTS = "texts"  # the target that is neither a model nor a run
SUBJECTS = dict.fromkeys(["entanglement", "names", "tokens"], "the word texts") | dict.fromkeys(
    ["alignment", "layers"], "a run"
)
Subject = Annotated[
    Literal["reach", "confidence", "sensitivity", "alignment", "layers", "entanglement", "names", "tokens"] | None,
    Option(
        metavar="WHAT",
        help="Of a model or a run: reach (default), confidence, sensitivity; of a run: alignment, "
        "layers; of texts: entanglement (default), names, tokens (default with --model and no target).",
    ),
]
FIRST, TOKENS = 2, 20  # rows, and first and last tokens of each, that are shown


@verbs.command("eval", rich_help_panel=GROUP)
def eval_command(
    target: Annotated[str, Argument(metavar="MODEL_OR_RUN", help="Folder or hub id.")],
    tasks: Annotated[str, Option(help="Tasks of lm-eval or your own, or tofu, muse, rwku, whp, wmdp: a,b.")] = "",
    tasks_dir: options.TasksDir = None,
    limit: Annotated[int | None, Option(help="Ask only the first N questions.")] = None,
    data: Annotated[str, Option(help="Folder with a benchmark's data; default: the hub.")] = "",
    oracle: options.Oracle = "",
    template: Annotated[str, Option(help="How a benchmark puts its question: a text with {question} in it.")] = "",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure a model, or a run before and after, on tasks and benchmarks."""
    from srmu.evals.benchmarks import BENCHMARKS, find_benchmark
    from srmu.evals.results import RESULTS
    from srmu.evals.score import benchmark_table, score_benchmark, score_model, score_table
    from srmu.report.format import print_table
    from srmu.runs.effect import explain_repetition
    from srmu.runs.run import Run

    names = output.split_names(tasks)
    asked = [name for name in names if name.partition("/")[0] in BENCHMARKS]
    if not asked and (data or oracle or template):
        raise SrmuError(f"--data, --oracle and --template go with a benchmark: --tasks {', '.join(BENCHMARKS)}")
    results = Path(target) / RESULTS
    before = output.read_stamp(results)
    scores: dict[str, dict[str, Any]] = {}  # before, after, oracle -> metric -> value, n, ...
    others = tuple(name for name in names if name not in asked)
    if others or not asked:
        scores = score_model(target, others, tasks_dir=tasks_dir, limit=limit, device=device, watch=show_progress)
    for name in asked:
        told: dict[str, Any] = {"data": data, "oracle": oracle, "template": template, "limit": limit}
        measured = score_benchmark(target, name, **told, device=device, watch=show_progress)
        if not as_json:
            print_table(benchmark_table(find_benchmark(name)[0], measured))
        scores = {when: scores.get(when, {}) | one for when, one in (scores | measured).items()}
    lines = [output.next_for_model(target)]
    if "before" in scores:
        run = output.shorten_path(Path(target))
        following = output.next_command("report", run) if asked else output.next_for_run(Run.open(target))
        wrote = [f"wrote the scores into {run}"] if output.read_stamp(results) > before else []
        said = ["± is one standard error; srmu report gives 95 % intervals", *explain_repetition(scores)]
        lines = [*said, *wrote, following]
    answer = scores if asked or "before" in scores else scores["after"]
    output.print_result(answer, as_json, *lines, table=score_table(scores))


@verbs.command("ask", rich_help_panel=GROUP)
def ask_command(
    target: Annotated[str, Argument(metavar="RUN_OR_MODEL", help="Folder or hub id.")],
    prompts: Annotated[
        list[str], Argument(metavar="PROMPT", help="Words for the model to continue, each prompt in quotes.")
    ],
    chat: Annotated[bool, Option("--chat", help="Ask as a user would, through the model's chat template.")] = False,
    tokens: Annotated[int, Option(min=1, metavar="N", help="The most tokens to write.")] = 48,
    device: options.Device = "auto",
    out: Annotated[
        Path | None, Option(help="Write prompts and answers to this JSON file; otherwise nothing is written.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show what a model writes after a prompt; for a run, before and after, side by side."""
    from srmu.engine.files import format_json, require_free, write_output
    from srmu.evals.continuations import ask_model
    from srmu.evals.score import title_models
    from srmu.report.format import escape_controls, print_table
    from srmu.runs.run import find_run

    if out:
        require_free(out)
    answers = ask_model(target, prompts, tokens, chat=chat, device=device, watch=show_progress)
    for one in [] if as_json else answers:
        typer.echo(escape_controls(one["prompt"]))
        print_table(
            [{title: escape_controls(text.strip(" ")) or "(nothing)" for title, text in title_models(one).items()}]
        )
    result = {"target": target, "chat": chat, "tokens": tokens, "answers": answers}
    if out:
        write_output(out, format_json(result))
    wrote, run = [f"wrote {out}"] if out else [], find_run(target)
    following = output.next_for_run(run) if run else output.next_for_model(target)
    output.print_result(result, as_json, *wrote, following)


@verbs.command("attack", rich_help_panel=GROUP)
def attack_command(
    run: Annotated[Path, Argument(help="A run's folder.")],
    tier: options.Tier = "smoke",
    attacks: Annotated[
        str, Option(help="Run only these: names, or numbers such as E4,E7, that `srmu info attacks` lists.")
    ] = "",
    tasks: Annotated[str, Option(help="Tasks on what is to be forgotten: a,b.")] = "",
    val: Annotated[str, Option(help="Tasks to choose an attack's settings on; split: half of --tasks.")] = "",
    utility: options.Utility = "",
    tasks_dir: options.TasksDir = None,
    neutral: Annotated[str, Option(help="File with texts unrelated to the forget texts.")] = "",
    holdout: Annotated[str, Option(help="File with texts like the forget texts that the model never saw.")] = "",
    oracle: options.Oracle = "",
    unknown: Annotated[str, Option(help="Without an oracle: tasks on facts that the model never knew, a,b.")] = "",
    limit: Annotated[int, Option(help="The most questions of each task and half.")] = 400,
    trials: Annotated[int | None, Option(min=1, metavar="N", help="tuned_relearning: trainings to try.")] = None,
    steps: Annotated[int | None, Option(min=1, metavar="N", help="tuned_relearning: most steps of each.")] = None,
    seed: int = 0,
    device: options.Device = "auto",
    yes: Annotated[bool, Option("--yes", help="Start attacks that take hours without asking.")] = False,
    as_json: options.Json = False,
) -> None:
    """Attack a run: see what brings the knowledge back, compared with the original model."""
    from srmu.attacks import suite
    from srmu.attacks.summary import describe_attacks
    from srmu.evals.results import RESULTS
    from srmu.report.attacks import attack_table
    from srmu.runs.run import Run

    asked, kept, names = (output.split_names(text) for text in (tasks, utility, attacks))
    never = output.split_names(unknown)
    sources = suite.Sources(asked, val, kept, str(tasks_dir or ""), neutral, holdout, oracle, never, limit)
    search = {key: value for key, value in {"trials": trials, "steps": steps}.items() if value is not None}
    confirm = partial(output.confirm_work, yes=yes)
    how: dict[str, Any] = {"search": search, "seed": seed, "device": device, "confirm": confirm, "watch": show_progress}
    before = output.read_stamp(run / RESULTS)
    report = suite.attack_run(Run.open(run), tier=tier, names=names, sources=sources, **how)
    folder = output.shorten_path(run)
    lines = [f"wrote {folder / RESULTS}"] if output.read_stamp(run / RESULTS) > before else []
    lines.append(output.next_command("compare", folder, "OTHER_RUN"))
    output.print_result(report, as_json, *describe_attacks(report), *lines, table=attack_table(report))


@verbs.command("compare", rich_help_panel=GROUP)
def compare_command(
    runs: Annotated[
        list[Path],
        Argument(help="Folders of runs; the others are compared with the first. Or files of open-unlearning."),
    ],
    budget: options.Budget = "5%",
    metrics: options.Metrics = "",
    utility_metrics: options.UtilityMetrics = "",
    as_json: options.Json = False,
) -> None:
    """Compare methods at the same loss of utility, and say which differences are noise."""
    from srmu.evals.compare import compare_reports, read_reports, suggest_attack
    from srmu.evals.peers import find_peers
    from srmu.report.format import describe_copies, drop_empty, format_comparison

    folders, peers = find_peers(runs)
    if peers:
        if metrics or utility_metrics:
            raise SrmuError("--metrics, --utility-metrics: leave them out; files of open-unlearning have their own")
        compare_suites(runs, folders, peers, as_json)
        return
    share, named = output.parse_share(budget), (output.split_names(metrics), output.split_names(utility_metrics))
    read = read_reports(runs)
    rows = compare_reports(read, share, *named)
    lines = [f"In %, with 95 % intervals, at {share:.1%} of utility lost; runs: strengths x seeds."]
    lines += describe_copies(len(runs) - len(read))
    tried = {frozenset(attacks["attacks"]) for _, attacks in read if attacks}
    if not any(row.residual for row in rows):
        lines.append("no attack was run on all of these: accuracy alone says little")
    elif len(tried) > 1:
        lines.append("not all were attacked with the same attacks: their K* cannot be compared")
    folder, more = suggest_attack(read, *named)
    lines.append(f"next: {output.quote_command('attack', output.shorten_path(folder), **more)}")
    answer: dict[str, Any] = {"budget": share, "rows": [asdict(row) for row in rows]}
    output.print_result(answer, as_json, *lines, table=drop_empty([*map(format_comparison, answer["rows"])]))


def compare_suites(paths: list[Path], folders: list[Path], peers: list[Any], as_json: bool) -> None:
    """Print the tables of benchmarks in which the runs in `folders` stand beside models that others measured."""
    from srmu.report.benchmarks import tabulate_suites
    from srmu.report.build import group_runs
    from srmu.report.format import drop_empty, format_value, plain_row, print_table
    from srmu.runs.run import Run

    suites = tabulate_suites(group_runs([Run.open(folder) for folder in folders]), peers)
    for name, rows in {} if as_json else suites.items():
        typer.echo(name)
        print_table([{head: format_value(one, "") for head, one in row.items()} for row in drop_empty(rows)])
    note = "In brackets: one standard error to each side. Utility is not the same for all: read it beside the rest."
    output.print_result(
        {"suites": {name: [*map(plain_row, rows)] for name, rows in suites.items()}},
        as_json,
        note,
        output.next_command("report", *paths),
    )


@verbs.command("inspect", rich_help_panel=GROUP)
def inspect_command(
    target: Annotated[
        str, Argument(metavar="MODEL|RUN|texts", help="A model, a run, or the word texts (with --forget).")
    ] = "",
    settings: Annotated[
        list[str] | None, Argument(metavar="key=value", help="reach: options of the method, such as method.layer=3.")
    ] = None,
    what: Subject = None,
    method: Annotated[str, Option(help="reach: the method; default: srmu.")] = "",
    forget: options.Forget = None,
    retain: options.Retain = None,
    model: Annotated[
        str, Option(help="entanglement: also compare this model's activations; tokens: whose tokenizer.")
    ] = "",
    tasks: Annotated[str, Option(help="entanglement: look for these tasks' questions in the texts.")] = "",
    tasks_dir: options.TasksDir = None,
    definition: Annotated[
        Definition, Option(metavar="KIND", help="entanglement: pair_containment, pair_multiset or corpus_jaccard.")
    ] = "pair_containment",
    metrics: options.Metrics = "",
    device: options.Device = "auto",
    out: Annotated[Path | None, Option(help="Where to write the page; names: a .txt file.")] = None,
    as_json: options.Json = False,
) -> None:
    """Look inside a model, a run or texts: what a method would change, how entangled the texts are."""
    if not target:
        if not forget and not retain:
            raise SrmuError("name a model or a run, or texts: --forget FILE")
        target, what = TEXTS, what or ("tokens" if model and not tasks else None)
    what = what or ("entanglement" if target == TEXTS else "reach")
    wanted = SUBJECTS.get(what, "a model or a run")
    if (wanted == "the word texts") != (target == TEXTS):
        raise SrmuError(f"inspect {target} --what {what}: {what} is for {wanted}; name that instead")
    if what == "reach":
        print_reach(target, method, settings or [], as_json)
        return
    from srmu.data.sources import Source, read_texts
    from srmu.report.studies import write_analysis

    named = {"forget": forget or [], "retain": retain or []}
    texts = {role: read_texts([Source(path=path) for path in paths]) for role, paths in named.items()}
    for role in {"entanglement": ("forget", "retain"), "names": ("forget",)}.get(what, ()):
        if not texts[role]:
            raise SrmuError(f"--{role}: name a file of texts")
    if what == "names":
        show_names(texts, out, as_json)
        return
    if what == "tokens":
        list_tokens(texts, model, as_json)
        return
    if what == "entanglement":
        found = compare_texts(texts, tasks, tasks_dir, model, definition, device)
    else:
        found = measure_activations(what, target, texts, metrics, device)
    page = write_analysis(found, out or Path(f"{what}.html"))
    answer = {"numbers": found.numbers, "sentences": found.sentences, "page": str(page)}
    output.print_result(answer, as_json, *found.sentences, f"wrote {page}", output.open_in_browser(page))


def print_reach(target: str, method: str, settings: list[str], as_json: bool) -> None:
    """What a method would load and change in a model; what a run has changed."""
    from srmu.runs.reach import inspect_reach
    from srmu.runs.run import find_run, list_changes

    if run := find_run(target):
        if method or settings:
            raise SrmuError(f"{target} is a run, which has its method: leave out --method")
        answer, rows = list_changes(run)
        following = output.next_command("inspect", target, "--what", "sensitivity")
    else:
        answer, rows = inspect_reach(target, method or "srmu", settings)
        chosen = ["--method", method] if method else []
        following = output.next_for_model(target, *chosen, *settings)
    output.print_result(answer, as_json, answer["sentence"], following, table=rows)


def show_names(texts: dict[str, list[str]], out: Path | None, as_json: bool) -> None:
    """List what look like names in forget texts, for a review: rename_scrub swaps them."""
    from srmu.data.names import find_names
    from srmu.engine.files import require_free, write_output

    if out and out.suffix != ".txt":
        raise SrmuError(f"--out {out}: expected a .txt file")
    if out:
        require_free(out)
    names = find_names(texts["forget"], texts["retain"])
    counts = {name: sum(name in text for text in texts["forget"]) for name in names}
    lines = [f"{len(names)} look like names: strike those that are none, add what is missing"]
    if out is None:
        lines.append("next: the same with --out names.txt, and edit that file")
    else:
        write_output(out, "".join(f"{name}\n" for name in names))
        method = ("method.name=rename_scrub", f"method.names={out}")
        lines += [f"wrote {out}", output.next_command("unlearn", "CONFIG", *method)]
    table = [{"name": name, "texts": str(count)} for name, count in counts.items()]
    output.print_result({"names": counts}, as_json, *lines, table=table)


def list_tokens(texts: dict[str, list[str]], model: str, as_json: bool) -> None:
    """Tokens of the first rows as a model reads them, those that losses count in brackets."""
    from srmu.data.tokens import encode_texts
    from srmu.data.topics import TopicConfig, describe_taken
    from srmu.engine.weights import locate_model
    from srmu.runs.plan import load_tokenizer

    if not model:
        raise SrmuError("--model: name the one whose tokens are to be shown")
    tokenizer = load_tokenizer(locate_model(model))
    length = TopicConfig.model_fields["max_length"].default
    answer, lines = [], []
    for role, rows in texts.items():
        for number, row in enumerate(rows[:FIRST], 1):
            how = f" ({taken})" if (taken := describe_taken(row, tokenizer)) else ""
            ids, counted = next(iter(encode_texts([row], tokenizer, length)), ([], []))
            told = f"{len(ids)} tokens, of which losses count {sum(counted)}"
            lines.append(f"{role}, row {number}{how}: {told if ids else 'left out, as nothing of it counts'}")
            marked = [f"[{token}]" if counts else str(token) for token, counts in zip(ids, counted, strict=True)]
            cut = ["...", *marked[-TOKENS:]] if len(ids) > 2 * TOKENS else marked[TOKENS:]
            lines.append("  " + " ".join([*marked[:TOKENS], *cut]))
            answer.append({"role": role, "row": number, "taken": taken, "ids": ids, "counted": counted})
    lines.append(output.next_for_model(model))
    output.print_result({"rows": answer}, as_json, *lines)


def compare_texts(
    texts: dict[str, list[str]], tasks: str, tasks_dir: Path | None, model: str, definition: Definition, device: str
) -> Any:
    """How entangled two sets of texts are, and what to do about it."""
    from srmu.evals.analyses import open_model
    from srmu.evals.lm_eval import load_questions
    from srmu.evals.score import tasks_beside
    from srmu.evals.separability import measure_entanglement
    from srmu.runs.run import open_target

    if model and tasks and tasks_dir is None:
        tasks_dir = tasks_beside(open_target(model, device).base)
    questions = [question for task in output.split_names(tasks) for question in load_questions(task, tasks_dir)]
    opened = open_model(model, device) if model else None
    inside = (opened[0].module, opened[1]) if opened else None
    forget, retain = texts["forget"], texts["retain"]
    return measure_entanglement(forget, retain, questions, inside, definition=definition, watch=show_progress)


def measure_activations(what: str, target: str, texts: dict[str, list[str]], metrics: str, device: str) -> Any:
    """One of the analyses of arXiv 2408.06223, of a model or a run."""
    from srmu.evals import analyses
    from srmu.runs.plan import read_topic_texts
    from srmu.runs.run import find_run

    run = find_run(target)
    if SUBJECTS.get(what) == "a run" and run is None:
        raise SrmuError(f"{what} needs a run, which {target} is not: srmu unlearn makes one")
    if run and what == "alignment":
        return analyses.measure_alignment(run, *analyses.open_model(target, device), watch=show_progress)
    if run and what == "layers":
        if not metrics:
            raise SrmuError("--metrics: name those that should fall, such as wmdp_bio/acc")
        return analyses.sweep_layers(run.config, output.split_names(metrics), watch=show_progress)
    if run and not any(texts.values()):
        texts = read_topic_texts(run.config)
    read = {role: rows for role, rows in texts.items() if rows}
    if not read:
        raise SrmuError(f"name texts to read {target} on: --forget F, --retain R, or both")
    measure = analyses.measure_confidence if what == "confidence" else analyses.measure_sensitivity
    return measure(*analyses.open_model(target, device), read, watch=show_progress)
