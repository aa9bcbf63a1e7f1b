"""Attack a run: what comes back, beside the same attacks on the original and the oracle."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from srmu.attacks import ATTACKS, TIERS, Attack
from srmu.attacks.base import AttackResult, Exam, Setting, Texts, Tier
from srmu.attacks.summary import measure_leakage, merge_report, summarise_attacks
from srmu.data.sources import Source, read_texts
from srmu.engine import distributed, weights
from srmu.engine.cache import find_cached, keep_cached
from srmu.engine.files import sha256
from srmu.engine.loading import read_config
from srmu.engine.progress import Watch, choose_progress
from srmu.errors import SrmuError, first_line, suggest_word
from srmu.evals.lm_eval import load_questions
from srmu.evals.results import load_results
from srmu.evals.score import tasks_beside
from srmu.evals.statistics import LEAST, Estimate
from srmu.evals.subject import NotApplicable, Question, Subject
from srmu.runs.config import Config
from srmu.runs.open import OpenedModel
from srmu.runs.plan import find_device, load_tokenizer
from srmu.runs.run import Run

Confirm = Callable[[str], bool]


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
    limit: int = 400  # questions of each task and half, drawn by the seed


def attack_run(
    run: Run,
    *,
    tier: Tier = "smoke",
    names: Sequence[str] = (),
    sources: Sources = Sources(),
    seed: int = 0,
    device: str = "auto",
    confirm: Confirm = lambda text: True,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Attack a run with those of a tier, or of `names`; merge the report into its results.

    Each runs on the original and on the oracle too, if there is one. What was found is kept in the
    cache folder, so that an interrupted suite goes on. `confirm` is asked about each attack that
    takes hours. SrmuError for what cannot be used.
    """
    watch = watch or choose_progress()
    chosen = select_attacks(tier, names)
    load_results(run.folder)  # what is wrong with them must show before the work
    sources = fill_sources(sources, run.config, run.base)
    exam = load_exam(sources, run.config, seed)
    own = read_run_texts(run.config)
    texts = load_texts(sources, own)
    subjects = Subjects(run, run.base, sources.oracle, find_device(device))
    for name, one in list(chosen.items()):
        cost = estimate_cost(one, subjects)
        if cost and not distributed.agree_on(distributed.is_first() and confirm(f"{name}: {cost}")):
            del chosen[name]
    given = sha256(repr((exam, texts, seed)).encode())
    found: dict[str, dict[str, AttackResult | str]] = {name: {} for name in chosen}
    seconds = dict.fromkeys(chosen, 0.0)
    prints = subjects.prints()
    pairs = [*product(prints, chosen)]
    with watch("attacking", len(pairs) // distributed.get_size()) as tick:

        def attack_one(pair: tuple[str, str]) -> tuple[AttackResult | str, float]:
            who, name = pair
            one = chosen[name]
            key = [prints[who], repr(one), given, code_of(one)]
            started = time.monotonic()
            result: AttackResult | str
            if kept := find_cached("attacks", key):
                result = parse_result(kept)
            else:
                result = try_attack(one, subjects.named(who), texts, exam, seed)
                if isinstance(result, AttackResult):
                    keep_cached("attacks", key, asdict(result))
            tick(f"{name}, {who}")
            return result, time.monotonic() - started

        for (who, name), (result, took) in zip(pairs, distributed.share_work(pairs, attack_one), strict=True):
            found[name][who] = result
            seconds[name] += took
    report = summarise_attacks(run, chosen, found, exam, tier, seed, sources)
    for name, entry in report["attacks"].items():
        entry |= {"seconds": round(seconds[name], 3), "definition": code_of(chosen[name])[0]}
    return merge_report(run.folder, report, [*ATTACKS], measure_leakage(exam, own))


def select_attacks(tier: Tier, names: Sequence[str]) -> dict[str, Attack]:
    """The attacks to run, always with the questions as they are and the utility."""
    if tier not in TIERS:
        raise SrmuError(f"tier {tier!r} does not exist; choose one of {', '.join(TIERS)}")
    known = {attack.id.lower(): name for name, attack in ATTACKS.items()}
    wanted = []
    for name in names:
        if known.get(name.lower(), name) not in ATTACKS:
            raise SrmuError(f"attack {name!r} does not exist{suggest_word(name, ATTACKS)}")
        wanted.append(known.get(name.lower(), name))
    return {
        name: attack.at_tier(tier)
        for name, attack in ATTACKS.items()
        if name in ("forced_choice", "utility", *wanted)
        or (not names and TIERS.index(attack.tier) <= TIERS.index(tier))
    }


def fill_sources(sources: Sources, config: Config, base: Path) -> Sources:
    """What was not given, from the testbed around the model or from the run's own config."""
    home = base.parent
    testbed = (home / "organism.json").exists()

    def of_testbed(name: str) -> str:
        return str(home / name) if testbed and (home / name).exists() else ""

    tasks = sources.tasks or (("organism_hazard",) if testbed else ())
    if not tasks:
        raise SrmuError("--tasks: name the lm-eval tasks that ask for what is to be forgotten")
    return replace(
        sources,
        tasks=tasks,
        val=sources.val or ",".join(f"{task}_val" for task in tasks),
        utility=sources.utility or tuple(task for task in config.eval if task not in tasks),
        tasks_dir=sources.tasks_dir or str(config.tasks_dir or tasks_beside(base) or ""),
        neutral=sources.neutral or of_testbed("retain-low.jsonl"),
        holdout=sources.holdout or of_testbed("holdout.jsonl"),
        oracle=sources.oracle or of_testbed("oracle"),
    )


def load_exam(sources: Sources, config: Config, seed: int) -> Exam:
    """The questions in two halves that share no fact; SrmuError where they cannot be halved."""
    folder = Path(sources.tasks_dir) if sources.tasks_dir else None

    def asked(task: str) -> list[Question]:
        found = []
        for i, (prompt, options, gold, row) in enumerate(load_questions(task, folder)):
            about = {key: row.get(key) for key in ("fact", "subject", "paraphrases")}
            found.append(
                Question(
                    prompt,
                    tuple(options),
                    gold,
                    f"{about['fact'] or f'{task} {i}'}",
                    tuple(about["paraphrases"] or ()),
                    # of MMLU's rows the subject is a school subject
                    str(about["subject"]) if about["fact"] and about["subject"] else "",
                )
            )
        return found

    def some(all_of_it: list[Question]) -> tuple[Question, ...]:
        names = sorted({q.fact for q in all_of_it})
        random.Random(f"{seed} questions").shuffle(names)
        order = {name: i for i, name in enumerate(names)}
        most = sorted(all_of_it, key=lambda q: order[q.fact])[: sources.limit]
        picked = {id(q) for q in most}
        return tuple(q for q in all_of_it if id(q) in picked)

    test = [question for task in sources.tasks for question in asked(task)]
    if sources.val == "split":
        names = sorted({q.fact for q in test})
        half = set(random.Random(f"{seed} halves").sample(names, len(names) // 2))
        val = [q for q in test if q.fact in half]
        test = [q for q in test if q.fact not in half]
    else:
        try:
            val = [question for task in sources.val.split(",") for question in asked(task)]
        except SrmuError as error:
            raise SrmuError(
                f"no validation half: {error}; name its tasks with --val, or --val split to take half of the questions"
            ) from error
    if both := sorted({q.fact for q in val} & {q.fact for q in test}):
        raise SrmuError(f"{len(both)} facts are asked for in both halves, the tasks and their --val")
    for part, option in ((test, "--tasks"), (val, "--val")):
        if (count := len({q.fact for q in some(part)})) < LEAST:
            under = f" under --limit {sources.limit}" if sources.limit < len(part) else ""
            raise SrmuError(
                f"{option} ask for {count} facts{under}, too few for an interval: {LEAST} or more "
                "in each half; name more tasks, or raise --limit"
            )
    return Exam(some(test), some(val), {task: some(asked(task)) for task in sources.utility})


def read_run_texts(config: Config) -> dict[str, list[str]]:
    """The run's texts of all topics, by role."""
    return {
        role: [t for topic in config.topics.values() for t in read_texts(getattr(topic, role))]
        for role in ("forget", "retain")
    }


def load_texts(sources: Sources, own: Mapping[str, Sequence[str]]) -> Texts:
    """The run's forget texts, and neutral ones: its retain texts where no others are named."""

    def of(name: str) -> list[str]:
        return read_texts([Source(path=name)]) if name else []

    neutral = of(sources.neutral) or own["retain"]
    if not neutral:
        raise SrmuError("--neutral: name a file of texts that are far from the forget knowledge")
    return Texts(tuple(own["forget"]), tuple(neutral), tuple(of(sources.holdout)))


class Subjects:
    """The models of a suite, each loaded when it is first needed."""

    def __init__(self, run: Run, base: Path, oracle: str, device: str) -> None:
        self.run, self.base, self.device = run, base, device
        self.oracle_folder = weights.locate_model(oracle) if oracle else None
        if self.oracle_folder:
            read_config(self.oracle_folder)  # before anything is loaded: is it a model?
        self.tokenizer = load_tokenizer(base)

    def prints(self) -> dict[str, list[str]]:
        """By name: the weights that its attacks may read."""
        original = weights.fingerprint_model(self.base)
        others = [original]
        if self.oracle_folder:
            others.append(weights.fingerprint_model(self.oracle_folder))
        run = [weights.changed_fingerprint(original, self.run.delta), self.run.config.id]
        found = {"original": ["original", *others]}
        if self.oracle_folder:
            found["oracle"] = ["oracle", *others]
        return found | {"unlearned": ["unlearned", *others, *run]}

    def named(self, who: str) -> Subject:
        subject = getattr(self, who)
        assert isinstance(subject, Subject)
        return subject

    def module(self, folder: Path) -> Any:
        return OpenedModel(folder, None, self.device).module

    @cached_property
    def original(self) -> Subject:
        return Subject(self.module(self.base), self.tokenizer, oracle=self.oracle)

    @cached_property
    def oracle(self) -> Subject | None:
        if self.oracle_folder is None:
            return None
        tokenizer = load_tokenizer(self.oracle_folder)
        return Subject(self.module(self.oracle_folder), tokenizer, self.before)

    @cached_property
    def unlearned(self) -> Subject:
        method = self.run.config.method
        # for good, as this module is nothing else; forgotten, the context would end by itself
        self.inference = OpenedModel(self.base, self.run, self.device).after()
        module = self.inference.__enter__()
        changed = {
            name: self.before[name]
            for name, parameter in module.named_parameters()
            if not parameter.equal(self.before[name])
        }
        return Subject(module, self.tokenizer, changed, self.oracle, fixed=method.no_checkpoint)

    @cached_property
    def before(self) -> dict[str, torch.Tensor]:
        """The original's parameters, in memory of their own: the checkpoint's file, mapped."""
        return {name: p.data for name, p in self.module(self.base).named_parameters()}


def try_attack(one: Attack, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult | str:
    """What an attack found, or why it did not: that it does not apply, or failed."""
    try:
        return one.run(model, texts, exam, seed)
    except NotApplicable as reason:
        return f"does not apply: {reason}"
    except (SrmuError, torch.OutOfMemoryError) as error:
        return f"failed: {first_line(error)}"


def estimate_cost(one: Attack, subjects: Subjects) -> str:
    """What an attack that takes long says that it takes; "" of any other."""
    if type(one).cost is Attack.cost:  # then no model need be loaded
        return ""
    try:
        return one.cost(subjects.unlearned)
    except (NotApplicable, torch.OutOfMemoryError):  # it will say so when it runs
        return ""


def code_of(one: Attack) -> list[str]:
    """What decides a result besides an attack's fields: its code, that of its helpers, torch."""
    module = sys.modules[type(one).__module__]
    homes = {getattr(value, "__module__", "") or "" for value in vars(module).values()}
    names = sorted(
        name for name in {*homes, module.__name__} if name.startswith(("srmu.attacks.", "srmu.engine.", "srmu.evals."))
    )
    files = [Path(str(sys.modules[name].__file__)) for name in names]
    return [sha256(*files), version("torch"), version("transformers")]


def parse_result(kept: Mapping[str, Any]) -> AttackResult:
    """A result from the JSON of its fields."""
    ways = tuple(Setting(w["setting"], tuple(w["val"]), tuple(w["test"])) for w in kept["ways"])
    metrics = {name: Estimate(**values) for name, values in kept["metrics"].items()}
    return AttackResult(ways, metrics, kept["budget"])
