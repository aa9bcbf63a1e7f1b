"""From a model and two sets of texts to an unlearned model: for who knows nothing of layers.

Every choice is a sentence, told as it is made and kept in `auto.json`. The same command again goes
on where it was stopped: runs are named by what makes them, the search is a journal, attacks are
kept in the cache.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from srmu.engine.files import require_free, write_json
from srmu.engine.loading import read_config
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.evals.analyses import open_model
from srmu.evals.layer_sweep import candidate_layers
from srmu.evals.score import tasks_beside
from srmu.evals.separability import DOCUMENTS, measure_entanglement
from srmu.methods import Misdirection
from srmu.report.build import write_report
from srmu.runs import run as runs
from srmu.runs.config import Config, find_method, make_config
from srmu.runs.estimate import estimate_run, format_duration, format_gb
from srmu.runs.record import extend_record
from srmu.runs.run import Run
from srmu.search import explain as reasons
from srmu.search import robust
from srmu.search.objective import (
    HALVES,
    TESTBED,
    TextYardstick,
    Yardstick,
    halve_tasks,
    hold_out,
    of_tasks,
)
from srmu.search.strength import (
    LAYERS,
    MARGIN,
    Bench,
    best_entry,
    scan_layers,
    try_all,
    try_config,
    with_values,
)

FILE = "auto.json"
MODEL = "model"  # the exported checkpoint
PAGE = "report.html"
PASSES = 40  # over the questions that the smoke attacks come to, of each model
ROBUST_PASSES = 8  # times as many: the standard ones
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
    """What was asked, read and checked."""

    asked: AutoRequest
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
            "model": weights.fingerprint_model(runs.base_of(self.config)),
            "texts": digest_texts([*self.texts["forget"], "", *self.texts["retain"]]),
            "questions": self.yardstick.digest,
            "method": robust.METHOD if self.asked.robust else self.asked.method,
            "names": digest_texts(self.names),
            "goals": digest_texts(self.goals),
            "seed": self.asked.seed,
        }

    @property
    def question(self) -> dict[str, Any]:
        """All that the answer depends on."""
        return self.spec | {"budget": self.asked.budget, "trials": self.asked.trials}


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


def prepare_job(asked: AutoRequest) -> AutoJob:
    """Read and check all that was named; nothing is written. SrmuError for what cannot work."""
    if asked.trials < 1:
        raise SrmuError(f"--trials {asked.trials}: expected 1 or more")
    if not (asked.out / FILE).exists():
        require_free(asked.out)
    method = find_method(robust.METHOD if asked.robust else asked.method)
    for option in ("names", "goals"):
        if getattr(asked, option) and not asked.robust:
            raise SrmuError(f"--{option} has no effect without --robust")
    if not (issubclass(method, Misdirection) or asked.robust):
        raise SrmuError(
            f"--method {asked.method} has no layer to find: choose srmu, rmu, adaptive_rmu or rna, "
            "or search its options with srmu sweep"
        )
    if asked.tasks_dir and not Path(asked.tasks_dir).is_dir():
        raise SrmuError(f"--tasks-dir {asked.tasks_dir}: no such folder")
    base = weights.locate_model(asked.model)
    if issubclass(method, Misdirection):
        candidate_layers(method(), read_config(base))  # are there layers enough?
    texts = {
        role: read_texts([Source(path=path) for path in getattr(asked, role)], Path())
        for role in ("forget", "retain")
    }
    if set(texts["forget"]) == set(texts["retain"]):
        raise SrmuError(
            "--forget and --retain hold the same texts; retain must name what the model should keep"
        )
    swapped: list[str] = []
    if asked.robust:
        swapped = read_names(asked.names) if asked.names else find_names(*texts.values())
    goals = read_names(asked.goals, "goals") if asked.goals else []
    testbed = (base.parent / "organism.json").exists()
    tasks: tuple[str, ...] = asked.tasks or (TESTBED[0] if testbed else ())
    utility = asked.utility or (TESTBED[1] if testbed and not asked.tasks else ())
    folder = Path(asked.tasks_dir) if asked.tasks_dir else tasks_beside(base)
    config = config_of(asked)

    def asks(names: tuple[str, ...]) -> Sources:
        return Sources(names, halve_tasks(names, folder), utility, str(folder or ""))

    held = {}
    for role, names in (("forget", tasks), ("retain", utility)):
        if not names:
            texts[role], halves = hold_out(role, texts[role])
            held[role] = TextYardstick(halves, config.topics["topic"].max_length)
    yardstick = Yardstick(
        {",".join(tasks): of_tasks(asks(tasks), config, asked.seed)}
        if tasks
        else {"forget_texts": held["forget"]},
        {name: of_tasks(asks((name,)), config, asked.seed) for name in utility}
        or {"retain_texts": held["retain"]},
        asked.seed,
        asked.device,
    )
    sources = asks(tasks) if tasks else None
    return AutoJob(asked, config_of(asked, held), yardstick, sources, texts, swapped, goals)


def tier_of(asked: AutoRequest) -> Tier:
    """What a search attacks its result with: where relearning is the point, that too."""
    return "standard" if asked.robust else "smoke"


def config_of(asked: AutoRequest, held: Mapping[str, TextYardstick] = {}) -> Config:
    """The config of a run with nothing chosen, which leaves out what it is measured on."""
    given = [f"seed={asked.seed}", f"device={asked.device}", f"runs_dir={asked.out / 'runs'}"]
    given += [f"topics.topic.{role}_held_out={len(part.words)}" for role, part in held.items()]
    for option in ("names", "goals"):
        if path := getattr(asked, option):
            given.append(f"method.{option}={Path(path).resolve()}")
    method = robust.METHOD if asked.robust else asked.method
    return make_config(asked.model, asked.forget, asked.retain, method, given)


def plan_search(job: AutoJob) -> dict[str, Any]:
    """The steps, how many runs they make, how long they take and the memory; nothing is done."""
    asked, yardstick = job.asked, job.yardstick
    config, summary = runs.plan_run(job.config)
    base = runs.base_of(config)
    tokenizer = runs.load_tokenizer(base)
    topics = runs.load_topics(config, tokenizer)
    if asked.robust:
        config = with_values(config, robust.start_values(config, 1.0))
    cost = estimate_run(config, base, topics)
    speed = cost["matmul_flops_a_second"]
    size = sum(prod(entry["shape"]) for entry in weights.stored_entries(base).values())

    def passes(tokens: float) -> float:
        return 2 * size * tokens / speed

    rows = [
        b["input_ids"] for topic in topics for part in (topic.forget, topic.retain) for b in part
    ]
    documents = min(1.0, 2 * DOCUMENTS / sum(map(len, rows)))
    asked_once = passes(yardstick.tokens(tokenizer))
    run = cost["seconds"] + asked_once
    shared = passes(documents * sum(r.numel() for r in rows))
    steps = [("entanglement", "what forget and retain texts share", shared)]
    if asked.robust:
        runs_made = min(asked.trials, len(robust.KEEPING))
        steps.append(
            ("search", f"{runs_made} runs, at other weights of what is kept", runs_made * run)
        )
    else:
        count = len(candidate_layers(config.method, read_config(base), LAYERS))
        runs_made = count + asked.trials + 1
        steps += [
            ("layers", f"{count} runs of {summary['steps']} steps, one a layer", count * run),
            (
                "search",
                f"{asked.trials} more, at other strengths, and the defaults",
                (asked.trials + 1) * run,
            ),
        ]
    steps.append(("final", "the best run on the other half of the questions", 4 * asked_once))
    if job.sources:
        tier = tier_of(asked)
        times = 2 * PASSES * (ROBUST_PASSES if asked.robust else 1)
        steps.append(("attacks", f"{tier} attacks on it and on the original", times * asked_once))
    steps.append(("export", f"the whole model, {format_gb(summary['checkpoint_bytes'])}", 0.0))
    return {
        "steps": [dict(zip(("step", "what", "seconds"), step, strict=True)) for step in steps],
        "runs": runs_made,
        "seconds": sum(step[2] for step in steps),
        "memory_private": cost["memory_private"],
        "memory_free": cost["memory_free"],
        "advice": cost["advice"],
        "out": str(asked.out),
    }


def round_duration(seconds: float) -> str:
    return format_duration(max(1, round(seconds)))


def explain_search(found: Mapping[str, Any]) -> list[str]:
    """A plan in lines for a person."""
    lines = [
        f"{number}. {step['step']:13} {step['what']:58} about {round_duration(step['seconds'])}"
        for number, step in enumerate(found["steps"], 1)
    ]
    lines.append(
        f"{found['runs']} runs, about {round_duration(found['seconds'])} in all; "
        f"{format_gb(found['memory_private'])} of memory, "
        f"{format_gb(found['memory_free'])} are free"
    )
    if found["advice"]:
        lines.append(f"this does not fit into memory; try {found['advice']}")
    return lines


def run_search(
    job: AutoJob, tell: Tell = lambda step, sentence: None, watch: Watch = ignore_progress
) -> dict[str, Any]:
    """All of it: check, scan, search, final measure, attacks, export; the content of `auto.json`.

    SrmuError where nothing within the budget forgets; `auto.json` then says what was found.
    """
    asked, yardstick = job.asked, job.yardstick
    out, limit = asked.out, MARGIN * asked.budget
    claim_folder(job)
    answer: dict[str, Any] = {
        "kind": "auto", "budget": asked.budget, "yardstick": yardstick.kind,
        "question": job.question, "choices": [], "run": None, "final": None,
    }  # fmt: skip

    def say(step: str, *said: str) -> None:
        for sentence in said:
            answer["choices"].append({"step": step, "sentence": sentence})
            tell(step, sentence)
        write_json(out / FILE, answer)

    bench = Bench(job.config, yardstick, out, limit, asked.seed, job.spec)
    say("measure", *reasons.explain_yardstick(yardstick))
    say("entanglement", *reasons.explain_entanglement(check_entanglement(job, watch)))
    if asked.robust:
        say("names", reasons.explain_names(len(job.names), asked.names))
        answer["trials"] = trials = robust.try_each(bench, asked.trials, watch)
        answer["defaults"] = usual = trials[0]
    else:
        answer["defaults"] = usual = try_config(bench, job.config)
        config, answer["scan"] = scan_layers(bench, watch)
        say("layers", reasons.explain_layer(answer["scan"]))
        answer["trials"] = trials = try_all(bench, config, asked.trials, watch)
    # where none keeps the margin, the whole budget is better than nothing
    chosen = best_entry([usual, *trials], limit) or best_entry([usual, *trials], asked.budget)
    if chosen is None:
        say("search", reasons.explain_none(asked.budget, trials))
        raise SrmuError(
            f"{answer['choices'][-1]['sentence']} Nothing is exported; allow more (--budget), give "
            "retain texts closer to what suffers, or search longer (--trials): the same folder "
            "goes on from what is there"
        )
    say("search", reasons.explain_trial(asked.budget, chosen, [usual, *trials]))
    run = Run.open(out / chosen["runs"][0])
    final: dict[str, Any] = {half: yardstick.estimates(run, half) for half in HALVES}
    final["defaults"] = yardstick.estimates(Run.open(out / usual["runs"][0]), "test")
    answer |= {"run": chosen["runs"][0], "final": final}
    why = [c["sentence"] for c in answer["choices"] if c["step"] in ("layers", "search")]
    extend_record(run.folder, [], purpose=run.record["purpose"] | {"choice": " ".join(why)})
    say("final", *reasons.explain_result(asked.budget, final, chosen is usual))
    if job.sources is None:
        say("attacks", "None was run: they ask questions, and --tasks names none.")
    else:
        found = attack_run(
            run, tier=tier_of(asked), sources=job.sources, seed=asked.seed, device=asked.device,
            watch=watch,
        )  # fmt: skip
        final["K*"] = found["K*"]
        if asked.robust:
            final["floor"] = robust.measure_floor(run, job.sources, found, [*job.names, *job.goals])
            say("attacks", *robust.describe_robust_answer(found, final["floor"]))
        else:
            lines = describe_attacks(found)
            say("attacks", *(f"{line[0].upper()}{line[1:]}." for line in (lines[1], lines[-1])))
    if not (out / MODEL).exists():
        run.export(out / MODEL, watch=watch)
    final["model"] = MODEL
    say("export", "The whole model is written as an ordinary checkpoint.")
    write_report([out], out / PAGE)
    return answer


def find_answer(job: AutoJob) -> dict[str, Any] | None:
    """The answer to the same question, where it is there already."""
    path = job.asked.out / FILE
    answer = json.loads(path.read_text()) if path.exists() else {}
    there = answer.get("question") == job.question and (answer["final"] or {}).get("model")
    whole = all((path.parent / name).exists() for name in (MODEL, PAGE))
    return answer if there and whole else None


def claim_folder(job: AutoJob) -> None:
    """Make the folder, or go on in that of an earlier search."""
    out = job.asked.out
    if not (out / FILE).exists():
        out.mkdir(parents=True, exist_ok=True)
    elif json.loads((out / FILE).read_text())["question"] != job.question:
        shutil.rmtree(out / MODEL, ignore_errors=True)  # it answers another question


def check_entanglement(job: AutoJob, watch: Watch) -> dict[str, Any]:
    """The numbers of `srmu entanglement`, with the model and the questions to choose on."""
    opened, tokenizer = open_model(job.asked.model, job.asked.device)
    asks = [
        (question.prompt, question.answer, question.entry)
        for part in job.yardstick.forget.values()
        if not isinstance(part, TextYardstick)
        for question in part.halves["val"]
    ]
    texts = job.texts["forget"], job.texts["retain"]
    return measure_entanglement(*texts, asks, (opened.module, tokenizer), watch=watch).numbers
