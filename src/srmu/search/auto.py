"""From a model and two sets of texts to an unlearned model, without knowing what a layer is.

Each choice is explained in a sentence, which is told at once and kept in `auto.json`. The same
command again goes on where it was stopped: runs are named by what decides them, a study keeps the
trials, the cache keeps the attacks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from srmu.attacks.base import Tier
from srmu.attacks.suite import Sources, attack_run
from srmu.attacks.summary import describe_attacks
from srmu.data.digest import digest_texts
from srmu.data.names import find_names, read_names
from srmu.data.sources import Source, read_texts
from srmu.engine import weights
from srmu.engine.files import read_json, require_free, write_json
from srmu.engine.loading import read_config
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.evals.analyses import open_model
from srmu.evals.layer_sweep import candidate_layers
from srmu.evals.score import tasks_beside
from srmu.evals.separability import DOCUMENTS, measure_entanglement
from srmu.methods import Misdirection
from srmu.report.build import write_report
from srmu.runs import plan as runs
from srmu.runs.config import Config, find_method, make_config
from srmu.runs.dry_run import format_duration, format_gb
from srmu.runs.estimate import estimate_run
from srmu.runs.record import extend_record
from srmu.runs.run import Run
from srmu.search import explain, robust
from srmu.search.objective import (
    HALVES,
    LAYERS,
    MARGIN,
    TESTBED,
    Bench,
    TextYardstick,
    Yardstick,
    best_entry,
    halve_tasks,
    hold_out,
    of_tasks,
    scan_layers,
    search_configs,
    try_config,
)
from srmu.search.queue import require_no_journal
from srmu.search.space import with_values

FILE = "auto.json"
MODEL = "model"  # the exported checkpoint
PAGE = "report.html"
PASSES: dict[Tier, int] = {"smoke": 40, "standard": 320}  # of a model over the questions, attacked
Tell = Callable[[str, str], None]


@dataclass(frozen=True)
class AutoRequest:
    """What somebody wants: all that decides the answer, and where it goes."""

    model: str
    forget: tuple[str, ...]
    retain: tuple[str, ...]
    budget: float = 0.01  # the most utility to lose
    tasks: tuple[str, ...] = ()  # ask for what is to be forgotten
    utility: tuple[str, ...] = ()  # ask for what is to be kept
    tasks_dir: str = ""
    method: str = "srmu"
    robust: bool = False  # rename_scrub in place of a method with a layer
    names: str = ""  # a file of the names to swap; "": those found
    goals: str = ""  # a file of phrases about which all is to be forgotten
    trials: int = 24
    out: Path = Path("auto")
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class AutoJob:
    """A request whose files are read and whose options are checked."""

    request: AutoRequest
    config: Config
    yardstick: Yardstick
    sources: Sources | None  # for attacks; None: there are no questions
    texts: Mapping[str, Sequence[str]]  # to train on: "forget" and "retain"
    names: Sequence[str] = ()  # that robust swaps
    goals: Sequence[str] = ()

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What all trials depend on, without a path or a word of a text."""
        return {
            "model": weights.fingerprint_model(runs.locate_base(self.config)),
            "texts": digest_texts([*self.texts["forget"], "", *self.texts["retain"]]),
            "questions": self.yardstick.digest,
            "method": robust.METHOD if self.request.robust else self.request.method,
            "names": digest_texts(self.names),
            "goals": digest_texts(self.goals),
            "seed": self.request.seed,
        }

    @property
    def question(self) -> dict[str, Any]:
        """All that the answer depends on."""
        return self.spec | {"budget": self.request.budget, "trials": self.request.trials}


