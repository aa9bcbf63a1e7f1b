"""A run before it starts: everything that its config leaves open, filled in once."""

from dataclasses import dataclass, fields
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from srmu.data.sources import read_texts
from srmu.data.tokens import pad_id
from srmu.data.topics import ROLES, load_topic
from srmu.engine import distributed, weights
from srmu.engine.activation_cache import limit_bytes
from srmu.engine.devices import find_device
from srmu.engine.files import tidy_path
from srmu.engine.loading import build_skeleton, choose_dtype, read_config, wanted_dtype
from srmu.engine.quantised import DEQUANTISED, refuse_quantised
from srmu.engine.text_part import keep_text
from srmu.engine.topic import Topic
from srmu.errors import SrmuError, first_line
from srmu.runs.config import Config

FETCH = "hf download OWNER/NAME"  # of a model on the hub


@dataclass(frozen=True)
class RunPlan:
    """A run with nothing left open, before any weight is read."""

    config: Config  # with the method's options, the device and the training as they will be used
    base: Path  # the model's folder
    settings: Any  # the model's own config
    shard: bool = False  # cut the weights over the processes
    offload: bool = False  # keep the layers below those that change out of the device's memory

    @cached_property
    def folder(self) -> Path:
        return tidy_path(Path(self.config.runs_dir)) / f"{self.config.id}-{self.config.method.name}"

    @cached_property
    def here(self) -> bool:
        """Whether the weights are here, not only the model's config.json."""
        return weights.is_there(self.base)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type in which the model is loaded: that of the config, or the widest that is stored."""
        if dtype := wanted_dtype(self.settings, self.config.dtype):
            return dtype
        build = partial(build_skeleton, self.settings)
        types = keep_text(self.base, weights.stored_types(self.base), build) if self.here else {"": torch.bfloat16}
        stored = types.values()
        return max((t for t in stored if t.is_floating_point), key=lambda t: t.itemsize)

    @cached_property
    def stored(self) -> dict[str, int]:
        """Bytes of each tensor from the headers of the model's files; without files, from its config."""
        build = partial(build_skeleton, self.settings)
        if not self.here:
            return {name: self.dtype.itemsize * tensor.numel() for name, tensor in build().named_parameters()}
        entries = keep_text(self.base, weights.stored_entries(self.base), build).items()
        return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries}


def plan_run(config: Config, *, shard: bool = False, offload: bool = False) -> RunPlan:
    """Fill in what depends on model and machine, without reading weights; SrmuError where the run cannot work."""
    base = weights.locate_model(config.model, config.revision)
    settings = read_config(base)
    refuse_quantised(base, settings, later=DEQUANTISED)
    limit_bytes()  # report a bad limit before the model is loaded
    method = config.method.resolved(settings)
    known = {field.name for field in fields(method)}
    for name, topic in config.topics.items():  # each topic's own strength must fit the method too
        if unknown := sorted(set(topic.options) - known):
            raise SrmuError(f"topics.{name}.{unknown[0]}: method {method.name} has no such option")
        method.with_options(topic.options)
    device = find_device(config.device)
    values = {"method": method, "device": device, "train": method.training(config.train, settings)}
    values["dtype"] = choose_dtype(base, device, config.dtype)
    config = config.model_copy(update=values)
    if weights.is_there(base):
        weights.list_shards(base)
    check_ranks(config, shard, offload)
    return RunPlan(config, base, settings, shard, offload)


def check_ranks(config: Config, shard: bool, offload: bool = False) -> None:
    """SrmuError where the method does not go with the processes that were started, or with these options."""
    method, count, launcher = config.method, distributed.get_size(), "torchrun --nproc-per-node 2 -m srmu unlearn ..."
    if shard and count == 1:
        raise SrmuError(f"shard cuts the weights over several processes; there is one: start {launcher} --shard")
    if count > 1 and not method.spreads:
        raise SrmuError(f"method {method.name} runs in one process, but {count} were started; leave out the launcher")
    if shard and getattr(method, "lora_rank", 0) > 0:
        raise SrmuError("shard and method.lora_rank do not go together; leave one out")
    stream = getattr(method, "stream", "resid_post")
    if shard and stream != "resid_post":
        # FSDP gathers a layer again for its gradient when that of its output is there
        raise SrmuError(f"shard needs method.stream=resid_post: {stream} lies inside a layer")
    if offload and (shard or method.depth is None):
        fits = "it goes with a method of one layer (srmu, rmu, ...), and without shard"
        raise SrmuError(f"offload leaves layers below those that change on the disk: {fits}")


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer; SrmuError where there is none, or it cannot pad."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        if (folder / "tokenizer.model").is_file() and find_spec("sentencepiece") is None:
            mend = (
                "pip install sentencepiece protobuf; AutoTokenizer's save_pretrained then writes one that needs neither"
            )
            raise SrmuError(f"the tokenizer of {folder}, a tokenizer.model alone, needs a library: {mend}") from error
        if not (reason := first_line(error).strip()).endswith(":"):  # else a list of what transformers looked for
            raise SrmuError(f"the tokenizer of {folder} cannot be loaded: {reason}") from error
        tokenizer = None
    if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_ids):
        # Without files transformers makes an empty one, to which every text is unknown.
        raise SrmuError(
            f"model folder {folder} has no tokenizer; copy its tokenizer.json there, or fetch the model: {FETCH}"
        )
    pad_id(tokenizer)
    return tokenizer


def load_topics(config: Config, tokenizer: Any) -> list[Topic]:
    """The topics of a plan's config as batches; SrmuError where the method cannot use them."""
    if not config.topics:
        raise SrmuError("topics: name at least one, with its forget and retain texts")
    topics = [load_topic(name, topic, tokenizer, config.train, config.seed) for name, topic in config.topics.items()]
    config.method.check(topics, config.train)
    return topics


def read_topic_texts(config: Config) -> dict[str, list[str]]:
    """The texts of all topics of a config, by role."""
    topics = config.topics.values()
    return {role: [text for one in topics for text in read_texts(getattr(one, role))] for role in ROLES}
