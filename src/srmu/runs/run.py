"""One unlearning run: its folder, what it writes, and whether it is already there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from srmu.data.tokens import pad_id
from srmu.data.topics import load_topic
from srmu.engine import distributed, weights
from srmu.engine.activation_cache import digest_tensors, limit_bytes, open_activations
from srmu.engine.files import (
    format_json,
    require_free,
    require_place,
    require_space,
    sha256,
    write_json,
    write_whole,
)
from srmu.engine.loading import build_skeleton, read_config, refuse_quantised, wanted_dtype
from srmu.engine.model import Batch, EditableModel, release_memory
from srmu.engine.progress import Watch, ignore_progress, print_line
from srmu.engine.resume import Checkpoints
from srmu.engine.topic import Topic
from srmu.engine.train import FINISHED, check_precision
from srmu.errors import DivergedError, SrmuError, first_line
from srmu.methods.base import MethodOutcome
from srmu.methods.importance import FLAT
from srmu.runs import record as audit
from srmu.runs.config import Config, load_config
from srmu.runs.meter import free_bytes, standing_bytes
from srmu.runs.model_card import model_card
from srmu.runs.record import DELTA, RECORD

STATE = "state.safetensors"
CARD = "README.md"
CHECKPOINTS = "checkpoint"  # only there while the run is made
LOCK = ".lock"


class Layout(NamedTuple):
    """Where the weights are held: over the processes, or partly out of the device's memory."""

    shard: bool = False
    offload: bool = False


@dataclass(frozen=True)
class Run:
    """The folder of one run: `config.yaml`, `metrics.jsonl`, the delta, the state, the record."""

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """A finished run; SrmuError when the folder is none."""
        folder = Path(folder)
        if not (folder / RECORD).is_file():
            raise SrmuError(f"{folder} is not a finished run: it has no record.json")
        return cls(folder)

    @cached_property
    def config(self) -> Config:
        return load_config(self.folder / "config.yaml")

    @cached_property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / RECORD).read_text())

    @cached_property
    def delta(self) -> dict[str, Tensor]:
        """The changed tensors by checkpoint name; none where the run changed nothing."""
        path = self.folder / DELTA
        return weights.load_delta(path, self.base) if path.exists() else {}

    @cached_property
    def base(self) -> Path:
        """The folder of its model; SrmuError where a file there is not the one it was made from."""
        folder = base_of(self.config)
        known = self.record["base"]["files"]
        for name, file in audit.file_manifest(folder).items():
            if name in known and file["sha256"] != known[name]["sha256"]:
                raise SrmuError(
                    f"{folder}: {name} is not the file that {self.folder} was made from; "
                    f"srmu verify {self.folder} says what differs"
                )
        return folder

    def export(
        self,
        out: str | Path,
        link: bool | None = None,
        watch: Watch = ignore_progress,
        *,
        last_good: bool = False,
    ) -> Path:
        """Write the full checkpoint; `link`: shards that stay as they are become hard links.

        Refuses a run that left no model by itself, and one that diverged, unless its `last_good`
        weights are asked for. The record and a model card come along.
        """
        if why := self.config.method.no_checkpoint:
            raise SrmuError(why)
        if self.record["diverged"] and not last_good:
            raise SrmuError(
                f"{self.folder} diverged: {self.record['stop_reason']}; --last-good exports the "
                "weights before that"
            )
        record = audit.read_record(self.folder / RECORD)
        card = model_card(record)
        record = audit.seal_record(record | {"exported": {CARD: sha256(card.encode())}})
        texts = {CARD: card, weights.EXPORTED: format_json(record)}
        weights.export_checkpoint(self.base, self.delta, Path(out), link, watch, texts)
        return Path(out)


def plan_run(config: Config) -> tuple[Config, dict[str, Any]]:
    """The config with what depends on the model filled in, and what a run would load and write.

    Reads the model's config and tensor index only. SrmuError where the run cannot work.
    """
    folder = base_of(config)
    model_config = read_config(folder)
    refuse_quantised(folder, model_config)
    limit_bytes()  # a mistake there must not wait until the model is loaded
    method = config.method.resolved(model_config)
    known = {field.name for field in fields(method)}
    for name, topic in config.topics.items():  # each topic's own strength must fit the method too
        if unknown := sorted(set(topic.options) - known):
            raise SrmuError(f"topics.{name}.{unknown[0]}: method {method.name} has no such option")
        method.with_options(topic.options)
    device = find_device(config.device)
    settings = {"method": method, "device": device, "train": method.training(config.train)}
    config = config.model_copy(update=settings)
    files = weights.list_shards(folder)
    layers = model_config.num_hidden_layers
    summary = {
        "id": config.id,
        "run": str(run_folder(config)),
        "model": config.model,
        "device": device,
        "layers": layers,
        "layers_loaded": layers if method.depth is None else method.depth,
        "trainable": list(method.trainable),
        "shards": len(set(files.values())),
        "checkpoint_bytes": sum(path.stat().st_size for path in set(files.values())),
        "steps": config.train.max_steps,
    }
    return config, summary