def parse_share(text: str) -> float:
    """`1%` or `0.01` as a number; SrmuError for what is no share above 0 and below 1."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise SrmuError(f"--budget {text}: expected a share of accuracy, such as 1% or 0.01")
    return value


def prepare_job(request: AutoRequest) -> AutoJob:
    """Read and check all that was named; nothing is written. SrmuError for what cannot work."""
    base = check_request(request)
    texts = {role: read_texts([Source(path=path) for path in getattr(request, role)]) for role in ("forget", "retain")}
    if set(texts["forget"]) == set(texts["retain"]):
        raise SrmuError("--forget and --retain hold the same texts; retain must name what the model should keep")
    names: list[str] = []
    if request.robust:
        names = read_names(request.names) if request.names else find_names(*texts.values())
    goals = read_names(request.goals, "goals") if request.goals else []
    testbed = (base.parent / "organism.json").exists()
    tasks: tuple[str, ...] = request.tasks or (TESTBED[0] if testbed else ())
    utility = request.utility or (TESTBED[1] if testbed and not request.tasks else ())
    folder = Path(request.tasks_dir) if request.tasks_dir else tasks_beside(base)
    config = config_of(request)

    def sources_of(names: tuple[str, ...]) -> Sources:
        return Sources(names, halve_tasks(names, folder), utility, str(folder or ""))

    held = {}
    for role, given in (("forget", tasks), ("retain", utility)):
        if not given:
            texts[role], halves = hold_out(role, texts[role])
            held[role] = TextYardstick(halves, config.topics["topic"].max_length)
    yardstick = Yardstick(
        {",".join(tasks): of_tasks(sources_of(tasks), config, request.seed)}
        if tasks
        else {"forget_texts": held["forget"]},
        {name: of_tasks(sources_of((name,)), config, request.seed) for name in utility}
        or {"retain_texts": held["retain"]},
        request.seed,
        request.device,
    )
    sources = sources_of(tasks) if tasks else None
    return AutoJob(request, config_of(request, held), yardstick, sources, texts, names, goals)


def check_request(request: AutoRequest) -> Path:
    """The model's folder; SrmuError for options that do not go together or name nothing."""
    if request.trials < 1:
        raise SrmuError(f"--trials {request.trials}: expected 1 or more")
    if not (request.out / FILE).exists():
        require_free(request.out)
    method = find_method(method_of(request))
    for option in ("names", "goals"):
        if getattr(request, option) and not request.robust:
            raise SrmuError(f"--{option} has no effect without --robust")
    if not (issubclass(method, Misdirection) or request.robust):
        raise SrmuError(
            f"--method {request.method} has no layer to find: choose srmu, rmu, adaptive_rmu or "
            "rna, or search its options with srmu sweep"
        )
    base = weights.locate_model(request.model)
    if issubclass(method, Misdirection):
        candidate_layers(method(), read_config(base))  # are there layers enough?
    return base


def method_of(request: AutoRequest) -> str:
    return robust.METHOD if request.robust else request.method


def tier_of(request: AutoRequest) -> Tier:
    """What a search attacks its result with: relearning, too, where that is the point."""
    return "standard" if request.robust else "smoke"


def config_of(request: AutoRequest, held: Mapping[str, TextYardstick] = {}) -> Config:
    """The config of a run with nothing chosen, which leaves out what it is measured on."""
    given = [f"seed={request.seed}", f"device={request.device}", f"runs_dir={request.out / 'runs'}"]
    given += [f"topics.topic.{role}_held_out={len(part.words)}" for role, part in held.items()]
    for option in ("names", "goals"):
        if path := getattr(request, option):
            given.append(f"method.{option}={Path(path).resolve()}")
    return make_config(request.model, request.forget, request.retain, method_of(request), given)


