"""The training of a run, from the model on disk to the files in the run's folder."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from srmu.engine import distributed, weights
from srmu.engine.activation_cache import digest_tensors, open_activations
from srmu.engine.devices import free_bytes, read_peak_memory, reset_peak_memory
from srmu.engine.files import read_json, require_space, sha256, write_json, write_whole
from srmu.engine.loading import build_skeleton
from srmu.engine.losses import is_counted
from srmu.engine.model import EditableModel
from srmu.engine.progress import Watch, ignore_progress, print_line
from srmu.engine.resume import Checkpoints
from srmu.engine.topic import Batch, Topic
from srmu.engine.train import FINISHED, Log, check_precision
from srmu.errors import DivergedError, SrmuError
from srmu.methods.base import MethodOutcome, Session
from srmu.runs import counting, estimate
from srmu.runs import record as audit
from srmu.runs.config import Config
from srmu.runs.effect import measure_effect
from srmu.runs.plan import RunPlan
from srmu.runs.reach import describe_reach
from srmu.runs.record import CONFIG, DELTA, METRICS, STATE

CHECKPOINTS = "checkpoint"  # only there while the run is made


@dataclass
class Progress:
    """How far a training has come and what it has changed, for its record."""

    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    clock: float = field(default_factory=time.monotonic)  # when it would have started in one go
    memory: dict[str, int] = field(default_factory=dict)  # bytes: `before` the training, and at its `peak`
    resumed_at: int = 0
    steps: int = 0
    outcome: MethodOutcome = field(default_factory=lambda: MethodOutcome({}))
    changed: dict[str, Tensor] = field(default_factory=dict)
    effect: dict[str, Any] = field(default_factory=dict)
    error: DivergedError | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.clock

    def log_step(
        self, write: Callable[[dict[str, Any]], object], callback: Log | None, step: int, values: dict[str, float | str]
    ) -> None:
        """Count a step, and hand it to `write` as a line, and to the callback."""
        self.steps = step + 1
        write({"step": step, **values, "seconds": round(self.seconds, 4)})
        if callback is not None:
            callback(step, values)


def train_run(plan: RunPlan, topics: list[Topic], watch: Watch, callback: Log | None = None) -> None:
    """Load the model, apply the method, and write the run's folder, its record last; only then DivergedError."""
    config, folder, first = plan.config, plan.folder, distributed.is_first()
    require_memory(plan)
    before = reset_peak_memory(config.device)
    batches = [batch for topic in topics for batch in (*topic.forget, *topic.retain)]
    data = digest_tensors(*(batch[part] for batch in batches for part in ("input_ids", "attention_mask")))
    model, topics, names = load_model(plan, topics, data, watch)
    if first:
        require_space(folder, sum(t.numel() * t.element_size() for t in model.original.values()))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DELTA).unlink(missing_ok=True)  # of a run that was killed
        write_whole(folder / CONFIG, config.to_yaml())
    progress = resume_run(plan, data)
    with (folder / METRICS if first else Path(os.devnull)).open("a", buffering=1) as metrics:
        log = partial(progress.log_step, lambda line: metrics.write(json.dumps(line) + "\n"), callback)
        session = Session(config.train, log, watch, progress.checkpoints)
        try:
            progress.outcome = config.method.apply(model, topics, session)
        except DivergedError as error:
            progress.error, progress.outcome = error, MethodOutcome({}, str(error))
    progress.memory = {"before": before, "peak": max(distributed.gather_values(read_peak_memory(config.device)))}
    collect_changes(config, model, progress)
    ended = topics if progress.error is None else []
    lines = read_json(folder / METRICS) if first else []
    progress.effect = measure_effect(config, model, ended, progress.outcome.states, lines, watch)
    if first:
        if progress.changed:
            meta = {"base_model": config.model, "method": config.method.name, "run": config.id}
            weights.save_delta(folder / DELTA, plan.base, names, progress.changed, meta)
        if tensors := list_state(progress.outcome):
            save_file(tensors, folder / STATE)
        write_json(folder / audit.RECORD, audit.seal_record(build_record(plan, model, topics, progress, watch)))
        progress.checkpoints.clear()
    distributed.agree_on(None)  # the first one has written
    if progress.error is not None:
        raise progress.error


