"""What an automatic search measures runs by, and the studies that it makes of them.

It asks questions or reads held-out texts: one half to choose on, one half to report. Forgetting is the share of what
the model knew above chance that it no longer answers, (A0 - Au) / (A0 - chance); the utility loss is the mean fall of
accuracy, A0 - Au, over what is to be kept. Of texts, the accuracy is that of the next token, and chance 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optuna
import torch

from srmu.attacks.base import Tier
from srmu.attacks.suite import Sources
from srmu.data.digest import digest_texts
from srmu.data.topics import split_held_out
from srmu.engine import weights
from srmu.engine.loading import read_config
from srmu.engine.progress import Watch
from srmu.errors import SrmuError
from srmu.evals.analyses import candidate_layers
from srmu.evals.results import merge_results, metric_rows, number_facts, write_answers
from srmu.evals.statistics import KNOWN, LEAST, Draws, estimate_from
from srmu.evals.subject import LENGTH, Question, Subject, list_facts, mark_answers
from srmu.methods import Misdirection
from srmu.runs.config import Config
from srmu.runs.run import Run, open_target, unlearn_config
from srmu.search import queue, space

Half = Literal["val", "test"]
HALVES: tuple[Half, Half] = ("val", "test")
WHEN = ("before", "after")
NOTHING = 0.05  # accuracy above chance below which a model knows nothing
HELD = 10  # one text in so many is held out for each half
LAYERS = 8  # that a scan tries at most
MARGIN = 0.5  # of the budget that trials may lose: the best of many flatters itself
NOISE = 0.05  # less forgetting than this counts as none
OPTIONS = ("layer", "kappa", "alpha", "anchors", "hold", "keep", "retain", "noise")  # of the method, to be shown


class MarkedAnswers(NamedTuple):
    """Right answers (0 or 1), and what each is about: those of one fact are resampled together."""

    right: Sequence[float]
    about: Sequence[Hashable]


@dataclass(frozen=True)
class TaskYardstick:
    """Questions with options; a half has those of half of the facts."""

    halves: Mapping[Half, tuple[Question, ...]]

    @property
    def chance(self) -> float:
        return float(np.mean([1 / len(q.options) for q in self.halves["test"]]))

    def take(self, model: Subject, half: Half) -> MarkedAnswers:
        asked = self.halves[half]
        return MarkedAnswers(mark_answers(model, asked), list_facts(asked))


@dataclass(frozen=True)
class TextYardstick:
    """Texts that no run was trained on."""

    halves: Mapping[Half, tuple[str, ...]]
    chance = 0.0

    @torch.no_grad()
    def take(self, model: Subject, half: Half) -> MarkedAnswers:
        """Each next token is an answer about its text."""
        right: list[float] = []
        about: list[str] = []
        for text in self.halves[half]:
            ids = torch.tensor(model.tokens(text)[:LENGTH], device=model.device)
            logits = model.module(ids[None], use_cache=False).logits[0, :-1]
            right += (logits.argmax(dim=-1) == ids[1:]).float().tolist()
            about += [text] * (len(ids) - 1)
        return MarkedAnswers(right, about)


Part = TaskYardstick | TextYardstick


@dataclass(frozen=True)
class Yardstick:
    """What is to be forgotten and what is to be kept, by the name of their metric, NAME/acc."""

    forget: Mapping[str, Part]
    utility: Mapping[str, Part]
    seed: int = 0
    device: str = "auto"
    before: dict[Half, dict[str, MarkedAnswers]] = field(default_factory=dict, compare=False)

    @property
    def parts(self) -> dict[str, Part]:
        return {**self.forget, **self.utility}

    def count_tokens(self, tokenizer: Any) -> int:
        """How many tokens a model reads to be measured on a half."""
        asked = [one for part in self.parts.values() for one in part.halves["val"]]
        read = [[one] if isinstance(one, str) else [one.prompt, *one.options] for one in asked]
        return sum(map(len, tokenizer([text for texts in read for text in texts])["input_ids"]))

    def outcome(self, run: Run) -> dict[str, float]:
        """Forgetting and utility loss (0-1) on the half to choose on; SrmuError where the original can only guess."""
        found = self.estimate(run, "val")
        for name, part in self.forget.items():
            known = found["parts"][name]["before"]["value"]
            if known - part.chance < NOTHING:
                raise SrmuError(
                    f"the model gets {known:.0%} of {name} right, where a guess gets "
                    f"{part.chance:.0%}: it knows nothing of this that it could forget"
                )
        return {key: found[key]["value"] for key in ("forgetting", "utility_loss")}

    def estimate(self, run: Run, half: Half) -> dict[str, Any]:
        """Forgetting, utility loss, and each part before and after, with 95 % intervals."""
        before, after = self.take(run, half)
        draws = Draws(self.seed)
        means, sizes = {}, {}
        for name, (right, about) in before.items():
            means[name] = draws.means(np.stack([right, after[name].right], axis=1), [(name, one) for one in about])
            sizes[name] = len(set(about))
        falls = {name: values[:, 0] - values[:, 1] for name, values in means.items()}
        gone = [falls[k] / np.maximum(means[k][:, 0] - part.chance, KNOWN) for k, part in self.forget.items()]
        lost = [falls[name] for name in self.utility]
        return {
            "forgetting": asdict(estimate_from(np.mean(gone, axis=0), min(sizes[name] for name in self.forget))),
            "utility_loss": asdict(estimate_from(np.mean(lost, axis=0), min(sizes[name] for name in self.utility))),
            "parts": {
                name: {when: asdict(estimate_from(values[:, i], sizes[name])) for i, when in enumerate(WHEN)}
                for name, values in means.items()
            },
        }

    def take(self, run: Run, half: Half) -> list[dict[str, MarkedAnswers]]:
        """Every part, of the model before the run and after it; the accuracies are kept in the run's folder."""
        opened = open_target(run, self.device)
        model = Subject(opened.module, opened.tokenizer)
        if half not in self.before:  # the same for all runs
            self.before[half] = {name: part.take(model, half) for name, part in self.parts.items()}
        with opened.after():
            taken = [self.before[half], {name: part.take(model, half) for name, part in self.parts.items()}]
        rows = []
        for when, answers in zip(WHEN, taken, strict=True):
            for name, (right, about) in answers.items():
                entry: dict[str, Any] = {"value": float(np.mean(right)), "n": len(set(about))}
                if isinstance(self.parts[name], TaskYardstick):
                    entry |= {"n": len(right), "answers": write_answers(right), "facts": number_facts(about)}
                rows += metric_rows({f"{name}{'_val' * (half == 'val')}/acc": entry}, when)
        merge_results(run.folder, rows)
        return taken


