"""From a model and two sets of texts to an unlearned model, without knowing what a layer is.

Each choice is explained in a sentence, which is told at once and kept in `auto.json`. The same
command again goes on where it was stopped: runs are named by what decides them, a study keeps the
trials, the cache keeps the attacks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import yaml

from srmu.attacks.base import Tier
from srmu.attacks.suite import Sources, attack_run, load_exam
from srmu.attacks.summary import describe_attacks
from srmu.data.names import find_names, read_names
from srmu.data.sources import Source, read_texts
from srmu.engine import weights
from srmu.engine.files import read_json, require_free, write_json
from srmu.engine.loading import read_config
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.evals import separability
from srmu.evals.analyses import candidate_layers, open_model
from srmu.evals.score import tasks_beside
from srmu.methods import Misdirection
from srmu.report.build import write_report
from srmu.report.format import read_estimate
from srmu.runs import plan as runs
from srmu.runs.config import find_method, make_config
from srmu.runs.estimate import estimate_run, format_duration, format_gb
from srmu.runs.record import extend_record
from srmu.runs.run import Run
from srmu.search import objective, robust
from srmu.search.objective import AutoJob, AutoRequest, Entry, TaskYardstick, TextYardstick, Yardstick
from srmu.search.space import with_values

FILE = "auto.json"
MODEL = "model"  # the exported checkpoint
PAGE = "report.html"
TESTBED = ("organism_hazard",), ("organism_neighbour", "organism_general")
PASSES: dict[Tier, int] = {"smoke": 40, "standard": 320}  # of a model over the questions, attacked
Tell = Callable[[str, str], None]


def prepare_job(request: AutoRequest) -> AutoJob:
    """Read and check all that was named; nothing is written. SrmuError for what cannot work."""
    base = check_request(request)
    texts = {role: read_texts([Source(path=path) for path in getattr(request, role)]) for role in ("forget", "retain")}
    if set(texts["forget"]) == set(texts["retain"]):
        raise SrmuError("--forget and --retain hold the same texts; retain must name what the model should keep")
    names = []
    if request.robust:
        names = read_names(request.names) if request.names else find_names(*texts.values())
    goals = read_names(request.goals, "goals") if request.goals else []
    testbed = (base.parent / "organism.json").exists()
    tasks: tuple[str, ...] = request.tasks or (TESTBED[0] if testbed else ())
    utility = request.utility or (TESTBED[1] if testbed and not request.tasks else ())
    folder = Path(request.tasks_dir) if request.tasks_dir else tasks_beside(base)
    given = [f"seed={request.seed}", f"device={request.device}", f"runs_dir={request.out / 'runs'}"]
    for option in ("names", "goals"):
        if path := getattr(request, option):
            given.append(f"method.{option}={Path(path).resolve()}")
    held = {}
    for role, named in (("forget", tasks), ("retain", utility)):
        if not named:  # runs leave out what they are measured on
            texts[role], held[role] = objective.hold_out(role, texts[role])
            given.append(f"topics.topic.{role}_held_out={sum(map(len, held[role].values()))}")
    method = robust.METHOD if request.robust else request.method
    config = make_config(request.model, request.forget, request.retain, method, given)

    def sources_of(names: tuple[str, ...], utility: tuple[str, ...] = ()) -> Sources:
        """With the half to choose on from tasks TASK_val beside the others, or a split."""
        halves = [f"{name}_val" for name in names]
        there = all(folder and any(folder.rglob(f"{name}.yaml")) for name in halves)
        return Sources(names, ",".join(halves) if there else "split", utility, str(folder or ""))

    def ask(*names: str) -> TaskYardstick:
        exam = load_exam(sources_of(names), config, request.seed)
        return TaskYardstick({"val": exam.val, "test": exam.test})

    read = {f"{role}_texts": TextYardstick(held[role], config.topics["topic"].max_length) for role in held}
    yardstick = Yardstick(
        {",".join(tasks): ask(*tasks)} if tasks else {"forget_texts": read["forget_texts"]},
        {name: ask(name) for name in utility} or {"retain_texts": read["retain_texts"]},
        request.seed,
        request.device,
    )
    sources = sources_of(tasks, utility) if tasks else None
    return AutoJob(request, config, yardstick, sources, texts, names, goals)


def check_request(request: AutoRequest) -> Path:
    """The model's folder; SrmuError for options that do not go together or name nothing."""
    if not (request.out / FILE).exists():
        require_free(request.out)
    for option in ("names", "goals"):
        if getattr(request, option) and not request.robust:
            raise SrmuError(f"--{option} has no effect without --robust")
    base = weights.locate_model(request.model)
    if not request.robust:
        method = find_method(request.method)
        if not issubclass(method, Misdirection):
            raise SrmuError(
                f"--method {request.method} has no layer to find: choose srmu, rmu, adaptive_rmu or "
                "rna, or search its options with srmu sweep"
            )
        candidate_layers(method(), read_config(base))  # are there layers enough?
    return base