def plan_search(job: AutoJob) -> dict[str, Any]:
    """The steps, how many runs they make, how long they take and the memory; nothing is done."""
    request, yardstick = job.request, job.yardstick
    plan = runs.plan_run(job.config)
    config, base, summary = plan.config, plan.base, plan.summarise()
    tokenizer = runs.load_tokenizer(base)
    topics = runs.load_topics(config, tokenizer)
    if request.robust:
        config = with_values(config, robust.start_values(config, 1.0))
    cost = estimate_run(config, base, topics)
    size = sum(prod(entry["shape"]) for entry in weights.stored_entries(base).values())
    rows = [
        batch["input_ids"] for topic in topics for part in (topic.forget, topic.retain)
        for batch in part
    ]  # fmt: skip
    read = min(1.0, 2 * DOCUMENTS / sum(map(len, rows))) * sum(batch.numel() for batch in rows)
    token_seconds = 2 * size / cost["flops_a_second"]
    questions = yardstick.tokens(tokenizer) * token_seconds
    run = cost["seconds"] + questions
    steps = [("entanglement", "what forget and retain texts share", read * token_seconds)]
    if request.robust:
        count = min(request.trials, len(robust.KEEPING))
        steps.append(("search", f"{count} runs, at other weights of what is kept", count * run))
    else:
        assert isinstance(config.method, Misdirection)
        layers = len(candidate_layers(config.method, read_config(base), LAYERS))
        trials = request.trials
        count = layers + trials + 1
        steps += [
            ("layers", f"{layers} runs of {summary['steps']} steps, one a layer", layers * run),
            ("search", f"{trials} more, at other strengths, and the defaults", (trials + 1) * run),
        ]
    steps.append(("final", "the best run on the other half of the questions", 4 * questions))
    if job.sources:
        tier = tier_of(request)
        what = f"{tier} attacks on it and on the original"
        steps.append(("attacks", what, 2 * PASSES[tier] * questions))
    steps.append(("export", f"the whole model, {format_gb(summary['checkpoint_bytes'])}", 0.0))
    return {
        "steps": [dict(zip(("step", "what", "seconds"), step, strict=True)) for step in steps],
        "runs": count,
        "seconds": sum(step[2] for step in steps),
        "memory_private": cost["memory_private"],
        "memory_free": cost["memory_free"],
        "advice": cost["advice"],
        "out": str(request.out),
    }


def round_duration(seconds: float) -> str:
    return format_duration(max(1, round(seconds)))


def explain_search(plan: Mapping[str, Any]) -> list[str]:
    """A plan in lines for a person."""
    lines = [
        f"{number}. {step['step']:13} {step['what']:58} about {round_duration(step['seconds'])}"
        for number, step in enumerate(plan["steps"], 1)
    ]
    lines.append(
        f"{plan['runs']} runs, about {round_duration(plan['seconds'])} in all; "
        f"{format_gb(plan['memory_private'])} of memory, "
        f"{format_gb(plan['memory_free'])} are free"
    )
    if plan["advice"]:
        lines.append(f"this does not fit into memory; try {plan['advice']}")
    return lines


def run_search(
    job: AutoJob, tell: Tell = lambda step, sentence: None, watch: Watch = ignore_progress
) -> dict[str, Any]:
    """All of it: check, scan, search, final measure, attacks, export; the content of `auto.json`.

    SrmuError where nothing within the budget forgets; `auto.json` then says what was found.
    """
    request, yardstick = job.request, job.yardstick
    out, budget = request.out, request.budget
    claim_folder(job)
    answer: dict[str, Any] = {
        "kind": "auto", "budget": budget, "yardstick": yardstick.kind,
        "question": job.question, "choices": [], "run": None, "final": None,
    }  # fmt: skip

    def say(step: str, *sentences: str) -> None:
        for sentence in sentences:
            answer["choices"].append({"step": step, "sentence": sentence})
            tell(step, sentence)
        write_json(out / FILE, answer)

    say("measure", *explain.explain_yardstick(yardstick))
    say("entanglement", *explain.explain_entanglement(check_entanglement(job, watch)))
    run_trials(job, answer, say, watch)
    usual, tried = answer["defaults"], [answer["defaults"], *answer["trials"]]
    # where none keeps the margin, the whole budget is better than nothing
    chosen = best_entry(tried, MARGIN * budget) or best_entry(tried, budget)
    if chosen is None:
        say("search", explain.explain_none(budget, answer["trials"]))
        raise SrmuError(
            f"{answer['choices'][-1]['sentence']} Nothing is exported; allow more (--budget), give "
            "retain texts closer to what suffers, or search longer (--trials): the same folder "
            "goes on from what is there"
        )
    say("search", explain.explain_trial(budget, chosen, tried))
    run = Run.open(out / chosen["runs"][0])
    final: dict[str, Any] = {half: yardstick.estimates(run, half) for half in HALVES}
    final["defaults"] = yardstick.estimates(Run.open(out / usual["runs"][0]), "test")
    answer |= {"run": chosen["runs"][0], "final": final}
    why = [c["sentence"] for c in answer["choices"] if c["step"] in ("layers", "search")]
    extend_record(run.folder, [], purpose=run.record["purpose"] | {"choice": " ".join(why)})
    say("final", *explain.explain_result(budget, final, chosen is usual))
    say("attacks", *attack_choice(job, run, final, watch))
    if not (out / MODEL).exists():
        run.export(out / MODEL, watch=watch)
    final["model"] = MODEL
    say("export", "The whole model is written as an ordinary checkpoint.")
    write_report([out], out / PAGE)
    return answer


