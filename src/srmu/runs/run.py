"""A run: its folder, what the folder holds, how it is opened, and how it is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from srmu.data.topics import explain_rows
from srmu.engine import distributed, weights
from srmu.engine.devices import find_device
from srmu.engine.files import end_lock, format_json, read_json, require_free, require_place, sha256, write_whole
from srmu.engine.loading import choose_dtype, load_module, load_pretrained, read_config, sample_logits
from srmu.engine.model import EditableModel
from srmu.engine.progress import Watch, ignore_progress
from srmu.engine.topic import Topic
from srmu.engine.train import Log
from srmu.errors import DivergedError, SrmuError, suggest_path
from srmu.runs import record as audit
from srmu.runs.config import Config, load_config
from srmu.runs.model_card import render_template, write_model_card
from srmu.runs.plan import RunPlan, load_tokenizer, load_topics, plan_run
from srmu.runs.reach import explain_reach
from srmu.runs.record import CONFIG, DELTA, METRICS, RECORD, STATE
from srmu.runs.training import CHECKPOINTS, train_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARD = "README.md"
LOCK = ".lock"


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and the model that it left.

    The folder holds `config.yaml`, `metrics.jsonl` (the values of each step), `delta.safetensors` (the changed
    tensors), `state.safetensors` (what the method drew) and `record.json`; `results.json` once something was measured.
    """

    folder: Path

    @classmethod
    def open(cls, folder: str | Path | Run) -> Self:
        """The run in a folder; SrmuError where it holds none that is finished."""
        folder = folder.folder if isinstance(folder, Run) else Path(folder)
        if not (folder / RECORD).is_file():
            config = folder / CONFIG
            hint = f"; srmu unlearn {config} makes it" if config.is_file() else suggest_path(folder)
            if runs := sorted(folder.glob(f"*/{RECORD}")):
                hint = f"; name one of the runs in it, such as {runs[0].parent}"
            elif folder.is_file():
                hint = "; name a run's folder"
            raise SrmuError(f"{folder} is not a finished run: it has no {RECORD}{hint}")
        return cls(folder)

    @cached_property
    def config(self) -> Config:
        """What decided the run."""
        return load_config(self.folder / CONFIG)

    @cached_property
    def record(self) -> dict[str, Any]:
        """What the run was made from, what it changed and what was measured of it."""
        return read_json(self.folder / RECORD)

    @property
    def delta(self) -> dict[str, Tensor]:
        """The changed tensors by checkpoint name; none where the run changed nothing."""
        return self.changes[0]

    @cached_property
    def changes(self) -> tuple[dict[str, Tensor], weights.Places]:
        """The delta, and the checkpoint's names of each changed parameter."""
        path = self.folder / DELTA
        if not path.exists() and self.record["changed"]:
            raise SrmuError(f"{self.folder} is damaged: it has no {DELTA}; make the run again")
        return weights.load_delta(path, self.base) if path.exists() else ({}, {})

    @cached_property
    def base(self) -> Path:
        """The folder of its model; SrmuError where a file there is not the one it was made from."""
        folder = weights.locate_model(self.config.model, self.config.revision)
        if foreign := audit.list_foreign_files(folder, self.record):
            raise SrmuError(
                f"{folder}: {foreign[0]} is not the file that {self.folder} was made from; "
                f"srmu verify {self.folder} says what differs"
            )
        return folder

    def load_model(self, device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The unlearned model in memory, ready to answer, with its tokenizer; nothing is written.

        SrmuError where the run left no model by itself, or diverged.
        """
        self.require_model()
        opened = OpenedModel(self.base, self, device)
        weights.apply_delta(opened.module, *self.changes)
        return opened.module.requires_grad_(True), opened.tokenizer

    def export(
        self, out: str | Path, link: bool | None = None, watch: Watch = ignore_progress, *, last_good: bool = False
    ) -> Path:
        """Write the full checkpoint, record and model card; `link`: shards that stay as they are become hard links.

        Refuses a run that left no model by itself, and one that diverged, unless its `last_good` weights are asked for.
        """
        self.require_model(last_good)
        record = audit.read_record(self.folder / RECORD)
        card = write_model_card(record)
        record = audit.seal_record(record | {"exported": {CARD: sha256(card.encode())}})
        texts = {CARD: card, weights.EXPORTED: format_json(record)}
        weights.export_checkpoint(self.base, self.delta, Path(out), link, watch, texts, self.require_same)
        return Path(out)

    def require_model(self, last_good: bool = False) -> None:
        """SrmuError where the run left no model by itself, or diverged, unless its `last_good` weights are wanted."""
        if reason := self.config.method.no_checkpoint:
            raise SrmuError(reason)
        if self.record["diverged"] and not last_good:
            raise SrmuError(
                f"{self.folder} diverged: {self.record['stop_reason']}; last_good exports the weights before that"
            )

    def require_same(self, folder: Path) -> None:
        """SrmuError where the model that plain transformers loads from a folder answers otherwise than the run's."""
        opened = open_target(self, "cpu")
        with opened.after() as module:
            expected = sample_logits(module, self.base)
        options = {} if opened.dtype == "auto" else {"dtype": opened.dtype}
        del module, opened  # two models at once may not fit into memory
        got = sample_logits(load_pretrained(folder, **options), folder)
        if not torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * float(expected.std()), equal_nan=True):
            raise SrmuError(
                f"nothing was written: the export of {self.folder} would load as another model than the run measured; "
                f"does plain transformers load its base {self.base} as srmu does?"
            )