def find_device(name: str) -> str:
    """The device that a name means here; SrmuError when there is no such one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise SrmuError(f"device {name} is not there: {first_line(error)}") from None
    return name


def base_of(config: Config) -> Path:
    """The folder of the config's model."""
    return weights.locate_model(config.model, config.revision)


def run_folder(config: Config) -> Path:
    return Path(config.runs_dir) / f"{config.id}-{config.method.name}"


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer; SrmuError where there is none or it cannot pad."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise SrmuError(
            f"the tokenizer of {folder} cannot be loaded: {first_line(error)}"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # Without files transformers makes an empty one, to which every text is unknown.
        raise SrmuError(f"model folder {folder} has no tokenizer; copy its tokenizer.json there")
    pad_id(tokenizer)
    return tokenizer


def load_topics(config: Config, tokenizer: Any) -> list[Topic]:
    """The topics of a config as batches; SrmuError when there is none, or one that does not do."""
    if not config.topics:
        raise SrmuError("topics: name at least one, with its forget and retain texts")
    topics = [
        load_topic(
            name,
            topic.forget,
            topic.retain,
            tokenizer,
            base=Path(),
            batch_size=config.train.batch_size,
            max_length=topic.max_length,
            retain_max_length=topic.retain_max_length or topic.max_length,
            shuffle=config.train.shuffle,
            padding=config.train.padding,
            seed=config.seed,
            options=topic.options,
            held_out={"forget": topic.forget_held_out, "retain": topic.retain_held_out},
        )
        for name, topic in config.topics.items()
    ]
    config.method.check(topics, config.train)
    return topics


def unlearn(
    config: Config,
    *,
    out: str | Path | None = None,
    shard: bool = False,
    offload: bool = False,
    watch: Watch = ignore_progress,
) -> Run:
    """Unlearn the config's topics; the run's folder holds the result, `out` a full checkpoint.

    The same config on the same data is not run twice. Raises Diverged with the last good weights
    kept in the folder, SrmuError before anything is written for all that can be known before.
    Where a launcher started several processes, each reads a part of every batch, and with `shard`
    also holds but a part of the weights; the first one writes. With `offload` the layers below
    those that change stay out of the device's memory.
    """
    config, _ = plan_run(config)
    check_ranks(config, shard)
    if offload and (shard or config.method.depth is None):
        raise SrmuError(
            "--offload leaves layers below those that change on the disk: it goes with a method of "
            "one layer (srmu, rmu, ...), and without --shard"
        )
    distributed.join_group()
    if out is not None:
        if why := config.method.no_checkpoint:
            raise SrmuError(why)
        require_free(Path(out))
    folder = run_folder(config)
    require_place(folder)
    base = base_of(config)
    tokenizer = load_tokenizer(base)
    topics = load_topics(config, tokenizer)
    data = {topic.name: dict(topic.counts) for topic in topics}
    if distributed.agree_on((folder / RECORD).exists()):
        run = find_finished(folder, data)
    else:
        with hold_folder(folder) if distributed.is_first() else nullcontext():
            try:
                run = train_run(config, folder, base, topics, data, Layout(shard, offload), watch)
            except BaseException:
                written = (folder / RECORD).exists()  # the last thing written
                if (
                    distributed.is_first()
                    and not written
                    and not Checkpoints(folder / CHECKPOINTS).kept()
                ):
                    discard_folder(folder)
                raise
    if out is not None and distributed.is_first():
        run.export(out, watch=watch)
    return run


