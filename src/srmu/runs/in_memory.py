"""`srmu.unlearn`: a run from a config, or a model that is in memory already, changed in place."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srmu.data.sources import RowSource, Source
from srmu.data.tokens import pad_id
from srmu.engine import distributed
from srmu.engine.activation_cache import open_activations
from srmu.engine.loading import find_layers
from srmu.engine.model import EditableModel
from srmu.engine.progress import Watch, choose_progress, ignore_progress
from srmu.engine.quantised import refuse_quantised
from srmu.engine.text_part import is_language_model, view_text
from srmu.engine.train import Log, TrainOptions
from srmu.errors import SrmuError
from srmu.methods import Method
from srmu.methods.base import Session
from srmu.runs import training
from srmu.runs.config import Config, check_tree
from srmu.runs.effect import measure_effect
from srmu.runs.plan import load_topics
from srmu.runs.reach import describe_reach
from srmu.runs.record import compare_tensor
from srmu.runs.run import Run, unlearn_config

Texts = Any  # texts, rows, files (pathlib), a data set; see `as_sources`


@dataclass(frozen=True)
class InMemoryResult:
    """What unlearning in memory did: all that a run's folder would hold.

    `record` is the run's record, without what it says of files; `record["effect"]["sentences"]` say what the run did.
    `steps` hold the values of each step that a callback gets, with its number and seconds. `delta` holds the changed
    tensors by parameter name, `state` what the method drew or measured, by topic and name.
    """

    record: dict[str, Any]
    steps: list[dict[str, Any]]
    delta: dict[str, Tensor]
    state: dict[str, Tensor]


@overload
def unlearn(
    config: Config,
    /,
    *,
    out: str | Path | None = None,
    shard: bool = False,
    offload: bool = False,
    callback: Log | None = None,
    watch: Watch | None = None,
) -> Run: ...


@overload
def unlearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    /,
    *,
    forget: Texts,
    retain: Texts = (),
    method: Method | type[Method] | str = "srmu",
    train: TrainOptions | dict[str, Any] | None = None,
    max_length: int = 512,
    seed: int = 0,
    callback: Log | None = None,
    watch: Watch | None = None,
) -> tuple[PreTrainedModel, InMemoryResult]: ...


def unlearn(model: Any, tokenizer: Any = None, /, *, watch: Watch | None = None, **options: Any) -> Any:
    """Make a model in memory unlearn texts, or make the run of a config.

    `unlearn(model, tokenizer, forget=..., retain=...)` changes the model in place and gives it with an InMemoryResult;
    nothing is written. Where an error ends it, the model is as before.
    `unlearn(config)` gives the Run: its folder holds the changed tensors and the record, `out` a full checkpoint.

    Texts are a list of strings, of rows like `{"text": "..."}`, a `datasets.Dataset` with a column `text`, or files as
    `pathlib.Path`: a string is never taken for a path. `method` is a Method, its class or its name; `train` is what
    stands under `train:` in a config file; `max_length` cuts each text at so many tokens; `seed` draws what is random.

    `callback(step, values)` is called after every step. Progress shows in a terminal and in a notebook; with
    `watch=srmu.engine.progress.ignore_progress` nothing does. SrmuError says what is wrong with what was given;
    DivergedError ends a training whose numbers are no longer finite.

    Examples:
        >>> model, result = srmu.unlearn(
        ...     model, tokenizer, forget=["w1 w2 w3"], retain=["w4 w5 w6"],
        ...     method=srmu.RMU(layer=2), train={"max_steps": 3},
        ... )
        >>> len(result.steps), result.steps[0]["topic"]
        (3, 'topic')
        >>> sorted(result.delta)[0], len(result.delta)  # the down-projections of three layers
        ('model.layers.0.mlp.down_proj.weight', 3)
    """
    watch = watch or choose_progress()
    if isinstance(model, Config):
        return unlearn_config(model, watch=watch, **options)
    if tokenizer is None:
        raise SrmuError(
            "unlearn takes a config, unlearn(load_config('config.yaml')), or a model with its "
            "tokenizer, unlearn(model, tokenizer, forget=[...], retain=[...])"
        )
    return unlearn_in_memory(model, tokenizer, watch=watch, **options)


def unlearn_in_memory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    forget: Texts,
    retain: Texts = (),
    method: Method | type[Method] | str = "srmu",
    train: TrainOptions | dict[str, Any] | None = None,
    max_length: int = 512,
    seed: int = 0,
    callback: Log | None = None,
    watch: Watch = ignore_progress,
) -> tuple[PreTrainedModel, InMemoryResult]:
    """Change a model in place; see `unlearn`. The same tensors as a run's, bit for bit; on an error none."""
    check_model(model, tokenizer)
    text = view_text(model)
    texts = {"forget": as_sources(forget, "forget"), "retain": as_sources(retain, "retain")}
    config = check_tree(
        {
            "model": model.name_or_path or type(model).__name__,
            "method": method() if isinstance(method, type) else method,
            "topics": {"topic": texts | {"max_length": max_length}},  # random numbers depend on this name
            "train": train or {},
            "seed": seed,
        }
    )
    resolved = config.method.resolved(text.config)
    if why := resolved.no_checkpoint:
        raise SrmuError(f"{why}; unlearn from a config")
    config = config.model_copy(update={"method": resolved, "train": resolved.training(config.train, text.config)})
    topics = load_topics(config, tokenizer)
    steps: list[dict[str, Any]] = []
    progress = training.Progress()
    with TemporaryDirectory() as scratch, edit_in_place(text, config.method) as edited:
        topics = training.fit_topics(config, edited, topics, "the tokenizer")
        tokenizer.save_pretrained(scratch)  # some methods read it from the model's folder
        folder = Path(model.name_or_path or scratch)
        edited.folder = folder if folder.is_dir() else Path(scratch)
        # Where the first layer changes, no activation comes twice.
        twice = edited.fixed or config.method.depth is not None
        edited.activations = open_activations("memory" if twice else "none", {}, edited.device)
        log = partial(progress.log_step, steps.append, callback)
        progress.outcome = config.method.apply(edited, topics, Session(config.train, log, watch))
        training.collect_changes(config, edited, progress)
        progress.effect = measure_effect(config, edited, topics, progress.outcome.states, steps, watch)
        delta, original = progress.changed, edited.original
        changes = {name: compare_tensor(original[name].cpu(), delta[name].detach().cpu()) for name in delta}
        record = {
            **training.describe_training(config, edited, topics, progress),
            "options": dataclasses.asdict(config.method),
            "train": dataclasses.asdict(config.train),
            "seed": config.seed,
            "change": {"tensors": changes},
        }
    record["reach"] = describe_reach(text, delta)  # now that the model has all its layers again
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    delta = {names[id(text.get_parameter(name))]: tensor for name, tensor in delta.items()}
    record["change"]["tensors"] = dict(zip(delta, changes.values(), strict=True))
    return model, InMemoryResult(record, steps, delta, training.list_state(progress.outcome))


