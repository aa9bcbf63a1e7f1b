"""What an automatic search measures runs by, and the studies that it makes of them.

It asks questions or reads held-out texts: one half to choose on, one half to report. Forgetting is
the share of what the model knew above chance that it no longer answers, (A0 - Au) / (A0 - chance);
the utility loss is the mean fall of accuracy, A0 - Au, over what is to be kept. Of texts, the
accuracy is that of the next token, and chance 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optuna
import torch

from srmu.attacks.suite import Sources, load_exam
from srmu.data.digest import digest_texts
from srmu.data.tokens import batch_rows, tokenise_texts
from srmu.data.topics import split_held_out
from srmu.engine.loading import read_config
from srmu.engine.losses import is_predicted, token_nll
from srmu.engine.progress import Watch
from srmu.engine.train import move_batch
from srmu.errors import SrmuError
from srmu.evals.layer_sweep import candidate_layers
from srmu.evals.results import Metrics, merge_results, metric_rows, number_facts, read_metrics, write_answers
from srmu.evals.statistics import KNOWN, LEAST, Array, Draws, estimate_from
from srmu.evals.subject import Question, Subject, list_facts, mark_answers
from srmu.methods import Misdirection
from srmu.runs.config import Config
from srmu.runs.open import open_target
from srmu.runs.plan import locate_base
from srmu.runs.run import Run, unlearn_config
from srmu.search import space
from srmu.search.queue import FILE, is_ended, open_study, trial_entry, work_queue

Half = Literal["val", "test"]
HALVES: tuple[Half, Half] = ("val", "test")
NOTHING = 0.05  # accuracy above chance below which a model knows nothing
HELD = 10  # one text in so many is held out for each half
LAYERS = 8  # that a scan tries at most
MARGIN = 0.5  # of the budget that trials may lose: the best of many flatters itself
NOISE = 0.05  # less forgetting than this counts as none
KEYS = (
    "method.layer", "method.kappa", "method.alpha", "method.anchors", "method.hold", "method.keep",
    "method.retain", "method.noise", "train.learning_rate",
)  # fmt: skip
TESTBED = ("organism_hazard",), ("organism_neighbour", "organism_general")


class MarkedAnswers(NamedTuple):
    """Right answers (0 or 1), and what each is about: those of one fact are resampled together."""

    right: Sequence[float]
    about: Sequence[Hashable]
    nats: float | None = None  # of texts: the mean cost of a token


@dataclass(frozen=True)
class TaskYardstick:
    """Questions with options; a half has those of half of the facts."""

    halves: Mapping[Half, tuple[Question, ...]]

    @property
    def chance(self) -> float:
        return float(np.mean([1 / len(q.options) for q in self.halves["test"]]))

    @property
    def words(self) -> list[str]:
        """All that they say, for a digest."""
        return [repr(question) for half in self.halves.values() for question in half]

    @property
    def read(self) -> list[str]:
        """What a model reads of a half."""
        return [text for q in self.halves["val"] for text in (q.prompt, *q.options)]

    def take(self, model: Subject, half: Half) -> MarkedAnswers:
        asked = self.halves[half]
        return MarkedAnswers(mark_answers(model, asked), list_facts(asked))


@dataclass(frozen=True)
class TextYardstick:
    """Texts that no run was trained on."""

    halves: Mapping[Half, tuple[str, ...]]
    max_length: int
    chance = 0.0

    @property
    def words(self) -> list[str]:
        return [text for half in self.halves.values() for text in half]

    @property
    def read(self) -> list[str]:
        return [*self.halves["val"]]

    @torch.no_grad()
    def take(self, model: Subject, half: Half) -> MarkedAnswers:
        """Each next token is an answer about its text."""
        right: list[float] = []
        about: list[Hashable] = []
        nats = 0.0
        rows = tokenise_texts(self.halves[half], model.tokenizer, self.max_length)
        for batch in batch_rows(rows, model.tokenizer, 8, "mask"):
            batch = move_batch(batch, model.device)
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
            logits = model.module(**inputs, use_cache=False).logits
            mask = is_predicted(batch["labels"])
            hits = (logits[:, :-1].argmax(dim=-1) == batch["labels"][:, 1:])[mask]
            first = len(set(about))
            about += (mask.nonzero()[:, 0] + first).tolist()
            right += hits.float().tolist()
            nats += float(token_nll(logits, batch["labels"]).sum())
        return MarkedAnswers(right, about, nats / max(1, len(right)))


@dataclass(frozen=True)
class Yardstick:
    """What is to be forgotten and what is to be kept, by the name of their metric, NAME/acc."""

    forget: Mapping[str, TaskYardstick | TextYardstick]
    utility: Mapping[str, TaskYardstick | TextYardstick]
    seed: int = 0
    device: str = "auto"
    before: dict[Half, dict[str, MarkedAnswers]] = field(default_factory=dict, compare=False)

    @property
    def kind(self) -> str:
        parts = self.forget.values()
        return "texts" if any(isinstance(part, TextYardstick) for part in parts) else "tasks"

    @property
    def parts(self) -> dict[str, TaskYardstick | TextYardstick]:
        return {**self.forget, **self.utility}

    @property
    def digest(self) -> str:
        return digest_texts(word for part in self.parts.values() for word in part.words)

    def tokens(self, tokenizer: Any) -> int:
        """How many tokens a model reads to be measured on a half."""
        parts = self.parts.values()
        return sum(len(ids) for part in parts for ids in tokenizer([*part.read])["input_ids"])

    def metrics(self, half: Half) -> dict[str, str]:
        """The metric of each part in a half."""
        return {name: f"{name}{'_val' * (half == 'val')}/acc" for name in self.parts}

    def score(self, run: Run, half: Half = "val") -> dict[str, Metrics]:
        """As `srmu.score_model`: accuracies before and after a run, kept in its folder."""
        wanted = self.metrics(half).values()
        found = read_metrics(run.folder)
        if not all(metric in results for results in found.values() for metric in wanted):
            self.take(run, half)
            found = read_metrics(run.folder)
        return {when: {metric: results[metric] for metric in wanted} for when, results in found.items()}

    def outcome(self, scores: Mapping[str, Metrics], half: Half = "val") -> dict[str, float]:
        """Forgetting and utility loss (0-1), from what `score` gave.

        SrmuError where the original model answers no more than a guess would.
        """
        means = {
            name: np.array([scores[when][metric]["value"] for when in ("before", "after")])
            for name, metric in self.metrics(half).items()
        }
        for name, part in self.forget.items():
            if means[name][0] - part.chance < NOTHING:
                raise SrmuError(
                    f"the model gets {means[name][0]:.0%} of {name} right, where a guess gets "
                    f"{part.chance:.0%}: it knows nothing of this that it could forget"
                )
        forgetting, utility_loss = self.falls(means)
        return {"forgetting": float(forgetting), "utility_loss": float(utility_loss)}

    def falls(self, means: Mapping[str, Array]) -> tuple[Array, Array]:
        """Forgetting and utility loss of accuracies (..., 2), before and after, by part."""
        gone = [
            (means[name][..., 0] - means[name][..., 1]) / np.maximum(means[name][..., 0] - part.chance, KNOWN)
            for name, part in self.forget.items()
        ]
        lost = [means[name][..., 0] - means[name][..., 1] for name in self.utility]
        return np.mean(gone, axis=0), np.mean(lost, axis=0)

    def estimates(self, run: Run, half: Half) -> dict[str, Any]:
        """Forgetting, utility loss, and each part before and after, with 95 % intervals."""
        taken = self.take(run, half)
        draws = Draws(self.seed)
        means, sizes = {}, {}
        for name in self.parts:
            before, after = taken["before"][name], taken["after"][name]
            table = np.stack([before.right, after.right], axis=1)
            means[name] = draws.means(table, [(name, about) for about in before.about])
            sizes[name] = len(set(before.about))
        gone, lost = self.falls(means)

        def entry(values: Array, names: Sequence[str]) -> dict[str, float]:
            return asdict(estimate_from(values, min(sizes[name] for name in names)))

        parts = {
            name: {
                when: entry(values[:, i], [name]) | ({} if (nats := taken[when][name].nats) is None else {"nats": nats})
                for i, when in enumerate(("before", "after"))
            }
            for name, values in means.items()
        }
        return {"forgetting": entry(gone, [*self.forget]), "utility_loss": entry(lost, [*self.utility]), "parts": parts}

    def take(self, run: Run, half: Half) -> dict[str, dict[str, MarkedAnswers]]:
        """Every part, of the model before the run and after it; writes the accuracies, too."""
        opened = open_target(run, self.device)
        model = Subject(opened.module, opened.tokenizer)

        def all_parts() -> dict[str, MarkedAnswers]:
            return {name: part.take(model, half) for name, part in self.parts.items()}

        if half not in self.before:  # the same for all runs
            self.before[half] = all_parts()
        with opened.after():
            taken = {"before": self.before[half], "after": all_parts()}
        names = self.metrics(half)
        merge_results(
            run.folder,
            [row for when, answers in taken.items() for row in metric_rows(answer_metrics(answers, names), when)],
        )
        return taken


def answer_metrics(taken: Mapping[str, MarkedAnswers], metrics: Mapping[str, str]) -> Metrics:
    """Answers as metrics by name; `n` counts questions, or texts."""
    found: Metrics = {}
    for name, part in taken.items():
        value = float(np.mean(part.right))
        n = len(part.right) if part.nats is None else len(set(part.about))
        found[metrics[name]] = {"value": value, "stderr": (value * (1 - value) / n) ** 0.5, "n": n}
        if part.nats is None:
            answers = {"answers": write_answers(part.right), "facts": number_facts(part.about)}
            found[metrics[name]] |= answers
        else:
            found[metrics[name].replace("/acc", "/nats")] = {"value": part.nats, "n": n}
    return found


def of_tasks(sources: Sources, config: Config, seed: int) -> TaskYardstick:
    """The questions of the sources' tasks, in the halves that attacks take them in."""
    exam = load_exam(replace(sources, utility=()), config, seed)
    return TaskYardstick({"val": exam.val, "test": exam.test})


