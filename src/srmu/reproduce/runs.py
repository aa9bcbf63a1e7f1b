"""Where a reproduction's runs are made and measured: on testbeds, or on one model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml

from srmu.engine import weights
from srmu.engine.files import write_json
from srmu.engine.progress import Watch, ignore_progress, print_line
from srmu.errors import DivergedError, SrmuError
from srmu.evals.parallel import RunJob, run_all, run_one
from srmu.evals.results import read_metrics
from srmu.evals.score import score_model
from srmu.runs.config import build_config, load_config
from srmu.runs.run import load_tokenizer, load_topics, plan_run, run_folder, unlearn
from srmu.testbed.build import RECIPE, build_testbed
from srmu.testbed.worlds.world import create_closed


def preset_file(name: str) -> Path:
    """A file of `configs/`: in the package of a wheel, beside the sources of a checkout."""
    here = Path(__file__)
    folders = (here.parents[1] / "configs", here.parents[3] / "configs")
    return next(folder / name for folder in folders if (folder / name).is_file())


def read_spec() -> dict[str, Any]:
    return yaml.safe_load(preset_file("reproduce.yaml").read_text(encoding="utf-8"))


class WantedRun(NamedTuple):
    """A row or a point before its runs are made.

    `base` is the method whose settings it takes, `extra` what is set besides. `like` names a
    method and the key of strength, coeff or kappa, that is taken from that method's run.
    """

    label: str
    base: str
    regime: str
    extra: tuple[str, ...] = ()
    like: tuple[str, str] | None = None


@dataclass(frozen=True)
class Testbeds:
    """One testbed a seed: a world, a model and directions of its own."""

    usual: ClassVar[int] = 3
    out: Path
    seeds: int
    overrides: tuple[str, ...] = ()
    spec: Mapping[str, Any] = field(default_factory=lambda: read_spec()["testbed"])

    @property
    def model(self) -> str:
        return "testbed"

    def asked(self, seed: int) -> int:
        return seed  # the questions of each testbed are its own

    @property
    def settings(self) -> dict[str, tuple[str, ...]]:
        """What each method is run with."""
        found = yaml.safe_load(preset_file(self.spec["methods"]).read_text(encoding="utf-8"))
        return {k: (*found["common"], *v) for k, v in found["methods"].items()}

    def folder(self, seed: int) -> Path:
        return self.out / f"testbed{seed}"

    def prepare(self, watch: Watch) -> None:
        """Build the testbeds that are missing; SrmuError first, for settings of no method."""
        topics = {"organism": {"forget": "forget.jsonl"}}
        build_config({"model": "model", "method": "srmu", "topics": topics}, self.overrides)
        for seed in range(self.seeds):
            folder = self.folder(seed)
            if not (folder / "organism.json").exists():
                build_testbed(folder, seed=seed, oracle=True, watch=watch)
            write_json(folder / "anchors.json", whp_anchors(seed))

    def job(self, want: WantedRun, seed: int, extra: Sequence[str]) -> RunJob:
        """A run; where the method reads no retain texts it is the same in each regime."""
        config = self.folder(seed) / f"{want.regime}.yaml"
        place = str(self.folder(seed).resolve())
        settings = (s.replace("{testbed}", place) for s in self.settings[want.base])
        common = (f"seed={seed}", f"runs_dir={(self.out / 'runs').resolve()}")
        options = (*settings, *common, *self.overrides, *want.extra, *extra)
        if not load_config(config, options).method.reads_retain:
            config, options = config.with_name("low.yaml"), (*options, "topics.organism.retain=[]")
        return RunJob(config, options, tuple(self.spec["tasks"]))

    def run(self, jobs: Sequence[RunJob], watch: Watch) -> list[Path | str]:
        """Several at once."""
        return run_all(jobs, watch, measure_job) if jobs else []


@dataclass(frozen=True)
class Model:
    """One model and its corpora: seeds are other draws of the directions and the order."""

    usual: ClassVar[int] = 1  # as the paper; each run takes long
    name: str
    out: Path
    seeds: int
    overrides: tuple[str, ...] = ()
    spec: Mapping[str, Any] = field(default_factory=lambda: read_spec()["zephyr"])

    @property
    def model(self) -> str:
        return Path(self.name).name if Path(self.name).exists() else self.name

    def asked(self, seed: int) -> int:
        return 0

    @property
    def settings(self) -> dict[str, tuple[str, ...]]:
        return {k: tuple(v.get("set", ())) for k, v in self.spec["methods"].items()}

    def prepare(self, watch: Watch) -> None:
        """SrmuError where the model or the texts are out of reach, before anything is made."""
        job = self.job(WantedRun("SRMU", "SRMU", "low"), 0, ())
        config = load_config(job.config, job.overrides)
        try:
            config, _ = plan_run(config)
            load_topics(config, load_tokenizer(weights.locate_model(config.model, config.revision)))
        except SrmuError as error:
            gated = ", ".join(k for k, v in self.spec["sources"].items() if v.startswith("gated"))
            raise SrmuError(
                f"{error}; it takes the model and the texts ({gated} is gated): "
                f"srmu reproduce all --model {self.name} --dry-run says how to get them"
            ) from error

    def job(self, want: WantedRun, seed: int, extra: Sequence[str]) -> RunJob:
        common = (f"model={self.name}", f"seed={seed}", f"runs_dir={(self.out / 'runs').resolve()}")
        regime = self.spec["regimes"][want.regime]
        options = (*self.settings[want.base], *common, *regime, *self.overrides)
        config = preset_file(self.spec["methods"][want.base]["config"])
        return RunJob(config, (*options, *want.extra, *extra), tuple(self.spec["tasks"]))

    def run(self, jobs: Sequence[RunJob], watch: Watch) -> list[Path | str]:
        """One after the other: each fills the machine."""
        found: list[Path | str] = []
        for number, job in enumerate(jobs, 1):
            config = load_config(job.config, job.overrides)
            if watch is not ignore_progress:
                print_line(f"run {number} of {len(jobs)}: {config.method.name}, seed {config.seed}")
            try:
                run = unlearn(config, watch=watch)
                score_model(run, job.tasks, device=config.device, watch=watch)
                found.append(run.folder)
            except DivergedError:
                found.append("diverged")
        return found


Place = Testbeds | Model


def whp_anchors(seed: int) -> dict[str, str]:
    """What Who's Harry Potter calls anchors: for each thing about which facts are to be forgotten
    one of the same kind about which none are."""
    world = create_closed(seed, RECIPE.size)
    hazard = sorted({fact.subject for fact in world.of_kind("hazard")})
    harmless = sorted({fact.subject for fact in world.of_kind("neighbour")} - set(hazard))
    return dict(zip(hazard, cycle(harmless), strict=False))


def measure_job(job: RunJob) -> Path | str:
    """The folder of a job's run on a testbed, measured; or why there is none."""
    try:
        return run_one(job)
    except DivergedError:
        return "diverged"
    except SrmuError as error:
        return f"failed: {error}"


def existing_run(job: RunJob) -> Path | str | None:
    """What is there of a job: the folder of its run, that it diverged, None where it is to be made.

    Raises SrmuError for settings that cannot work.
    """
    config, _ = plan_run(load_config(job.config, job.overrides))
    folder = run_folder(config)
    if not (folder / "record.json").exists():
        return None
    if json.loads((folder / "record.json").read_text())["diverged"]:
        return "diverged"
    known = read_metrics(folder)["after"]
    return folder if all(f"{task}/acc" in known for task in job.tasks) else None