def check_ranks(config: Config, shard: bool) -> None:
    """SrmuError where the method cannot be spread over the processes that there are."""
    method, count = config.method, distributed.get_size()
    if shard and count == 1:
        raise SrmuError(
            "--shard cuts the weights over several processes, but there is one: start "
            "torchrun --nproc-per-node 2 -m srmu unlearn ... --shard"
        )
    if count == 1:
        return
    if not method.spreads:
        raise SrmuError(
            f"method {method.name} runs in one process, but {count} were started; start it without "
            "the launcher"
        )
    if shard and getattr(method, "lora_rank", 0) > 0:
        raise SrmuError("--shard and method.lora_rank do not go together; leave one out")
    if shard and getattr(method, "stream", "resid_post") != "resid_post":
        # FSDP gathers a layer again for its gradient when that of its output is there
        raise SrmuError(
            f"--shard needs method.stream=resid_post: {method.stream} lies inside a layer"
        )


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a run's folder while it is written; SrmuError where another process does.

    The lock ends with the process that holds it, however that ends.
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
        # before the release: a lock that was waited for would be that of a file without a name
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            folder.rmdir()
            folder.parent.rmdir()


def find_finished(folder: Path, data: Mapping[str, Any]) -> Run:
    """The run that is already there, if it was made from the same texts and model."""
    run = Run.open(folder)
    if run.record["data"] != data:
        raise SrmuError(
            f"{folder} holds a run of this config on other texts; "
            "remove it, or name another runs_dir"
        )
    if run.record["diverged"]:
        raise DivergedError(f"{folder} holds this run, which diverged: {run.record['stop_reason']}")
    _ = run.delta  # refuses a model that has changed since
    return run


def discard_folder(folder: Path) -> None:
    """Remove what a run that failed wrote, and its folders when that leaves them empty."""
    for name in ("config.yaml", "metrics.jsonl", DELTA, STATE):
        (folder / name).unlink(missing_ok=True)


def keep_lines(metrics: Path, steps: int) -> float:
    """Cut a run's metrics to those of its first steps; the seconds that these took."""
    lines = metrics.read_text().splitlines()[:steps] if steps else []
    metrics.write_text("".join(f"{line}\n" for line in lines))
    return float(json.loads(lines[-1])["seconds"]) if lines else 0.0


