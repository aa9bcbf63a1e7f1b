"""What the paper's own setting needs on this machine: texts and how to get them, memory, hours."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import MistralConfig

from srmu.engine import weights
from srmu.engine.files import write_json
from srmu.engine.loading import build_skeleton, read_config
from srmu.engine.topic import Topic
from srmu.errors import SrmuError
from srmu.evals.parallel import RunJob
from srmu.runs import estimate, scale
from srmu.runs.config import Config, load_config
from srmu.runs.estimate import format_duration, format_gb
from srmu.runs.meter import Work, blank_batch, probe_machine
from srmu.runs.plan import load_tokenizer, load_topics, locate_base, plan_run, run_folder

NARROW = 1024  # features of the products that are timed where only dimensions are known
FAST = 100e12  # FLOPs a second that one may expect of a data-centre GPU in bfloat16


def estimate_needs(
    jobs: Mapping[str, RunJob], runs: Mapping[str, int], spec: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """What runs take: a job of each method, and how many runs of it are wanted.

    Where model or texts are not there, the model's published dimensions and texts of the lengths
    that the configs state take their place; nothing is fetched.
    """
    methods: dict[str, Any] = {}
    sources: dict[str, str] = {}
    speeds: Work | None = None
    with checkpoint_or_hollow(name, spec) as (folder, known):
        for label, job in jobs.items():
            config = load_config(job.config, (*job.overrides, f"model={folder}"))
            config = plan_run(config).config
            topics = topics_of(config, folder, spec)
            if speeds is None:  # the machine's; measuring them takes long where it is slow
                lengths = [(config.train.batch_size, 512)] * 2
                speeds = probe_machine(
                    torch.bfloat16, config.device, lengths, read_config(folder).hidden_size
                )
            found = estimate.estimate_run(config, folder, topics, speeds)
            adapters = getattr(config.method, "lora_rank", 0)
            methods[label] = found | {"runs": runs[label], "adapters": adapters}
            sources |= sources_of(config, spec)
        parameters = sum(estimate.stored_bytes(folder).values()) / 2
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    asked = spec["asked"]
    tokens = sum(one["questions"] * one["tokens"] for one in asked.values())
    return {
        "model": {"name": name, "there": known, "bytes": size},
        "sources": sources | {k: v for k, v in spec["sources"].items() if "questions" in v},
        "methods": methods,
        "matmul_flops_a_second": speeds.flops if speeds else 0,
        "questions": sum(one["questions"] for one in asked.values()),
        "evaluation_flops": 2 * parameters * tokens,  # of one run; the original's once more
    }


@contextmanager
def checkpoint_or_hollow(name: str, spec: Mapping[str, Any]) -> Iterator[tuple[Path, bool]]:
    """The model's folder where it is there, else one that has its dimensions and no weights."""
    if Path(name).is_dir():
        yield Path(name), True
        return
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(name, local_files_only=True))
        complete = any(found.glob("*.safetensors"))
    except Exception:  # not in the cache; the client raises many kinds
        complete = False
    if complete:
        yield found, True
        return
    if name != spec["name"]:
        raise SrmuError(
            f"model {name} is not here, and dimensions are known of {spec['name']} only: fetch it "
            f"with hf download {name}, or name its folder"
        )
    with TemporaryDirectory() as scratch:
        yield make_hollow(Path(scratch), spec["shape"]), False


def make_hollow(folder: Path, shape: Mapping[str, int]) -> Path:
    """A Mistral-like checkpoint of such dimensions without weights."""
    given: dict[str, Any] = dict(shape)
    config = MistralConfig(**given, architectures=["MistralForCausalLM"], dtype="bfloat16")
    return hollow_of(folder, config, split=False)


def hollow_of(folder: Path, config: Any, *, split: bool = True) -> Path:
    """A checkpoint whose files are as long as their headers say and hold nothing on the disk.

    `split`: one for each layer, and one for the rest, as a file longer than the memory is cannot
    be looked at.
    """
    config.save_pretrained(folder)
    kind, size = ("F32", 4) if config.dtype == torch.float32 else ("BF16", 2)
    files: dict[str, dict[str, Any]] = {}
    ends: Counter[str] = Counter()  # of each file's tensors
    for name, parameter in build_skeleton(config).named_parameters():
        file = f"model-{weights.layer_number(name)}.safetensors" if split else "model.safetensors"
        entries = files.setdefault(file, {})
        for part in expert_names(name, len(parameter)) if parameter.ndim == 3 else [name]:
            shape = [*parameter.shape[-2:]]
            start = ends[file]
            ends[file] += size * prod(shape)
            entries[part] = {"dtype": kind, "shape": shape, "data_offsets": [start, ends[file]]}
    for file, entries in files.items():
        header = json.dumps(entries).encode()
        with (folder / file).open("wb") as opened:
            opened.write(len(header).to_bytes(8, "little") + header)
            opened.truncate(8 + len(header) + ends[file])
    where = {name: file for file, entries in files.items() for name in entries}
    write_json(folder / weights.INDEX, {"weight_map": where})
    return folder


def expert_names(name: str, experts: int) -> list[str]:
    """The names of a tensor's experts: checkpoints store each by itself."""
    owner, _, kind = name.rpartition(".")
    return [f"{owner}.{i}.{kind}.weight" for i in range(experts)]