def plan_search(job: AutoJob) -> dict[str, Any]:
    """The steps, how many runs they make, how long they take and the memory; nothing is done."""
    request, plan = job.request, runs.plan_run(job.config)
    config, base = plan.config, plan.base
    tokenizer = runs.load_tokenizer(base)
    topics = runs.load_topics(config, tokenizer)
    if request.robust:
        config = with_values(config, robust.start_values(config, 1.0))
    cost = estimate_run(replace(plan, config=config), topics)
    size = sum(prod(entry["shape"]) for entry in weights.stored_entries(base).values())
    rows = [batch["input_ids"] for topic in topics for batch in (*topic.forget, *topic.retain)]
    read = min(1.0, 2 * separability.DOCUMENTS / sum(map(len, rows))) * sum(batch.numel() for batch in rows)
    token_seconds = 2 * size / cost["flops_a_second"]
    questions = job.yardstick.count_tokens(tokenizer) * token_seconds
    run = cost["seconds"] + questions
    steps = [("entanglement", "what forget and retain texts share", read * token_seconds)]
    if request.robust:
        count = min(request.trials, len(robust.KEEPING))
        steps.append(("search", f"{count} runs, at other weights of what is kept", count * run))
    else:
        assert isinstance(config.method, Misdirection)
        layers = len(candidate_layers(config.method, read_config(base), objective.LAYERS))
        count = layers + request.trials + 1
        steps += [
            ("layers", f"{layers} runs of {cost['steps']} steps, one a layer", layers * run),
            ("search", f"{request.trials} more, at other strengths, and the defaults", (request.trials + 1) * run),
        ]
    steps.append(("final", "the best run on the other half of the questions", 4 * questions))
    if job.sources:
        what = f"{job.tier} attacks on it and on the original"
        steps.append(("attacks", what, 2 * PASSES[job.tier] * questions))
    steps.append(("export", f"the whole model, {format_gb(cost['checkpoint_bytes'])}", 0.0))
    return {
        "steps": [dict(zip(("step", "what", "seconds"), step, strict=True)) for step in steps],
        "runs": count,
        "seconds": sum(step[2] for step in steps),
        **{key: cost[key] for key in ("memory_private", "memory_free", "advice")},
        "out": str(request.out),
    }


def explain_search(plan: Mapping[str, Any]) -> list[str]:
    """A plan in lines for a person."""
    lines = [
        f"{number}. {step['step']:13} {step['what']:58} about {format_duration(max(1, round(step['seconds'])))}"
        for number, step in enumerate(plan["steps"], 1)
    ]
    lines.append(
        f"{plan['runs']} runs, about {format_duration(max(1, round(plan['seconds'])))} in all; "
        f"{format_gb(plan['memory_private'])} of memory, {format_gb(plan['memory_free'])} are free"
    )
    if plan["advice"]:
        lines.append(f"this does not fit into memory; try {plan['advice']}")
    return lines


def explain(name: str, /, **facts: Any) -> str:
    """A sentence of `templates/choices.yaml`, filled in."""
    path = Path(__file__).with_name("templates") / "choices.yaml"
    sentence: str = yaml.safe_load(path.read_text(encoding="utf-8"))[name]
    return sentence.format(**facts)


def choose_trial(job: AutoJob, tried: Sequence[Entry]) -> tuple[Entry | None, str]:
    """The trial that forgets most within the budget, if any, and why; the defaults are the first of those tried."""
    limit, budget, ranked = job.limit, job.request.budget, objective.sort_entries(tried)
    # where none keeps the margin, the whole budget is better than nothing
    fitting = [e for most in (limit, budget) for e in ranked if e["values"]["utility_loss"] <= most]
    if fitting:
        params, values = fitting[0]["params"], fitting[0]["values"]
        # in a robust search the defaults are one of the trials
        runs_tried = [entry for i, entry in enumerate(tried) if entry["values"] and entry not in tried[:i]]
        losses = [entry["values"]["utility_loss"] for entry in runs_tried]
        within = sum(loss <= limit for loss in losses)
        name = "chosen" if values["utility_loss"] <= limit else "chosen beyond the margin"
        settings = " ".join(f"{key}={value}" for key, value in params.items())
        facts = {"count": len(losses), "within": within, "limit": limit, "margin": objective.MARGIN}
        return fitting[0], explain(name, **facts, **values, settings=settings)
    if forgetting := objective.sort_entries(tried[1:]):
        nearest = min(forgetting, key=lambda entry: entry["values"]["utility_loss"])
        return None, explain("none within the budget", budget=budget, **nearest["values"])
    return None, explain("none", count=len(tried) - 1)


def explain_final(final: Mapping[str, Any], budget: float) -> list[str]:
    """What the chosen run does on the half kept back."""
    keys = ("forgetting", "utility_loss")
    test, usual = ({key: str(read_estimate(final[name][key])) for key in keys} for name in ("test", "defaults"))
    loss = final["test"]["utility_loss"]
    missed = "is missed, by no more than noise" if loss["low"] <= budget else "is missed"
    verdict = "is kept" if loss["value"] <= budget else missed
    return [explain("final", test=test, usual=usual), explain("budget", test=test, budget=budget, verdict=verdict)]


