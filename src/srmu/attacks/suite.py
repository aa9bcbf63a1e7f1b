"""Attack a run: what comes back, beside the same attacks on the original, the oracle and what was never known."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from srmu.attacks import ATTACKS, TIERS, Attack
from srmu.attacks.base import AttackResult, Exam, Texts, Tier, guess_share
from srmu.attacks.summary import best_setting, merge_report, summarise_attacks
from srmu.attacks.tuned_relearning import TunedRelearning
from srmu.data.sources import Source, read_texts
from srmu.engine import distributed, files, loading, progress, weights
from srmu.engine.devices import find_device
from srmu.errors import SrmuError, first_line, suggest_word
from srmu.evals import lm_eval, results, score
from srmu.evals.results import KEPT
from srmu.evals.statistics import LEAST
from srmu.evals.subject import NotApplicable, Question, Subject, list_facts
from srmu.runs.config import Config
from srmu.runs.plan import read_topic_texts
from srmu.runs.run import OpenedModel, Run

ROOMS = ("attacks", "data", "engine", "evals")  # whose code decides a result
LIBRARIES = ("torch", "transformers", "peft", "optuna")  # whose releases do, too
SEARCHED = TunedRelearning.name
HOUR = 3600  # seconds
HAZARD, UNKNOWN = "testbed_hazard", ("testbed_unknown", "testbed_unknown_val")  # a testbed's tasks


@dataclass(frozen=True)
class Sources:
    """Where an attack's questions and texts come from; "" is what the testbed has, or nothing."""

    tasks: tuple[str, ...] = ()  # ask for what is to be forgotten
    val: str = ""  # tasks a,b that ask for other facts of the kind; "split": half of the questions
    utility: tuple[str, ...] = ()  # ask for what is to be kept; (): the run's other eval tasks
    tasks_dir: str = ""
    neutral: str = ""  # a file of texts far from the forget knowledge
    holdout: str = ""  # a file of texts like the forget set that the model never saw
    oracle: str = ""  # a model that never saw the forget knowledge
    unknown: tuple[str, ...] = ()  # tasks that ask for facts of the kind that the original never knew
    limit: int = 400  # questions of each task and half, drawn by the seed


def attack_run(
    run: str | Path | Run,
    *,
    tier: Tier = "smoke",
    names: str | Sequence[str] = (),
    search: Mapping[str, int] = {},
    sources: Sources = Sources(),
    seed: int = 0,
    device: str = "auto",
    confirm: Callable[[str], bool] = lambda text: True,
    watch: progress.Watch | None = None,
) -> dict[str, Any]:
    """Try to bring back what a run was to forget, with the attacks of a tier or those of `names`.

    Gives the report, which is merged into the run's `results.json`: `report["K*"]` is the share of the knowledge that
    the strongest attack finds, with its interval; `report["attacks"]` holds each attack's numbers by name. `sources`
    say what to ask; for a run on a testbed the default finds it.

    Each attack also runs on the original and on the oracle, or asks the original what it never knew, and is kept in
    the cache folder, so that an interrupted suite goes on. `confirm` is asked about each attack that takes hours.
    `search` holds constants of `tuned_relearning`, such as `{"trials": 40}`. SrmuError where an attack or a task does
    not exist, or the questions are too few.
    """
    watch, run = watch or progress.choose_progress(), Run.open(run)
    chosen = select_attacks(tier, results.list_names(names), search)
    results.check_results(run.folder)  # what is wrong with them must show before the work
    sources = fill_sources(sources, run.config, run.base)
    exam = load_exam(sources, seed)
    unknown = load_unknown(sources, exam, seed)
    texts = load_texts(sources, run.config)
    subjects = Subjects(run, sources.oracle, find_device(device))
    chosen = {name: one for name, one in chosen.items() if confirm_attack(name, one, subjects, confirm)}
    prints = subjects.prints(unknown=bool(unknown))
    done = make_attacks(chosen, subjects, prints, texts, exam, unknown, seed, watch)
    found = {name: {who: done[who, name][0] for who in prints if (who, name) in done} for name in chosen}
    tasks = {"test": list(sources.tasks), "val": sources.val, "utility": [*exam.utility]}
    report = summarise_attacks(chosen, found, exam, seed, unknown) | {
        "tier": tier,
        "seed": seed,
        "tasks": tasks | ({"unknown": list(sources.unknown)} if unknown else {}),
        "oracle": bool(sources.oracle),
    }
    for name, entry in report["attacks"].items():
        entry["seconds"] = round(sum(seconds for (_, other), (_, seconds) in done.items() if other == name), 3)
        entry["definition"] = hash_code()
    return merge_report(run.folder, report, [*ATTACKS])