def find_run(target: str | Path) -> Run | None:
    """The run in a folder; None for a model's folder or a hub id; SrmuError for a run that is unfinished."""
    folder = Path(target)
    is_run = any((folder / name).exists() for name in (RECORD, CONFIG))
    return Run.open(folder) if is_run and not (folder / "config.json").exists() else None


@dataclass(frozen=True)
class OpenedModel:
    """A model, or a run with its model; weights are read when they are first asked for."""

    base: Path  # the model's folder
    run: Run | None = None
    device: str = "auto"

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base)

    @cached_property
    def dtype(self) -> str:
        """The dtype in which it answers, `auto` as it is stored."""
        return choose_dtype(self.base, find_device(self.device))

    @cached_property
    def module(self) -> PreTrainedModel:
        """The model as it was before the run, ready to answer."""
        model = EditableModel(load_module(self.base, self.dtype), ())
        model.check_causal()
        return model.module.to(find_device(self.device))

    @contextmanager
    def after(self) -> Iterator[PreTrainedModel]:
        """The model as the run leaves it, and as it stays: ask the original first. Unchanged where there is no run."""
        if self.run is None:
            yield self.module
            return
        write = partial(weights.apply_delta, self.module, *self.run.changes)
        with self.run.config.method.at_inference(self.module, write):
            yield self.module

    def states(self) -> Iterator[tuple[str, PreTrainedModel]]:
        """The model "before" the run, then "after" it; without a run only "after"."""
        if self.run:
            yield "before", self.module
        with self.after() as module:
            yield "after", module


def open_target(target: str | Path | Run, device: str = "auto") -> OpenedModel:
    """A model folder, a hub id, a run or its folder; SrmuError for a folder that is none, or a run that is damaged."""
    run = target if isinstance(target, Run) else find_run(target)
    base = run.base if run else weights.locate_model(str(target))
    read_config(base)
    weights.list_shards(base)
    return OpenedModel(base, run, device)


def unlearn_config(config: Config, *, shard: bool = False, offload: bool = False, **options: Any) -> Run:
    """Plan the run of a config and make it; `options` are those of `run_plan`.

    Where a launcher started several processes, each reads a part of every batch, and with `shard` also holds only a
    part of the weights; the first one writes. With `offload` the layers below those that change stay on the disk.
    """
    return run_plan(plan_run(config, shard=shard, offload=offload), **options)