def run_search(
    job: AutoJob, tell: Tell = lambda step, sentence: None, watch: Watch = ignore_progress
) -> dict[str, Any]:
    """All of it: check, scan, search, final measure, attacks, export; the content of `auto.json`.

    SrmuError where nothing within the budget forgets; `auto.json` then says what was found.
    """
    out, yardstick = job.request.out, job.yardstick
    if not (out / FILE).exists():
        out.mkdir(parents=True, exist_ok=True)
    elif read_json(out / FILE)["question"] != job.question:
        shutil.rmtree(out / MODEL, ignore_errors=True)  # it answers another question
    answer: dict[str, Any] = {
        "kind": "auto", "budget": job.request.budget, "yardstick": yardstick.kind,
        "question": job.question, "choices": [], "run": None, "final": None,
    }  # fmt: skip

    def say(step: str, *sentences: str) -> None:
        for sentence in sentences:
            answer["choices"].append({"step": step, "sentence": sentence})
            tell(step, sentence)
        write_json(out / FILE, answer)

    say("measure", explain("measure", forget=", ".join(yardstick.forget), utility=", ".join(yardstick.utility)))
    if yardstick.kind == "texts":
        say("measure", explain("texts alone"))
    say("entanglement", *advise_on_texts(job, watch))
    run_trials(job, answer, say, watch)
    tried = [answer["defaults"], *answer["trials"]]
    chosen, sentence = choose_trial(job, tried)
    say("search", sentence)
    if chosen is None:
        raise SrmuError(
            f"{sentence} Nothing is exported; allow more (--budget), give "
            "retain texts closer to what suffers, or search longer (--trials): the same folder "
            "goes on from what is there"
        )
    run = Run.open(out / chosen["runs"][0])
    final: dict[str, Any] = {half: yardstick.estimate(run, half) for half in objective.HALVES}
    final["defaults"] = yardstick.estimate(Run.open(out / tried[0]["runs"][0]), "test")
    answer |= {"run": chosen["runs"][0], "final": final}
    why = [c["sentence"] for c in answer["choices"] if c["step"] in ("layers", "search")]
    extend_record(run.folder, [], purpose=run.record["purpose"] | {"choice": " ".join(why)})
    say("final", *explain_final(final, job.request.budget))
    say("attacks", *attack_choice(job, run, final, watch))
    if not (out / MODEL).exists():
        run.export(out / MODEL, watch=watch)
    final["model"] = MODEL
    say("export", explain("export"))
    write_report([out], out / PAGE)
    return answer


def advise_on_texts(job: AutoJob, watch: Watch) -> list[str]:
    """What `srmu inspect texts` says, with the model and the questions to choose on."""
    model, tokenizer = open_model(job.config.model, job.config.device)
    asked = [part for part in job.yardstick.forget.values() if isinstance(part, TaskYardstick)]
    questions = [(one.prompt, one.answer, one.entry) for part in asked for one in part.halves["val"]]
    texts = [*job.texts["forget"]], [*job.texts["retain"]]
    return separability.measure_entanglement(*texts, questions, (model.module, tokenizer), watch=watch).sentences


def run_trials(job: AutoJob, answer: dict[str, Any], say: Callable[..., None], watch: Watch) -> None:
    """The runs to choose from: `defaults`, `trials` and, of methods with a layer, `scan`."""
    request = job.request
    if request.robust:
        found = "names of a file" if request.names else "names found"
        say("names", explain(found, count=len(job.names)))
        settings = [robust.start_values(job.config, keeping) for keeping in robust.KEEPING[: request.trials]]
        answer["trials"] = objective.search_configs(job, "weights", settings, watch)
        answer["defaults"] = answer["trials"][0]  # the method's own: the others are compared with it
        if not answer["defaults"]["values"]:
            raise SrmuError(answer["defaults"]["why"])
        return
    answer["defaults"] = objective.try_config(job, job.config)
    config, answer["scan"] = objective.scan_layers(job, watch)
    rows, best = answer["scan"]["layers"], answer["scan"]["best"]
    (row,) = (row for row in rows if row["layer"] == best)
    tried = ", ".join(str(row["layer"]) for row in rows)
    say("layers", explain("layers", best=best, tried=tried, **row))
    trials: list[dict[str, Any]] = [{}] * request.trials
    name = f"layer {best} within {job.limit:g}"
    answer["trials"] = objective.search_configs(replace(job, config=config), name, trials, watch)


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
    return [
        explain("attacks", count=done, **report["K*"]),
        explain("floor", **floor) if floor else explain("no floor"),
        explain("beyond"),
    ]


def find_answer(job: AutoJob) -> dict[str, Any] | None:
    """The answer to the same question, where it is there already."""
    answer = read_json(job.request.out / FILE, {})
    done = answer.get("question") == job.question and (answer["final"] or {}).get("model")
    return answer if done and all((job.request.out / name).exists() for name in (MODEL, PAGE)) else None