def load_model(
    plan: RunPlan, topics: list[Topic], data: str, watch: Watch
) -> tuple[EditableModel, list[Topic], dict[str, list[str]]]:
    """The model to train, the topics as they fit it, and the checkpoint's names of what it trains."""
    config, method = plan.config, plan.config.method
    model = EditableModel.load(
        plan.base,
        depth=method.depth,
        trainable=method.trainable,
        dtype=config.dtype,
        device="cpu" if plan.shard else config.device,
        offload=plan.offload,
        copy=not plan.shard,
    )
    topics = fit_topics(config, model, topics, f"{plan.base}: its tokenizer")
    names = weights.checkpoint_names(plan.base, model.original, model.list_aliases())
    if plan.shard:
        model.shard(config.device)
    # What a run's activations depend on, besides the machine and the libraries.
    key = {
        "model": config.model,
        "weights": weights.identify_base(plan.base, method.depth),
        "settings": sha256(plan.base / "config.json"),
        "data": data,
        "fixed_layers": model.fixed,
        "dtype": str(model.module.dtype),
        "attention": model.module.config._attn_implementation,
        "experts": getattr(model.module.config, "_experts_implementation", None),
    }
    say = print_line if watch is not ignore_progress else lambda text: None
    # Where the first layer changes, no activation comes twice. Sharded, all processes run the same
    # layers at once: none may find what others must compute.
    twice = (model.fixed or method.depth is not None) and not plan.shard
    model.activations = open_activations(config.cache if twice else "none", key, model.device, say)
    return model, topics, names


def fit_topics(config: Config, model: EditableModel, topics: list[Topic], tokenizer: str) -> list[Topic]:
    """The topics with padding and random tokens that the model knows.

    SrmuError where it has no row for a token or a position of a text, or a tensor is too coarse to be trained.
    """
    for name, parameter in model.trained.items():
        check_precision(name, parameter.dtype, config.train.weights)
    known, most = model.vocabulary_size, model.position_count

    def fit_batch(batch: Batch) -> Batch:
        ids, read = batch["input_ids"], batch["attention_mask"].bool() | is_counted(batch["labels"])
        if (highest := int(ids[read].max())) >= known:
            raise SrmuError(
                f"{tokenizer} gives token {highest}, but the model knows {known} tokens; they do not belong together"
            )
        return batch if int(ids.max()) < known else batch.replace(input_ids=ids.masked_fill(~read, 0))

    fitted = []
    for topic in topics:
        longest = max(batch["input_ids"].shape[1] for batch in (*topic.forget, *topic.retain))
        if most and longest > most:
            mend = f"set topics.{topic.name}.max_length={most}"
            raise SrmuError(f"topic {topic.name}: a text has {longest} tokens, and the model {most} positions: {mend}")
        forget, retain = ([fit_batch(batch) for batch in part] for part in (topic.forget, topic.retain))
        vocabulary = topic.vocabulary[topic.vocabulary < known]
        fitted.append(replace(topic, forget=forget, retain=retain, vocabulary=vocabulary))
    return fitted


def resume_run(plan: RunPlan, data: str) -> Progress:
    """Where a run that was killed goes on; its metrics are cut to the steps that a checkpoint holds."""
    config, folder = plan.config, plan.folder
    belongs = {"run": config.id, "data": data, "base": weights.identify_base(plan.base, config.method.depth)}
    progress = Progress(Checkpoints(folder / CHECKPOINTS, config.train.checkpoint_seconds, belongs))
    progress.resumed_at = (progress.checkpoints.load() or (0,))[0]
    if len({*distributed.gather_values(progress.resumed_at)}) > 1:
        raise SrmuError(f"{folder} must lie on storage that all processes see, but does not")
    if distributed.is_first():
        path = folder / METRICS
        lines = path.read_text().splitlines()[: progress.resumed_at] if progress.resumed_at else []
        write_whole(path, "".join(f"{line}\n" for line in lines))
        progress.clock -= float(json.loads(lines[-1])["seconds"]) if lines else 0.0
    return progress


def collect_changes(config: Config, model: EditableModel, progress: Progress) -> None:
    """Take what the training changed; SrmuError where a tensor that should have changed did not."""
    method, reason = config.method, progress.outcome.stop_reason
    changed = progress.changed = model.delta()
    unmoved = sorted(set(model.trained) - set(changed))
    # Of a whole model some tensors may stay: bf16 norms near 1 do not move by steps of 1e-5.
    if not unmoved or progress.error or (changed and (method.depth is None or reason != FINISHED)):
        return
    progress.checkpoints.clear()  # it would end there again
    if reason.startswith("kl_budget"):
        mend = "lower train.learning_rate or train.check_every, or loosen that limit"
        raise SrmuError(f"nothing is left of {progress.steps} steps ({reason}): {mend}")
    raise SrmuError(
        f"{unmoved[0] if changed else 'the model'} did not change in {progress.steps} steps ({reason}); "
        f"raise train.learning_rate, or see the options of {method.name}: srmu info methods"
    )