def halve_tasks(tasks: Sequence[str], folder: Path | None) -> str:
    """Where the half to choose on comes from: tasks TASK_val beside the others, or a split."""
    names = [f"{task}_val" for task in tasks]
    there = all(folder and any(folder.rglob(f"{name}.yaml")) for name in names)
    return ",".join(names) if there else "split"


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


Entry = dict[str, Any]  # a trial, as `auto.json` has it
Setting = Mapping[str, Any]  # values of dotted keys of a config


@dataclass(frozen=True)
class Bench:
    """What all trials of an automatic search share."""

    config: Config
    yardstick: Yardstick
    out: Path
    limit: float  # of the utility loss on the half to choose on
    spec: Mapping[str, Any]  # of the studies: what their trials have in common


def try_config(bench: Bench, config: Config) -> Entry:
    """A run, made where it is missing, and what it does on the half to choose on."""
    run = unlearn_config(config)
    values = {key: space.config_value(run.config, key) for key in KEYS}
    return {
        "state": "complete",
        "params": {key: value for key, value in values.items() if value is not None},
        "values": bench.yardstick.outcome(bench.yardstick.score(run)),
        "runs": [str(run.folder.relative_to(bench.out.resolve()))],
        "seconds": run.record["seconds"],
        "why": "",
    }