@cache
def hash_code() -> str:
    """A digest of the code that decides what attacks find."""
    return files.sha256(*sorted(path for room in ROOMS for path in (Path(__file__).parents[1] / room).glob("*.py")))


def make_attacks(
    chosen: Mapping[str, Attack],
    subjects: "Subjects",
    prints: Mapping[str, list[str]],
    texts: Texts,
    exam: Exam,
    unknown: tuple[Question, ...],
    seed: int,
    watch: progress.Watch,
) -> dict[tuple[str, str], tuple[AttackResult, float]]:
    """By whose model and attack: what it found, or what the cache has of it, and the seconds that it took."""
    pairs = [pair for pair in product(prints, chosen) if pair != ("unknown", KEPT)]
    done: dict[tuple[str, str], tuple[AttackResult, float]] = {}
    with watch("attacking", len(pairs) // distributed.get_size()) as tick:

        def attack_one(pair: tuple[str, str]) -> tuple[AttackResult, float]:
            who, name = pair
            one, asked, started = chosen[name], exam, time.monotonic()
            if who == "unknown":  # it learns from the same facts, under the setting that was best for the run
                own = done["unlearned", name][0]
                if own.why:
                    return own, 0.0
                only = best_setting(own).setting if own.ways else ""
                asked = replace(exam, test=unknown, run_test=exam.test, only=only)
            given = files.sha256(repr((asked, texts, seed)).encode())
            key = [prints[who], repr(one), given, hash_code(), *map(version, LIBRARIES)]
            kept = files.find_cached("attacks", key)
            within = progress.nest_progress(tick, f"{name}, {who}")
            remember = partial(remember_part, key)
            brought = kept or try_attack(one, subjects, who, texts, asked, seed, within, remember)
            result = TypeAdapter(AttackResult).validate_python(brought)
            if not kept and result.status == "done":
                files.keep_cached("attacks", key, asdict(result))
            tick(f"{name}, {who}")
            return result, time.monotonic() - started

        for controls in (False, True):
            part = [pair for pair in pairs if (pair[0] == "unknown") == controls]
            done |= zip(part, distributed.share_work(part, attack_one), strict=True)
    return done


def remember_part(key: Sequence[Any], part: Any, make: Callable[[], Any]) -> Any:
    """A part of what an attack with that key finds, which is kept before the whole is."""
    return files.cached("attacks", [*key, part], make)


def try_attack(
    one: Attack,
    subjects: "Subjects",
    who: str,
    texts: Texts,
    exam: Exam,
    seed: int,
    watch: progress.Watch,
    remember: Callable[[Any, Callable[[], Any]], Any],
) -> AttackResult:
    """What an attack on a model brings back, or why it brings nothing."""
    try:
        model = getattr(subjects, who)
        model.watch, model.remember = watch, remember
        return one.run(model, texts, exam, seed)
    except NotApplicable as reason:
        return AttackResult(status="does not apply", why=str(reason))
    except (SrmuError, torch.OutOfMemoryError) as error:
        return AttackResult(status="failed", why=first_line(error))


def select_attacks(tier: Tier, names: Sequence[str], search: Mapping[str, int] = {}) -> dict[str, Attack]:
    """The attacks to run, always with the questions as they are and the utility."""
    if tier not in TIERS:
        raise SrmuError(f"tier {tier!r} does not exist; choose one of {', '.join(TIERS)}")
    ids = [attack.id for attack in ATTACKS.values()]  # two attacks may share one
    for name in names:
        if name not in ATTACKS and name.upper() not in ids:
            raise SrmuError(f"attack {name!r} does not exist{suggest_word(name, ATTACKS)}")
    wanted = {*results.UNATTACKED, *names, *map(str.upper, names)}
    chosen = {
        name: attack.at_tier(tier)
        for name, attack in ATTACKS.items()
        if {name, attack.id} & wanted or (not names and TIERS.index(attack.tier) <= TIERS.index(tier))
    }
    if search and SEARCHED not in chosen:
        raise SrmuError(f"{' and '.join(search)}: options of {SEARCHED}; name that attack, too")
    for key, value in search.items():
        if value < 1:
            raise SrmuError(f"{key} {value}: {SEARCHED} can try nothing with that; give 1 or more")
    return chosen | ({SEARCHED: TunedRelearning(**{**vars(chosen[SEARCHED]), **search})} if search else {})


def fill_sources(sources: Sources, config: Config, base: Path) -> Sources:
    """What was not given, from the testbed around the model or from the run's own config.

    Unknown facts are asked for where there is no oracle; those that are named take the place of a testbed's oracle.
    """
    if sources.unknown and sources.oracle:
        raise SrmuError("unknown and oracle: name one of them; with an oracle its own answers are the control")
    testbed = config.testbed

    def of_testbed(name: str) -> str:
        return str(testbed / name) if testbed and (testbed / name).exists() else ""

    tasks = sources.tasks or ((HAZARD,) if testbed else ())
    if not tasks:
        raise SrmuError("tasks: name those of lm-eval, or your own, that ask for what is to be forgotten")
    tasks_dir = sources.tasks_dir or str(config.tasks_dir or score.tasks_beside(base) or "")
    oracle = sources.oracle or ("" if sources.unknown else of_testbed("oracle"))
    never = UNKNOWN if testbed and tasks_dir and HAZARD in tasks and not oracle else ()
    return replace(
        sources,
        tasks=tasks,
        val=sources.val or ",".join(f"{task}_val" for task in tasks),
        utility=sources.utility or tuple(task for task in config.eval if task not in tasks),
        tasks_dir=tasks_dir,
        neutral=sources.neutral or of_testbed("retain-low.jsonl"),
        holdout=sources.holdout or of_testbed("holdout.jsonl"),
        oracle=oracle,
        unknown=sources.unknown or tuple(task for task in never if (Path(tasks_dir) / f"{task}.yaml").exists()),
    )


def load_tasks(tasks: Sequence[str], sources: Sources) -> list[Question]:
    folder = Path(sources.tasks_dir) if sources.tasks_dir else None
    return [question for task in tasks for question in lm_eval.load_questions(task, folder)]


def draw_questions(questions: Sequence[Question], limit: int, seed: int) -> tuple[Question, ...]:
    """At most so many of the questions, fact by fact, in their order."""
    facts = sorted({q.fact for q in questions})
    random.Random(f"{seed} questions").shuffle(facts)
    order = {fact: i for i, fact in enumerate(facts)}
    drawn = sorted(range(len(questions)), key=lambda i: order[questions[i].fact])[:limit]
    return tuple(questions[i] for i in sorted(drawn))


def load_exam(sources: Sources, seed: int) -> Exam:
    """The questions in two halves that share no fact; SrmuError where they cannot be halved."""

    load, draw = partial(load_tasks, sources=sources), partial(draw_questions, limit=sources.limit, seed=seed)
    test = load(sources.tasks)
    if sources.val == "split":
        facts = sorted({q.fact for q in test})
        half = set(random.Random(f"{seed} halves").sample(facts, len(facts) // 2))
        val, test = [q for q in test if q.fact in half], [q for q in test if q.fact not in half]
    else:
        try:
            val = load(sources.val.split(","))
        except SrmuError as error:
            raise SrmuError(
                f"no validation half: {error}; name its tasks as val, or split for half of the questions"
            ) from error
    if both := {q.fact for q in val} & {q.fact for q in test}:
        raise SrmuError(f"{len(both)} facts are asked for in both halves, tasks and val; name other val tasks")
    for part, option in ((test, "tasks"), (val, "val tasks")):
        if (count := len({q.fact for q in draw(part)})) < LEAST:
            under = f" under limit {sources.limit}" if sources.limit < len(part) else ""
            more = (
                "raise limit" if under else "name more tasks, or make the testbed from more facts that the model knows"
            )
            raise SrmuError(
                f"{option} ask for {count} facts{under}, too few for an interval: {LEAST} or more in each half; {more}"
            )
    return Exam(draw(test), draw(val), {task: draw(load([task])) for task in sources.utility})


def load_unknown(sources: Sources, exam: Exam, seed: int) -> tuple[Question, ...]:
    """The questions on facts that the original never knew; none where they are too few for an interval."""
    unknown = draw_questions(load_tasks(sources.unknown, sources), sources.limit, seed)
    facts, tasks = {*list_facts(unknown)}, ", ".join(sources.unknown)
    if both := facts & {*list_facts(exam.both)}:
        raise SrmuError(f"unknown: {len(both)} facts of {tasks} are also in tasks or val; leave them out")
    chances = [guess_share(asked) for asked in (unknown, exam.test)] if unknown else [0.0]
    if max(chances) - min(chances) > 0.01:
        shares = " and ".join(f"{chance:.1%}" for chance in chances)
        why = "both need the same number of options"
        raise SrmuError(f"unknown: guessing answers {shares} of {tasks} and of what was forgotten; {why}")
    if unknown and len(facts) < LEAST:
        if distributed.is_first():
            progress.print_line(
                f"{tasks}: {len(facts)} facts that were never known are too few, of {LEAST} or more: "
                "K* is counted above guessing"
            )
        return ()
    return unknown


def load_texts(sources: Sources, config: Config) -> Texts:
    """The run's forget texts, and neutral ones: its retain texts where no others are named."""
    own = read_topic_texts(config)
    neutral, holdout = (read_texts([Source(path=name)]) if name else [] for name in (sources.neutral, sources.holdout))
    if not neutral and not own["retain"]:
        raise SrmuError("neutral: name a file of texts that are far from the forget knowledge")
    return Texts(tuple(own["forget"]), tuple(neutral or own["retain"]), tuple(holdout))


class Subjects:
    """The models of a suite, each loaded when it is first needed."""

    def __init__(self, run: Run, oracle: str, device: str) -> None:
        self.run, self.base = run, OpenedModel(run.base, None, device)
        self.reference = OpenedModel(weights.locate_model(oracle), None, device) if oracle else None
        if self.reference:
            loading.read_config(self.reference.base)  # before anything is loaded: is it a model?

    def prints(self, *, unknown: bool) -> dict[str, list[str]]:
        """By name: the weights that its attacks may read. `unknown` is the original, asked what it never knew."""
        prints = [weights.fingerprint_model(opened.base) for opened in (self.base, self.reference) if opened]
        run = [weights.changed_fingerprint(prints[0], self.run.delta), self.run.config.id]
        found = {"original": prints, "oracle": prints, "unlearned": [*prints, *run], "unknown": prints}
        left_out = {"oracle": not self.reference, "unknown": not unknown}
        return {who: [who, *key, self.base.dtype] for who, key in found.items() if not left_out.get(who)}

    @cached_property
    def before(self) -> dict[str, torch.Tensor]:
        """The original's parameters: the checkpoint's file, mapped into memory."""
        return {name: p.data for name, p in self.base.module.named_parameters()}

    @cached_property
    def original(self) -> Subject:
        return Subject(self.base.module, self.base.tokenizer, oracle=self.oracle)

    @property
    def unknown(self) -> Subject:
        return self.original

    @cached_property
    def oracle(self) -> Subject | None:
        return Subject(self.reference.module, self.reference.tokenizer, self.before) if self.reference else None

    @cached_property
    def unlearned(self) -> Subject:
        # for good, as this module is nothing else; forgotten, the context would end by itself
        self.inference = OpenedModel(self.run.base, self.run, self.base.device).after()
        module = self.inference.__enter__()
        changed = {name: self.before[name] for name, p in module.named_parameters() if not p.equal(self.before[name])}
        return Subject(module, self.base.tokenizer, changed, self.oracle, self.run.config.method.no_checkpoint)


def confirm_attack(name: str, one: Attack, subjects: Subjects, confirm: Callable[[str], bool]) -> bool:
    """Whether to run an attack: `confirm` is asked where it takes an hour or more."""
    if type(one).cost is Attack.cost:  # no model need be loaded
        return True
    try:
        work, seconds = one.cost(subjects.unlearned)
    except (NotApplicable, torch.OutOfMemoryError):  # it will say so when it runs
        return True
    if not distributed.agree_on(seconds >= HOUR):
        return True
    text = f"{name} takes {work}: {seconds / HOUR:,.1f} hours on this machine for each model."
    return distributed.agree_on(distributed.is_first() and confirm(text))