def check_model(model: Any, tokenizer: Any) -> None:
    """SrmuError for what is not a causal language model that can be trained where it lies."""
    if distributed.get_size() > 1:
        raise SrmuError("a model in memory is unlearned in one process; several take a config")
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        hint = "; merge its adapters first: model.merge_and_unload()" if hasattr(model, "merge_and_unload") else ""
        raise SrmuError(f"unlearn takes a transformers model or a Config, not {kind}{hint}")
    if not is_language_model(kind, model.config):
        raise SrmuError(f"{kind} is not a causal language model: load AutoModelForCausalLM")
    refuse_quantised(model.name_or_path or kind, model.config)
    places = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(places) > 1 or "meta" in places:
        raise SrmuError(
            f"the model lies on {', '.join(places)}: in memory it must be on one device; "
            "unlearn(config, shard=True) or offload=True is for larger ones"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise SrmuError(f"the second argument is the model's tokenizer, not {type(tokenizer).__name__}")
    pad_id(tokenizer)


def as_sources(texts: Texts, role: str) -> list[Source]:
    """Where the texts of an argument come from; SrmuError for what could be meant in two ways."""
    if isinstance(texts, Path | Source):
        texts = [texts]
    if isinstance(texts, str | Mapping) or not hasattr(texts, "__iter__"):
        keys = f" of {', '.join(map(str, texts))}" if isinstance(texts, Mapping) else ""
        raise SrmuError(
            f"{role} is one {type(texts).__name__}{keys}: expected [text, ...]; [row, ...] where each row has a "
            "'text', a question and answer, or messages; a datasets.Dataset (one split of a DatasetDict); or files as "
            "pathlib.Path"
        )
    if not isinstance(texts, list | tuple):
        return [RowSource(path=role, rows=texts)]
    files = [Source(path=str(x)) if isinstance(x, Path) else x for x in texts if isinstance(x, Path | Source)]
    rows = [x for x in texts if not isinstance(x, Path | Source)]
    return [*files, RowSource(path=role, rows=rows)] if rows else files


@contextmanager
def edit_in_place(module: PreTrainedModel, method: Method) -> Iterator[EditableModel]:
    """A model of the user's as the engine works on it; only the changed tensors differ afterwards, on an error none."""
    owner, attribute = find_layers(module)
    layers = getattr(owner, attribute)
    kept = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    modes = [(part, part.training) for part in module.modules()]
    original: dict[str, Tensor] = {}
    try:
        module.zero_grad()  # else the first step would add what the user left there
        edited = EditableModel(module, method.trainable, method.depth)
        original = edited.original
        edited.check_causal()
        yield edited
    except BaseException:
        for name, tensor in original.items():
            module.get_parameter(name).data = tensor
        raise
    finally:
        setattr(owner, attribute, layers)
        for parameter, flag, gradient in kept:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for part, mode in modes:
            part.training = mode