def run_trials(job: AutoJob, answer: dict[str, Any], say: Callable[..., None], watch: Watch) -> None:
    """The runs to choose from: `defaults`, `trials` and, of methods with a layer, `scan`."""
    request = job.request
    bench = Bench(job.config, job.yardstick, request.out, MARGIN * request.budget, job.spec)
    if request.robust:
        say("names", explain.explain_names(len(job.names), request.names))
        answer["trials"] = robust.search_weights(bench, request.trials, watch)
        answer["defaults"] = answer["trials"][0]
        return
    answer["defaults"] = try_config(bench, job.config)
    config, answer["scan"] = scan_layers(bench, watch)
    say("layers", explain.explain_layer(answer["scan"]))
    name = f"layer {answer['scan']['best']} within {bench.limit:g}"
    bench = replace(bench, config=config)
    answer["trials"] = search_configs(bench, name, [{}] * request.trials, watch)


def attack_choice(job: AutoJob, run: Run, final: dict[str, Any], watch: Watch) -> list[str]:
    """Attack the chosen run and add what they found to `final`; sentences about it."""
    if job.sources is None:
        return ["None was run: they ask questions, and --tasks names none."]
    request = job.request
    report = attack_run(
        run, tier=tier_of(request), sources=job.sources, seed=request.seed, device=request.device,
        watch=watch,
    )  # fmt: skip
    final["K*"] = report["K*"]
    if request.robust:
        final["floor"] = robust.measure_floor(run, job.sources, report, [*job.names, *job.goals])
        return robust.describe_robust_answer(report, final["floor"])
    lines = describe_attacks(report)
    return [f"{line[0].upper()}{line[1:]}." for line in (lines[1], lines[-1])]


def find_answer(job: AutoJob) -> dict[str, Any] | None:
    """The answer to the same question, where it is there already."""
    folder = job.request.out
    answer = read_json(folder / FILE, {})
    done = answer.get("question") == job.question and (answer["final"] or {}).get("model")
    return answer if done and all((folder / name).exists() for name in (MODEL, PAGE)) else None


def claim_folder(job: AutoJob) -> None:
    """Make the folder, or go on in that of an earlier search."""
    out = job.request.out
    require_no_journal(out)
    if not (out / FILE).exists():
        out.mkdir(parents=True, exist_ok=True)
    elif read_json(out / FILE)["question"] != job.question:
        shutil.rmtree(out / MODEL, ignore_errors=True)  # it answers another question


def check_entanglement(job: AutoJob, watch: Watch) -> dict[str, Any]:
    """The numbers of `srmu inspect texts`, with the model and the questions to choose on."""
    model, tokenizer = open_model(job.request.model, job.request.device)
    questions = [
        (question.prompt, question.answer, question.entry)
        for part in job.yardstick.forget.values()
        if not isinstance(part, TextYardstick)
        for question in part.halves["val"]
    ]
    texts = job.texts["forget"], job.texts["retain"]
    return measure_entanglement(*texts, questions, (model.module, tokenizer), watch=watch).numbers