def hold_out(role: str, texts: Sequence[str]) -> tuple[list[str], dict[Half, tuple[str, ...]]]:
    """Texts to train on, and a tenth for each half: by their digests, so always the same."""
    count = len(set(texts))
    size = max(LEAST, count // HELD)
    if count < 3 * size:
        raise SrmuError(
            f"{count} different {role} texts are too few to hold {2 * size} of them out: "
            f"{3 * LEAST} or more, or name tasks that measure instead (--tasks, --utility)"
        )
    kept, held = split_held_out(texts, 2 * size)
    return kept, {"val": tuple(held[:size]), "test": tuple(held[size:])}


@dataclass(frozen=True)
class AutoRequest:
    """What somebody wants: all that decides the answer, and where it goes."""

    model: str
    forget: tuple[str, ...]
    retain: tuple[str, ...]
    budget: float = 0.01  # the most utility to lose
    tasks: tuple[str, ...] = ()  # ask for what is to be forgotten
    utility: tuple[str, ...] = ()  # ask for what is to be kept
    tasks_dir: Path | None = None
    method: str = "srmu"
    robust: bool = False  # rename_scrub in place of a method with a layer
    names: str = ""  # a file of the names to swap; "": those found
    goals: str = ""  # a file of phrases about which all is to be forgotten
    trials: int = 12
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
    names: Sequence[str]  # that a robust search swaps
    goals: Sequence[str]

    @property
    def limit(self) -> float:
        """What trials may lose of the utility, on the half to choose on."""
        return MARGIN * self.request.budget

    @property
    def layers(self) -> list[int]:
        assert isinstance(self.config.method, Misdirection)
        return candidate_layers(self.config.method, read_config(weights.locate_model(self.config.model)), LAYERS)

    @property
    def tier(self) -> Tier:
        """What the result is attacked with: relearning, too, where that is the point."""
        return "standard" if self.request.robust else "smoke"

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What all trials depend on, without a path or a word of a text."""
        halves = [half for part in self.yardstick.parts.values() for half in part.halves.values()]
        return {
            "model": weights.fingerprint_model(weights.locate_model(self.config.model)),
            "texts": digest_texts([*self.texts["forget"], "", *self.texts["retain"]]),
            "questions": digest_texts(str(one) for half in halves for one in half),
            "method": self.config.method.name,
            "names": digest_texts([*self.names, "", *self.goals]),
            "seed": self.config.seed,
        }

    @property
    def question(self) -> dict[str, Any]:
        """All that the answer depends on."""
        return self.spec | {"budget": self.request.budget, "trials": self.request.trials}


Entry = dict[str, Any]  # a trial, as `auto.json` has it


def try_config(job: AutoJob, config: Config) -> Entry:
    """A run, made where it is missing, and what it does on the half to choose on."""
    run = unlearn_config(config)
    options = {f"method.{name}": getattr(run.config.method, name, None) for name in OPTIONS}
    options["train.learning_rate"] = run.config.train.learning_rate
    return {
        "params": {key: value for key, value in options.items() if value is not None},
        "values": job.yardstick.outcome(run),
        "runs": [run.folder.relative_to(job.request.out.resolve()).as_posix()],
    }


def search_configs(job: AutoJob, name: str, settings: Sequence[Mapping[str, Any]], watch: Watch) -> list[Entry]:
    """A study of the config with each of the settings, values of dotted keys; for `{}` the sampler finds a strength."""

    def objective(trial: optuna.Trial) -> float:
        given = study.user_attrs["queue"][trial.user_attrs["point"]]
        measured = try_config(job, space.with_values(job.config, given or space.suggest_strength(job.config, trial)))
        trial.set_user_attr("measured", measured)
        return trial_worth(measured["values"], job.limit)

    sampler = space.make_sampler(job.config, job.yardstick.seed)
    study = queue.open_study(
        job.request.out / queue.FILE, name, spec=job.spec, directions=["maximize"], sampler=sampler, queue=settings
    )
    queue.work_queue(study, objective, watch, in_turn=True)
    entries = queue.list_trials(study)  # those of an earlier search are among them
    return entries if any(settings) else sorted(entries, key=itemgetter("number"))


def trial_worth(values: Mapping[str, float], limit: float) -> float:
    """What a search maximises: forgetting, beyond the limit in proportion less; at twice the limit it counts half."""
    return values["forgetting"] * limit / max(values["utility_loss"], limit)


def sort_entries(trials: Sequence[Entry]) -> list[Entry]:
    """The trials that forget more than noise, what forgets most first; of equals, what costs less."""
    found = [trial for trial in trials if trial["values"] and trial["values"]["forgetting"] >= NOISE]
    return sorted(found, key=lambda trial: (-trial["values"]["forgetting"], trial["values"]["utility_loss"]))