def search_configs(
    bench: Bench, name: str, settings: Sequence[Setting], watch: Watch, label: str = "trials"
) -> list[Entry]:
    """A study of the config with each of the settings; for `{}` the sampler finds a strength.

    The trials of an earlier search are among them. Settings that are given keep their order.
    """

    def objective(trial: optuna.Trial) -> float:
        given = study.user_attrs["queue"][trial.user_attrs["point"]]
        values = given or space.suggest_strength(bench.config, trial)
        measured = try_config(bench, space.with_values(bench.config, values))
        trial.set_user_attr("measured", measured)
        return trial_worth(measured["values"], bench.limit)

    sampler = space.strength_sampler(bench.config, bench.yardstick.seed)
    study = open_study(
        bench.out / FILE, name, spec=bench.spec, directions=["maximize"], sampler=sampler,
        queue=settings,
    )  # fmt: skip
    work_queue(study, objective, watch, label=label, in_turn=True)
    ended = [trial for trial in study.get_trials(deepcopy=False) if is_ended(trial)]
    if any(settings):
        ended.sort(key=lambda trial: trial.user_attrs["point"])
    return [
        trial_entry(trial) | {"number": i, "state": "failed" if "why" in trial.user_attrs else "complete"}
        for i, trial in enumerate(ended)
    ]


def scan_layers(bench: Bench, watch: Watch) -> tuple[Config, dict[str, Any]]:
    """The config at the layer that forgets most for what it costs, and what each layer did."""
    config = space.with_values(bench.config, space.start_strength(bench.config))
    assert isinstance(config.method, Misdirection)
    layers = candidate_layers(config.method, read_config(locate_base(config)), LAYERS)
    settings = [{"method.layer": layer} for layer in layers]
    trials = search_configs(replace(bench, config=config), "layers", settings, watch, "layers")
    rows = [{"layer": t["params"]["method.layer"], **t["values"]} for t in trials if t["values"]]
    if not rows:
        name = config.method.name
        raise SrmuError(f"every layer of {name} diverged; lower train.learning_rate")
    best = max(rows, key=lambda row: trial_worth(row, bench.limit))["layer"]
    return space.with_values(config, {"method.layer": best}), {"layers": rows, "best": best}


def trial_worth(values: Mapping[str, float], limit: float) -> float:
    """What a search maximises: forgetting, beyond the limit in proportion less.

    As if half the change cost half as much and did half: what costs twice the limit counts half.
    """
    return values["forgetting"] * limit / max(values["utility_loss"], limit)


def has_forgotten(trial: Entry) -> bool:
    return bool(trial["values"]) and trial["values"]["forgetting"] >= NOISE


def best_entry(trials: Sequence[Entry], limit: float) -> Entry | None:
    """Of the trials within the limit the one that forgets most; of equals, that which costs less.

    None where none forgets more than noise.
    """
    within = [t for t in trials if has_forgotten(t) and t["values"]["utility_loss"] <= limit]
    return max(
        within, key=lambda trial: (trial["values"]["forgetting"], -trial["values"]["utility_loss"]), default=None
    )


def cheapest_entry(trials: Sequence[Entry]) -> Entry | None:
    """The trial that forgets at the least cost."""
    forgetting = filter(has_forgotten, trials)
    return min(forgetting, key=lambda trial: trial["values"]["utility_loss"], default=None)