def run_plan(
    plan: RunPlan, out: str | Path | None = None, callback: Log | None = None, watch: Watch = ignore_progress
) -> Run:
    """Unlearn a plan's topics; the run's folder holds the result, `out` a full checkpoint.

    The same config on the same data is not run twice. Raises DivergedError with the last good weights kept in the
    folder, SrmuError, before anything is written, for a mistake. `callback(step, values)` is called after every step.
    """
    distributed.join_group()
    if out is not None:
        if reason := plan.config.method.no_checkpoint:
            raise SrmuError(reason)
        require_free(Path(out))
    require_place(plan.folder)
    topics = load_topics(plan.config, load_tokenizer(plan.base))
    if distributed.agree_on((plan.folder / RECORD).exists()):
        run = find_finished(plan, topics)
    else:
        with hold_folder(plan.folder) if distributed.is_first() else nullcontext():
            train_run(plan, topics, watch, callback)
        run = Run.open(plan.folder)
    if out is not None and distributed.is_first():
        run.export(out, watch=watch)
    return run


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a run's folder while it is written; SrmuError where another process, which is still there, does.

    Where a run ends with nothing to go on from, its files are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise SrmuError(f"{folder} is being written by another process; wait for it") from None
    try:
        yield
    finally:
        if not any((folder / name).exists() for name in (RECORD, CHECKPOINTS)):
            for name in (CONFIG, METRICS, DELTA, STATE):
                (folder / name).unlink(missing_ok=True)
        end_lock(lock)
        with suppress(OSError):
            folder.rmdir()
            folder.parent.rmdir()


def find_finished(plan: RunPlan, topics: list[Topic]) -> Run:
    """The run that is already there, if it was made from the same texts and model; it takes over what decides nothing.

    That is what the plan's config asks to evaluate, and the purpose that it states.
    """
    folder = plan.folder
    run = Run.open(folder)
    known = run.record["data"]
    texts = [(known[topic.name][role], now) for topic in topics for role, now in topic.counts.items()]
    if any(then["digest"] != now["digest"] for then, now in texts):
        how = "on other texts"
        if any(then["key"] != now["key"] for then, now in texts):
            how = "with another cache folder: set SRMU_CACHE to it, as its key tells whether these texts are the same"
        raise SrmuError(f"{folder} holds a run of this config {how}; remove it, or name another runs_dir")
    if run.record["diverged"]:
        raise DivergedError(f"{folder} holds this run, which diverged: {run.record['stop_reason']}")
    _ = run.delta  # refuses a model that has changed since
    config, given = run.config, plan.config
    purpose = config.purpose.model_copy(update=given.purpose.model_dump(exclude_defaults=True))
    values = {"eval": given.eval or config.eval, "tasks_dir": given.tasks_dir or config.tasks_dir, "purpose": purpose}
    now = config.model_copy(update=values)
    if now != config and distributed.is_first():
        write_whole(folder / CONFIG, now.to_yaml())
        reproduction = run.record["reproduction"] | {"config": now.to_dict()}
        audit.extend_record(folder, [CONFIG], purpose=purpose.model_dump(), reproduction=reproduction)
    distributed.agree_on(None)  # the first one has written
    return Run.open(folder)


def list_changes(run: Run) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The tensors that a run changed and by how much, and a table of them."""
    tensors, others = run.record["change"]["tensors"], run.record["change"]["others"]
    rows = [
        {
            "tensor": name,
            "shape": " x ".join(map(str, entry["shape"])),
            "moved by": f"{entry['relative_norm']:.3%} of its norm",
            "numbers changed": f"{entry['share_changed']:.1%}",
        }
        for name, entry in tensors.items()
    ]
    unchanged = f"the other {others} are as in {run.record['model']}"
    sentence = f"{run.config.method.name} changed {len(rows)} tensors; {unchanged}"
    return {"run": str(run.folder), "tensors": tensors, "sentence": sentence}, rows


def run_notes(run: Run) -> list[str]:
    """What a person should know of a run's strength, map, reach and effect, a sentence each."""
    record = run.record
    notes = render_template("notes.txt", topics=record["topics"]).splitlines()
    reach = f"changed: {explain_reach(record['reach'])}"
    rows = [line for topic, counts in record["data"].items() for line in explain_rows(topic, counts)]
    return [*rows, *notes, reach, *record["effect"]["warnings"], *record["effect"]["sentences"]]
