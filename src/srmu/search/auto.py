"""From a model and two sets of texts to an unlearned model, without knowing what a layer is.

Each choice is explained in a sentence, which is told at once and kept in `auto.json`. The same command again goes on
where it was stopped: runs are named by what decides them, a study keeps the trials, the cache keeps the attacks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from srmu.attacks.base import Tier
from srmu.attacks.suite import Sources, attack_run, load_exam
from srmu.attacks.summary import describe_attacks
from srmu.data.names import find_names, read_names
from srmu.data.sources import Source, read_texts
from srmu.engine import weights
from srmu.engine.files import format_gb, read_json, require_free, write_json
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.evals import separability
from srmu.evals.analyses import open_model
from srmu.evals.score import tasks_beside
from srmu.methods import Misdirection
from srmu.report.build import write_report
from srmu.report.format import read_estimate
from srmu.runs import plan as runs
from srmu.runs.config import find_method, make_config
from srmu.runs.estimate import count_parameters, estimate_run, format_duration
from srmu.runs.record import extend_record
from srmu.runs.run import Run
from srmu.search import objective, robust
from srmu.search.objective import AutoJob, AutoRequest, Entry, Part, TaskYardstick, TextYardstick, Yardstick
from srmu.search.space import start_strength, with_values

FILE = "auto.json"
MODEL = "model"  # the exported checkpoint
PAGE = "report.html"
TESTBED = ("testbed_hazard",), ("testbed_neighbour", "testbed_general")
PASSES: dict[Tier, int] = {"smoke": 18, "standard": 320}  # of a model over the questions, attacked
Tell = Callable[[str, str], None]
Answer = dict[str, Any]  # the content of `auto.json`


def prepare_job(request: AutoRequest) -> AutoJob:
    """Read and check all that was named; nothing is written. SrmuError for what cannot work."""
    if not (request.out / FILE).exists():
        require_free(request.out)
    base = weights.locate_model(request.model)
    method = robust.METHOD if request.robust else request.method
    if not request.robust and not issubclass(find_method(method), Misdirection):
        raise SrmuError(
            f"--method {method} has no layer to find: choose srmu, rmu, adaptive_rmu or rna, "
            "or search its options with srmu sweep"
        )
    texts = {role: read_texts([Source(path=path) for path in getattr(request, role)]) for role in ("forget", "retain")}
    testbed = make_config(request.model, request.forget).testbed
    tasks: tuple[str, ...] = request.tasks or (TESTBED[0] if testbed else ())
    utility = request.utility or (TESTBED[1] if testbed and not request.tasks else ())
    given = [f"seed={request.seed}", f"device={request.device}", f"runs_dir={request.out / 'runs'}"]
    lists: dict[str, list[str]] = {"names": [], "goals": []}
    for option in lists:
        if path := getattr(request, option):
            if not request.robust:
                raise SrmuError(f"--{option} has no effect without --robust")
            lists[option] = read_names(path, option)
            given.append(f"method.{option}={Path(path).resolve()}")
    if request.robust and not request.names:
        lists["names"] = find_names(*texts.values())
    held: dict[str, Part] = {}
    for role, named in (("forget", tasks), ("retain", utility)):
        if not named:  # runs leave out what they are measured on
            texts[role], halves = objective.hold_out(role, texts[role])
            held[role] = TextYardstick(halves)
            given.append(f"topics.topic.{role}_held_out={sum(map(len, halves.values()))}")
    config = make_config(request.model, request.forget, request.retain, method, given)
    folder = request.tasks_dir or tasks_beside(base)

    def ask(*names: str) -> Part:
        exam = load_exam(name_sources(names, (), folder), request.seed)
        return TaskYardstick({"val": exam.val, "test": exam.test})

    forget = {",".join(tasks): ask(*tasks)} if tasks else {"forget_texts": held["forget"]}
    keep = {name: ask(name) for name in utility} or {"retain_texts": held["retain"]}
    yardstick = Yardstick(forget, keep, request.seed, request.device)
    return AutoJob(request, config, yardstick, name_sources(tasks, utility, folder) if tasks else None, texts, **lists)


def name_sources(tasks: tuple[str, ...], utility: tuple[str, ...], folder: Path | None) -> Sources:
    """Tasks, with the half to choose on from TASK_val in the folder where each has one, else a split."""
    halves = [f"{task}_val" for task in tasks]
    there = folder and all(any(folder.rglob(f"{half}.yaml")) for half in halves)
    return Sources(tasks, ",".join(halves) if there else "split", utility, str(folder or ""))


def plan_search(job: AutoJob) -> dict[str, Any]:
    """The steps, how many runs they make, how long they take and the memory; nothing is done."""
    request, plan = job.request, runs.plan_run(job.config)
    if request.robust:
        plan = replace(plan, config=with_values(plan.config, robust.start_values(1.0)))
    tokenizer = runs.load_tokenizer(plan.base)
    topics = runs.load_topics(plan.config, tokenizer)
    cost = estimate_run(plan, topics)
    rows = [batch["input_ids"] for topic in topics for batch in (*topic.forget, *topic.retain)]
    read = min(1.0, 2 * separability.DOCUMENTS / sum(map(len, rows))) * sum(batch.numel() for batch in rows)
    token_seconds = 2 * count_parameters(plan.base) / cost["flops_a_second"]
    questions = job.yardstick.count_tokens(tokenizer) * token_seconds
    run = cost["seconds"] + questions
    steps = [("entanglement", "what forget and retain texts share", read * token_seconds)]
    if request.robust:
        count = min(request.trials, len(robust.KEEPING))
        steps.append(("search", f"{count} runs, at other weights of what is kept", count * run))
    else:
        layers, others = len(job.layers), request.trials + 1
        count = layers + others
        steps.append(("layers", f"{layers} runs of {cost['steps']} steps, one a layer", layers * run))
        steps.append(("search", f"{request.trials} more, at other strengths, and the defaults", others * run))
    steps.append(("final", "the best run on the other half of the questions", 4 * questions))
    if job.sources:
        what = f"{job.tier} attacks on it and on the original"
        steps.append(("attacks", what, 2 * PASSES[job.tier] * questions))
    steps.append(("export", f"the whole model, {format_gb(cost['checkpoint_bytes'])}", 0.0))
    listed = [{"step": step, "what": what, "seconds": max(1, round(seconds))} for step, what, seconds in steps]
    summary = {"steps": listed, "runs": count, "seconds": sum(step["seconds"] for step in listed)}
    return summary | {key: cost[key] for key in ("memory_private", "memory_free", "advice")}


def explain_search(plan: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{number}. {step['step']:13} {step['what']:58} about {format_duration(step['seconds'])}"
        for number, step in enumerate(plan["steps"], 1)
    ]
    lines.append(
        f"{plan['runs']} runs, about {format_duration(plan['seconds'])} in all; "
        f"{format_gb(plan['memory_private'])} of memory, {format_gb(plan['memory_free'])} are free"
    )
    return [*lines, f"this does not fit into memory; try {plan['advice']}"] if plan["advice"] else lines


def explain(name: str, /, **facts: Any) -> str:
    """A sentence of `templates/choices.yaml`, filled in."""
    path = Path(__file__).with_name("templates") / "choices.yaml"
    return str(yaml.safe_load(path.read_text(encoding="utf-8"))[name]).format(**facts)


def choose_trial(job: AutoJob, tried: Sequence[Entry]) -> tuple[Entry | None, str]:
    """The run that forgets most within the budget, if any, and why."""
    limit, budget, ranked = job.limit, job.request.budget, objective.sort_entries(tried)
    losses = [entry["values"]["utility_loss"] for entry in tried if entry["values"]]
    # where none keeps the margin, the whole budget is better than nothing
    if fitting := [entry for most in (limit, budget) for entry in ranked if entry["values"]["utility_loss"] <= most]:
        params, values = fitting[0]["params"], fitting[0]["values"]
        within = sum(loss <= limit for loss in losses)
        name = "chosen" if values["utility_loss"] <= limit else "chosen beyond the margin"
        settings = " ".join(f"{key}={value}" for key, value in params.items())
        facts = {"count": len(losses), "within": within, "limit": limit, "margin": objective.MARGIN}
        return fitting[0], explain(name, **facts, **values, settings=settings)
    if ranked:
        nearest = min(ranked, key=lambda entry: entry["values"]["utility_loss"])
        return None, explain("none within the budget", budget=budget, **nearest["values"])
    return None, explain("none", count=len(losses))


def explain_final(final: Mapping[str, Any], budget: float) -> list[str]:
    """What the chosen run does on the half kept back."""
    keys = ("forgetting", "utility_loss")
    test, usual = ({key: str(read_estimate(final[name][key])) for key in keys} for name in ("test", "defaults"))
    loss = final["test"]["utility_loss"]
    missed = "is missed, by no more than noise" if loss["low"] <= budget else "is missed"
    verdict = "is kept" if loss["value"] <= budget else missed
    return [explain("final", test=test, usual=usual), explain("budget", test=test, budget=budget, verdict=verdict)]


def run_search(job: AutoJob, tell: Tell = lambda step, sentence: None, watch: Watch = ignore_progress) -> Answer:
    """Do all of it; SrmuError where nothing within the budget forgets: `auto.json` then says what was found."""
    out, budget, yardstick = job.request.out, job.request.budget, job.yardstick
    out.mkdir(parents=True, exist_ok=True)
    if read_json(out / FILE, {}).get("question") != job.question:
        shutil.rmtree(out / MODEL, ignore_errors=True)  # it answers another question
    answer: Answer = {"question": job.question, "budget": budget, "choices": [], "run": None, "final": None}

    def say(step: str, *sentences: str) -> None:
        for sentence in sentences:
            answer["choices"].append({"step": step, "sentence": sentence})
            tell(step, sentence)
        write_json(out / FILE, answer)

    say("measure", explain("measure", forget=", ".join(yardstick.forget), utility=", ".join(yardstick.utility)))
    if job.sources is None:
        say("measure", explain("texts alone"))
    say("entanglement", *advise_on_texts(job, answer, watch))
    tried = run_trials(job, answer, say, watch)
    chosen, sentence = choose_trial(job, tried)
    say("search", sentence)
    if chosen is None:
        raise SrmuError(
            f"{sentence} Nothing is exported; allow more (--budget), give retain texts closer to what suffers, or "
            "search longer (--trials): the same folder goes on from what is there"
        )
    run = Run.open(out / chosen["runs"][0])
    final: dict[str, Any] = {half: yardstick.estimate(run, half) for half in objective.HALVES}
    final["defaults"] = yardstick.estimate(Run.open(out / tried[0]["runs"][0]), "test")
    answer |= {"run": chosen["runs"][0], "final": final}
    why = [c["sentence"] for c in answer["choices"] if c["step"] in ("layers", "search")]
    extend_record(run.folder, [], purpose=run.record["purpose"] | {"choice": " ".join(why)})
    say("final", *explain_final(final, budget))
    say("attacks", *attack_choice(job, run, final, watch))
    if not (out / MODEL).exists():
        run.export(out / MODEL, watch=watch)
    say("export", explain("export"))
    write_report([out], out / PAGE)
    return answer


def advise_on_texts(job: AutoJob, answer: Answer, watch: Watch) -> list[str]:
    """What `srmu inspect texts` says, with the model and the questions to choose on; adds the layer `advised`.

    Only layers that are to be scanned are compared.
    """
    model, tokenizer = open_model(job.config.model, job.config.device)
    asked = [part for part in job.yardstick.forget.values() if isinstance(part, TaskYardstick)]
    questions = [question for part in asked for question in part.halves["val"]]
    texts = [*job.texts["forget"]], [*job.texts["retain"]]
    layers = None if job.request.robust else job.layers
    inside = model.module, tokenizer
    found = separability.measure_entanglement(*texts, questions, inside, layers=layers, watch=watch)
    answer["advised"] = separability.choose_layer(found.numbers["separability"]["layers"])["layer"]
    return found.sentences


def run_trials(job: AutoJob, answer: Answer, say: Callable[..., None], watch: Watch) -> list[Entry]:
    """The runs to choose from, that of the defaults first; adds them to the answer, with the `scan` of layers."""
    request = job.request
    if request.robust:
        say("names", explain("names of a file" if request.names else "names found", count=len(job.names)))
        settings = [robust.start_values(keeping) for keeping in robust.KEEPING[: request.trials]]
        tried = objective.search_configs(job, "weights", settings, watch)
        answer |= {"trials": tried, "defaults": tried[0]}
        if not tried[0]["values"]:
            raise SrmuError(tried[0]["why"])
        return tried
    answer["defaults"] = objective.try_config(job, job.config)
    config = with_values(job.config, start_strength(job.config))
    settings = [{"method.layer": layer} for layer in job.layers]
    scanned = objective.search_configs(replace(job, config=config), "layers", settings, watch)
    rows = [{"layer": one["params"]["method.layer"], **one["values"]} for one in scanned if one["values"]]
    if not rows:
        raise SrmuError(f"every layer of {config.method.name} diverged; lower train.learning_rate")
    best = max(rows, key=lambda row: objective.trial_worth(row, job.limit))
    answer["scan"] = {"layers": rows, "best": best["layer"]}
    say("layers", explain("layers", tried=", ".join(str(row["layer"]) for row in rows), **best))
    advised = next((row for row in rows if row["layer"] == answer["advised"]), None)
    if advised:  # else its run diverged
        say("layers", explain("advice kept" if advised is best else "advice overruled", **advised))
    job = replace(job, config=with_values(config, {"method.layer": best["layer"]}))
    name = f"layer {best['layer']} within {job.limit:g}"
    answer["trials"] = objective.search_configs(job, name, [{}] * request.trials, watch)
    return [answer["defaults"], *answer["trials"]]


def attack_choice(job: AutoJob, run: Run, final: dict[str, Any], watch: Watch) -> list[str]:
    """Attack the chosen run, and add what was found to `final`; what is to be said of it."""
    if job.sources is None:
        return [explain("no attack")]
    seed, device = job.config.seed, job.config.device
    report = attack_run(run, tier=job.tier, sources=job.sources, seed=seed, device=device, watch=watch)
    final["K*"] = report["K*"]
    if not job.request.robust:
        lines = describe_attacks(report)
        return [f"{line[0].upper()}{line[1:]}." for line in (lines[1], lines[-1])]
    floor = final["floor"] = robust.measure_floor(run, job.sources, report, [*job.names, *job.goals])
    done = sum(entry["status"] == "done" for entry in report["attacks"].values())
    held_against = explain("floor", **floor) if floor else explain("no floor")
    return [explain("attacks", count=done, **report["K*"]), held_against, explain("beyond")]


def find_answer(job: AutoJob) -> Answer | None:
    """The answer to the same question, where it is there already."""
    answer = read_json(job.request.out / FILE, {})
    done = answer.get("question") == job.question and answer["choices"][-1]["step"] == "export"
    return answer if done and all((job.request.out / name).exists() for name in (MODEL, PAGE)) else None