def dry_run(config: Config) -> tuple[Config, dict[str, Any], list[str]]:
    """The plan of `srmu unlearn`, and the lines that tell it.

    Of a model of which only the config.json is there, the dimensions and texts of the lengths that
    the config states take the place of weights and texts.
    """
    base = locate_base(config)
    if weights_in(base):
        plan = plan_run(config)
        config, found = plan.config, plan.summarise()
        topics = load_topics(config, load_tokenizer(base))
        found |= estimate.estimate_run(config, base, topics) | {
            "ranks": estimate.estimate_launches(config, base, topics)
        }
        found["config"] = config.to_dict()
        return config, found, estimate.explain_plan(found)
    settings = read_config(base)
    with TemporaryDirectory() as scratch:
        folder = hollow_of(Path(scratch), settings)
        plan = plan_run(config.model_copy(update={"model": str(folder)}))
        planned, found = plan.config, plan.summarise()
        topics = topics_of(planned, folder, {"documents": {}})
        narrow = min(settings.hidden_size, NARROW)  # this machine is not the one it will run on
        speeds = probe_machine(torch.bfloat16, planned.device, [(4, 64)] * 2, narrow)
        found |= estimate.estimate_run(planned, folder, topics, speeds)
        found["ranks"] = estimate.estimate_launches(planned, folder, topics, elsewhere=True)
    config = planned.model_copy(update={"model": config.model})
    found |= {"id": config.id, "run": str(run_folder(config)), "model": config.model}
    found |= {"config": config.to_dict(), "advice": ""}
    lines = estimate.explain_plan(found)
    lines.append(
        "reckoned from the dimensions of its config.json, for GPUs, and from texts of the lengths "
        "that the config states: no weights are here"
    )
    if settings.model_type in scale.KNOWN:
        longest = max(topic.max_length for topic in planned.topics.values())
        found["dimensions"] = model_dimensions(settings, planned.method.depth, longest)
        lines.append(
            "model of {parameters:,} numbers: {held:,} are loaded, and a token of a text of "
            "{tokens} takes {flops_per_token:,} FLOPs a pass".format(**found["dimensions"])
        )
    return config, found, lines


def model_dimensions(settings: Any, depth: int | None, tokens: int) -> dict[str, int]:
    """What a model's dimensions say of it at the depth used."""
    return {
        "parameters": scale.size_of(settings).total,
        "held": scale.size_of(settings, depth).total,
        "tokens": tokens,
        "flops_per_token": scale.flops_per_token(settings, tokens, depth),
    }


def weights_in(folder: Path) -> bool:
    """Whether a model's folder holds more than its description: else it is planned by that."""
    kinds = ("*.safetensors", "*.index.json", "*.bin", "*.gguf", "*.pt", "tokenizer*")
    return not (folder / "config.json").is_file() or any(any(folder.glob(k)) for k in kinds)


def topics_of(config: Config, folder: Path, spec: Mapping[str, Any]) -> list[Topic]:
    """The config's texts where all of them are files, else batches of the lengths it states."""
    parts = [s for topic in config.topics.values() for s in (*topic.forget, *topic.retain)]
    if all(source.path for source in parts) and (folder / "tokenizer.json").exists():
        return load_topics(config, load_tokenizer(folder))
    rows, cpu = config.train.batch_size, torch.device("cpu")
    vocabulary = torch.arange(
        read_config(folder).get_text_config().vocab_size
    )  # anchors draw from it
    found = []
    for name, topic in config.topics.items():
        lengths = (topic.max_length, topic.retain_max_length or topic.max_length)
        count = -(-spec["documents"].get(name, 1000) // rows)
        # the same batch again and again: only its shape is looked at
        forget, retain = ([blank_batch((rows, length), cpu, False)] * count for length in lengths)
        found.append(Topic(name, forget, retain, vocabulary=vocabulary, options=topic.options))
    return found


def sources_of(config: Config, spec: Mapping[str, Any]) -> dict[str, str]:
    """Where the texts come from, and how to get those that are not files."""
    found = {}
    for topic in config.topics.values():
        for source in (*topic.forget, *topic.retain):
            if source.dataset:
                found[source.dataset] = spec["sources"].get(source.dataset, "a data set of the hub")
            else:
                found[Path(source.path or "").name] = "a file"
    return found


def explain_needs(found: Mapping[str, Any]) -> list[str]:
    """What is needed, in lines for a person."""
    model, flops, methods = found["model"], found["evaluation_flops"], found["methods"]
    scoring = flops / found["matmul_flops_a_second"]
    runs = sum(one["runs"] for one in methods.values())
    there = "is here" if model["there"] else f"hf download {model['name']}"
    lines = [f"model   {model['name']}, {format_gb(model['bytes'])}: {there}"]
    lines += [f"data    {name}: {how}" for name, how in found["sources"].items()]
    for label, one in methods.items():
        # adapters are counted as if all that they stand beside were trained
        most = "under " if one["adapters"] else ""
        lines.append(
            f"runs    {one['runs']} of {label}: {most}{format_gb(one['memory_private'])} of memory "
            f"beside {format_gb(one['bytes_read'])} of the model's files, "
            f"{most}{one['flops'] / 1e15:.3g} PFLOP, here {format_duration(one['seconds'])}"
        )
    lines.append(
        f"scores  {found['questions']:,} questions a run: {flops / 1e15:.3g} PFLOP, here "
        f"{format_duration(scoring)}"
    )
    total = sum(one["runs"] * (one["flops"] + flops) for one in methods.values()) + flops
    here = sum(one["runs"] * (one["seconds"] + scoring) for one in methods.values()) + scoring
    lines.append(
        f"in all  {runs} runs, {total / 1e15:.3g} PFLOP: here {format_duration(here)}; "
        f"{format_duration(total / FAST)} where {FAST / 1e12:.0f} TFLOP a second are reached"
    )
    if not model["there"]:
        lines.append("reckoned from the model's published dimensions: it is not here")
    return lines