def list_state(outcome: MethodOutcome) -> dict[str, Tensor]:
    """What a method computed before its first step, by topic and name, in float32."""
    return {
        f"{topic}.{name}": tensor.detach().float().cpu().contiguous()
        for topic, state in outcome.states.items()
        for name, tensor in state.tensors.items()
    }


def build_record(
    plan: RunPlan, model: EditableModel, topics: list[Topic], progress: Progress, watch: Watch
) -> dict[str, Any]:
    """The run's record."""
    config, folder, kept = plan.config, plan.folder, model.activations
    files = {name: sha256(folder / name) for name in (CONFIG, METRICS, DELTA, STATE) if (folder / name).exists()}
    return {
        **describe_training(config, model, topics, progress),
        "reach": describe_reach(build_skeleton(plan.settings), progress.changed),
        "schema_version": audit.SCHEMA,
        "id": config.id,
        "started": progress.started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "purpose": config.purpose.model_dump(),
        "base": audit.describe_base(config.model, config.revision, plan.base, watch),
        "resumed_at": progress.resumed_at,
        "checkpoint_failed": progress.checkpoints.failed,
        "memory": progress.memory,
        "diverged": progress.error is not None,
        "weights": config.train.weights,
        "activations": {"kept": kept.kept, "found": kept.hits, "folder": kept.folder.name},  # in srmu info cache
        "change": audit.describe_change(plan.base, folder / DELTA),
        "processes": {"count": distributed.get_size(), "sharded": plan.shard},
        "reproduction": {
            "command": "srmu verify RUN --rerun",
            "config": config.to_dict(),
            "expected": {DELTA: files[DELTA]} if DELTA in files else {},
            "rerun": None,
        },
        "results": {},
        "attacks": {},
        "exported": {},
        "limits": audit.LIMITS,
        "files": files,
    }


def describe_training(config: Config, model: EditableModel, topics: list[Topic], progress: Progress) -> dict[str, Any]:
    """What a record says of a training whether or not it has a folder."""
    return {
        "tool": audit.describe_tool(),
        "method": config.method.name,
        "paper": config.method.paper,
        "model": config.model,
        "data": {topic.name: dict(topic.counts) for topic in topics},
        "overlap": {topic.name: measure_pair_overlap(topic) for topic in topics},
        "topics": {name: state.numbers for name, state in progress.outcome.states.items()},
        "stop_reason": progress.outcome.stop_reason,
        "seconds": round(progress.seconds, 3),
        "steps": progress.steps,
        "changed": sorted(progress.changed),
        "effect": progress.effect,
        "flops": count_dense_flops(model, topics, progress.steps),
        "environment": audit.describe_environment(),
    }


def require_memory(plan: RunPlan) -> None:
    """SrmuError where what is trained, with its original and its optimiser, cannot be held."""
    method, model = plan.config.method, estimate.bare_model(plan)
    step = estimate.describe_step(plan, model, lora=getattr(method, "lora_rank", 0), sharded=plan.shard)
    parts = counting.held_bytes(step, distributed.get_size(), 1.0)
    needed = sum(parts[name] for name in counting.STANDING)
    if needed > (free := free_bytes(plan.config.device)):
        raise SrmuError(
            f"method {method.name} trains {step.trained.part(1):,} numbers: with their originals and the "
            f"optimiser they take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            "srmu unlearn --dry-run says what would help"
        )


def measure_pair_overlap(topic: Topic) -> float:
    """The share of the forget texts' distinct pairs of neighbouring tokens that the retain texts have."""
    pairs = {}
    for role in ("forget", "retain"):
        found = [torch.zeros(0, dtype=torch.long)]
        for batch in getattr(topic, role):
            ids, real = batch["input_ids"].long(), batch["attention_mask"].bool()
            found.append((ids[:, :-1] * (1 << 31) + ids[:, 1:])[real[:, 1:] & real[:, :-1]].unique())
        pairs[role] = torch.cat(found).unique()
    return float(torch.isin(pairs["forget"], pairs["retain"]).float().mean()) if len(pairs["forget"]) else 0.0


def count_dense_flops(model: EditableModel, topics: list[Topic], steps: int) -> float:
    """FLOPs of the steps in products with weight matrices, without attention and what is cached.

    Two a token and weight forward; in the layers that change also two for each of the gradients of inputs and of
    weights, and two for the frozen pass of the retain texts.
    """
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
    fixed, moving = sum(sizes[: model.fixed]), sum(sizes[model.fixed :])
    total = 0.0
    for role, passes in (("forget", 6), ("retain", 8)):
        tokens = [b["input_ids"].numel() for t in topics for b in getattr(t, role)]
        total += steps * (sum(tokens) / max(1, len(tokens))) * (2 * fixed + passes * moving)
    return total