def train_run(
    config: Config,
    folder: Path,
    base: Path,
    topics: list[Topic],
    data: Any,
    layout: Layout,
    watch: Watch,
) -> Run:
    """Load the model, apply the method, and write the run's folder; the record comes last."""
    method = config.method
    require_memory(config, base, distributed.get_size() if layout.shard else 1)
    before = fresh_peak(config.device)
    model = EditableModel.load(
        base,
        depth=method.depth,
        trainable=method.trainable,
        dtype=config.dtype,
        device="cpu" if layout.shard else config.device,
        offload=layout.offload,
        copy=not layout.shard,
    )
    highest = max(int(b["input_ids"].max()) for t in topics for b in (*t.forget, *t.retain))
    if highest >= model.vocabulary_size:
        raise SrmuError(
            f"{base}: its tokenizer gives token {highest}, but the model knows "
            f"{model.vocabulary_size} tokens; they do not belong together"
        )
    for name, parameter in model.trained.items():
        check_precision(name, parameter.dtype, config.train.weights)
    say = print_line if watch is not ignore_progress else lambda text: None
    # Where the first layer changes, no activation comes twice.
    mode = config.cache if model.fixed or method.depth is not None else "none"
    names = weights.checkpoint_names(base, model.original)  # before training: can it be written?
    if layout.shard:
        # All processes run the same layers at once: none may find what others must compute.
        mode = "none"
        model.shard(config.device)
    model.activations = open_activations(
        mode, cache_key(config, base, model, topics), model.device, say
    )
    if distributed.is_first():
        require_space(folder, sum(t.numel() * t.element_size() for t in model.original.values()))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DELTA).unlink(missing_ok=True)  # of a run that was killed
        write_whole(folder / "config.yaml", config.to_yaml())
    started, clock = datetime.now(UTC), time.monotonic()
    error: DivergedError | None = None
    steps = 0
    outcome = MethodOutcome({})
    checkpoints = Checkpoints(
        folder / CHECKPOINTS,
        config.train.checkpoint_seconds,
        {"run": config.id, "data": data, "base": weights.identify_base(base, method.depth)},
    )
    done = checkpoints.done()
    if len({*distributed.gather_values(done)}) > 1:
        raise SrmuError(f"{folder} must lie on storage that all processes see, but does not")
    if distributed.is_first():
        clock -= keep_lines(folder / "metrics.jsonl", done)
    path = folder / "metrics.jsonl" if distributed.is_first() else Path(os.devnull)
    with path.open("a") as metrics:

        def log(step: int, values: dict[str, float | str]) -> None:
            nonlocal steps
            steps = step + 1
            seconds = round(time.monotonic() - clock, 4)
            metrics.write(json.dumps({"step": step, **values, "seconds": seconds}) + "\n")
            metrics.flush()

        try:
            outcome = method.apply(model, topics, config.train, log, watch, checkpoints)
        except DivergedError as diverged:
            error, outcome = diverged, MethodOutcome({}, str(diverged))
    peak = max(distributed.gather_values(peak_memory(config.device)))
    changed = model.delta()
    still = sorted(set(model.trained) - set(changed))
    # Of a whole model some tensors may stay: bf16 norms near 1 do not move by steps of 1e-5.
    whole = method.depth is None or outcome.stop_reason != FINISHED
    if error is None and still and not (changed and whole):
        checkpoints.clear()  # it would end there again
        what = still[0] if changed else "the model"
        if outcome.stop_reason.startswith(("utility_floor", "kl_budget")):
            raise SrmuError(
                f"nothing is left of {steps} steps ({outcome.stop_reason}): lower "
                "train.learning_rate or train.check_every, or allow more"
            )
        raise SrmuError(
            f"{what} did not change in {steps} steps ({outcome.stop_reason}); raise "
            f"train.learning_rate, or see the options of {method.name}: srmu methods"
        )
    if not distributed.is_first():
        distributed.agree_on(None)  # the first one has written
        if error is not None:
            raise error
        return Run.open(folder)
    if changed:
        meta = {"base_model": config.model, "method": method.name, "run": config.id}
        weights.save_delta(folder / DELTA, base, names, changed, meta)
    tensors = {
        f"{topic}.{name}": tensor.detach().float().cpu().contiguous()
        for topic, state in outcome.states.items()
        for name, tensor in state.tensors.items()
    }
    if tensors:
        save_file(tensors, folder / STATE)
    record = {
        "schema_version": audit.SCHEMA,
        "id": config.id,
        "tool": audit.tool_block(),
        "started": started.isoformat(timespec="seconds"),
        "purpose": config.purpose,
        "method": method.name,
        "paper": method.paper,
        "model": config.model,
        "base": audit.base_block(config.model, config.revision, base, watch),
        "data": data,
        "overlap": {topic.name: shared_pairs(topic) for topic in topics},
        "topics": {name: state.numbers for name, state in outcome.states.items()},
        "seconds": round(time.monotonic() - clock, 3),
        "steps": steps,
        "resumed_at": done,
        "checkpoint_failed": checkpoints.failed,
        "stop_reason": outcome.stop_reason,
        "diverged": error is not None,
        "weights": config.train.weights,
        "flops": dense_flops(model, topics, steps),
        "memory": {"before": before, "peak": peak},
        "activations": {
            "kept": model.activations.kept,
            "found": model.activations.hits,
            "folder": getattr(model.activations, "folder", Path()).name,  # in srmu cache ls
        },
        "changed": sorted(changed),
        "change": audit.change_block(base, folder / DELTA),
        "environment": audit.environment_block(),
        "processes": {"count": distributed.get_size(), "sharded": layout.shard},
        "reproduction": {
            "command": f"srmu unlearn --from-record {RECORD}",
            "config": config.to_dict(),
            "expected": {n: sha256(folder / n) for n in (DELTA,) if (folder / n).exists()},
        },
        "limits": audit.LIMITS,
        "files": {
            name: sha256(folder / name)
            for name in ("config.yaml", "metrics.jsonl", DELTA, STATE)
            if (folder / name).exists()
        },
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(folder / RECORD, audit.seal_record(record))
    checkpoints.clear()
    distributed.agree_on(None)
    if error is not None:
        raise error
    return Run.open(folder)


def require_memory(config: Config, base: Path, parts: int = 1) -> None:
    """SrmuError where what is trained, with its reference and its optimiser, cannot be held.

    In `parts`: over so many processes.
    """
    settings = read_config(base)
    method = config.method
    model = EditableModel(build_skeleton(settings, torch.float32), method.trainable, method.depth)
    trained = sum(p.numel() for p in model.trained.values())
    stored = [t for t in weights.stored_types(base).values() if t.is_floating_point]
    size = (wanted_dtype(settings, config.dtype) or max(stored, key=lambda t: t.itemsize)).itemsize
    needed = sum(standing_bytes(config, trained, size, mapped=config.device == "cpu").values())
    if getattr(method, "lora_rank", 0):  # masters and moments are the adapters'
        needed = trained * size
    needed //= parts
    if needed > (free := free_bytes(config.device)):
        raise SrmuError(
            f"method {method.name} trains {trained:,} numbers: with their originals and the "
            f"optimiser they take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            "srmu unlearn --dry-run says what would help"
        )


def cache_key(
    config: Config, base: Path, model: EditableModel, topics: Sequence[Topic]
) -> dict[str, Any]:
    """What the activations of a run depend on, but for the machine and the libraries."""
    batches = [b for topic in topics for part in (topic.forget, topic.retain) for b in part]
    return {
        "model": config.model,
        "weights": weights.identify_base(base, config.method.depth),
        "settings": sha256(base / "config.json"),
        "data": digest_tensors(
            *(t for b in batches for t in (b["input_ids"], b["attention_mask"]))
        ),
        "fixed_layers": model.fixed,
        "dtype": str(model.module.dtype),
        "attention": model.module.config._attn_implementation,
        "experts": getattr(model.module.config, "_experts_implementation", None),
    }


def fresh_peak(device: str) -> int:
    """Bytes that the device's memory holds for us now, from which its peak is counted anew."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    release_memory()
    with suppress(OSError):  # not Linux
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak_memory(device: str) -> int:
    """The most bytes held since `fresh_peak`: of a GPU what was allocated, else resident memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        fields = dict(
            line.split(":") for line in Path("/proc/self/status").read_text().splitlines()
        )
        return int(fields["VmHWM"].split()[0]) * 1024
    return psutil.Process().memory_info().rss


def run_notes(run: Run) -> list[str]:
    """What a person should know of a run's strength and map, a sentence each."""
    lines = []
    for name, numbers in run.record["topics"].items():
        if "kappa" not in numbers:
            continue
        lines.append(
            f"{name}: coeff {numbers['coeff']:.4g}, kappa {numbers['kappa']:.3g} "
            f"(target norm {numbers['target_norm']:.4g}, "
            f"forget activation norm {numbers['activation_norm']:.4g})"
        )
        if own := numbers.get("anchors"):
            lines.append(
                f"{name}: {own['kept']} texts that the model wrote are anchors; {own['dropped']} "
                "with a token typical of the forget texts were dropped"
            )
        if map_ := numbers.get("importance"):
            lines.append(
                f"{name}: importance map mean {map_['mean']:.2f}, sd {map_['sd']:.2f}, "
                f"Gini {map_['gini']:.2f}, {map_['share_above_half']:.0%} above 0.5"
            )
            if map_["sd"] < FLAT and run.config.method.importance != "uniform":
                lines.append(
                    f"{name}: the map is nearly flat (sd under {FLAT}): it selects nothing"
                )
    return lines


def shared_pairs(topic: Topic) -> float:
    """The share of the forget texts' distinct pairs of neighbouring tokens that retain texts have.

    0 without retain texts. Of tokens, because these are what the run has read.
    """

    def pairs(batches: Sequence[Batch]) -> Tensor:
        found = [torch.zeros(0, dtype=torch.long)]
        for batch in batches:
            ids, real = batch["input_ids"].long(), batch["attention_mask"].bool()
            both = real[:, 1:] & real[:, :-1]
            found.append((ids[:, :-1] * (1 << 31) + ids[:, 1:])[both].unique())
        return torch.cat(found).unique()

    forget, retain = pairs(topic.forget), pairs(topic.retain)
    return float(torch.isin(forget, retain).float().mean()) if len(forget) else 0.0


def dense_flops(model: EditableModel, topics: Sequence[Topic], steps: int) -> float:
    """FLOPs of the steps in products with weight matrices, without attention and what is cached.

    Two a token and weight forward, in the layers that change also two for each of the gradients of
    inputs and of weights, and two for the frozen pass of the retain texts.
    """
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
    moving = sum(sizes[model.fixed :])
    total = 0.0
    for role, passes in (("forget", 6), ("retain", 8)):
        tokens = [b["input_ids"].numel() for t in topics for b in getattr(t, role)]
        mean = sum(tokens) / max(1, len(tokens))
        total += steps * mean * (2 * sum(sizes[: model.fixed]) + passes * moving)
    return total
