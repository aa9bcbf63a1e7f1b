"""The analyses of Adaptive RMU (arXiv 2408.06223) on a model, or on a run before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig

from srmu.data.sources import read_texts
from srmu.data.tokens import batch_rows, pad_id, tokenise_texts
from srmu.engine import weights
from srmu.engine.loading import load_module, read_config
from srmu.engine.losses import is_counted, is_predicted, without_first
from srmu.engine.model import Batch, EditableModel, Site
from srmu.engine.progress import Watch, ignore_progress
from srmu.engine.train import move_batch
from srmu.errors import DivergedError, SrmuError
from srmu.evals.figures import Analysis, Panel, format_number
from srmu.methods import Misdirection
from srmu.runs.config import Config
from srmu.runs.run import STATE, Run, base_of, find_device, load_tokenizer, unlearn

BINS = 40  # of a histogram
MEASURES = ("logit", "probability", "margin", "entropy")  # of confidence
Texts = Mapping[str, Sequence[str]]  # "forget" and "retain"


def open_model(target: str | Path, device: str = "auto") -> tuple[EditableModel, Any]:
    """A model folder, a hub id or a run, with its tokenizer.

    Of a run, `frozen()` of what is returned is the model before it.
    """
    run = Run(Path(target)) if (Path(target) / "record.json").is_file() else None
    if run and (why := run.config.method.no_checkpoint):
        raise SrmuError(why)
    folder = run.base if run else weights.locate_model(str(target))
    module = load_module(folder).eval().to(find_device(device))
    model = EditableModel(module, run.record["changed"] if run else [])
    if run:
        weights.apply_delta(module, folder, run.delta)
    return model, load_tokenizer(folder)


def run_texts(run: Run) -> dict[str, list[str]]:
    """The forget and the retain texts of a run's topics."""
    topics = run.config.topics.values()
    return {
        "forget": [text for topic in topics for text in read_texts(topic.forget, Path())],
        "retain": [text for topic in topics for text in read_texts(topic.retain, Path())],
    }


def model_states(model: EditableModel) -> dict[str, Any]:
    """The states of a model to compare: before and after, where a run changed it."""
    both = {"before": model.frozen, "after": nullcontext}
    return both if model.trained else {"model": nullcontext}


def prepare_batches(
    texts: Sequence[str], tokenizer: Any, documents: int, max_length: int, batch_size: int = 8
) -> list[Batch]:
    """The first `documents` texts as batches; SrmuError where none has two tokens."""
    if documents < 1 or batch_size < 1:
        raise SrmuError(f"documents {documents} and batch size {batch_size} must be 1 or more")
    rows = tokenise_texts(list(texts)[:documents], tokenizer, max_length) if texts else []
    if not rows:
        raise SrmuError("no text of two tokens or more to analyse; name forget and retain texts")
    return list(batch_rows(rows, tokenizer, batch_size, "mask"))


def measure_confidence(
    model: EditableModel,
    tokenizer: Any,
    texts: Texts,
    *,
    tokens: Literal["predicted", "generated"] = "predicted",
    new_tokens: int = 16,
    documents: int = 64,
    max_length: int = 128,
    watch: Watch = ignore_progress,
) -> Analysis:
    """How sure a model is of its next token: the largest logit and probability, the margin of the
    likeliest over the second in probability, the entropy in nats; means over tokens.

    `predicted`: at each token of the texts that another comes before. `generated`: at `new_tokens`
    greedily chosen tokens after the first half of each text, up to its end of sequence.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    values: dict[str, Tensor] = {}
    parts = {
        k: prepare_batches(rows, tokenizer, documents, max_length) for k, rows in texts.items()
    }
    when = model_states(model)
    total = sum(map(len, parts.values())) * len(when)
    with watch("reading the model's confidence", total) as tick:
        for moment, state in when.items():
            for name, batches in parts.items():
                each = []
                for batch in batches:
                    with state(), torch.no_grad():
                        if tokens == "predicted":
                            each.append(next_token_confidence(model, batch))
                        else:
                            each.append(generated_confidence(model, batch, tokenizer, new_tokens))
                    tick("")
                four = torch.cat(each)  # (N, 4)
                values[f"{name}, {moment}"] = four[:, 1]
                means = zip(MEASURES, four.double().mean(dim=0).tolist(), strict=True)
                found.setdefault(name, {})[moment] = {**dict(means), "tokens": len(four)}
    sentences = [
        f"{name}, {moment}: largest probability {row['probability']:.2f} (margin "
        f"{row['margin']:.2f}), largest logit {row['logit']:.1f}, entropy {row['entropy']:.2f} "
        f"nats, over {row['tokens']} {tokens} tokens."
        for name, each_moment in found.items()
        for moment, row in each_moment.items()
    ]
    if "before" in when:
        gap = {
            name: row["after"]["probability"] - row["before"]["probability"]
            for name, row in found.items()
        }
        sentences.append(
            "The run changed the largest probability by "
            + ", ".join(f"{change:+.2f} on {name} texts" for name, change in gap.items())
            + "."
        )
    panel = draw_histogram(
        f"Largest probability of {tokens} tokens", "largest probability", values, 0.0, 1.0
    )
    return Analysis("Token confidence", {"tokens": tokens, "confidence": found}, sentences, [panel])


def token_confidence(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N 4"]:
    """Of each row: largest logit, largest probability, its margin over the next, entropy (nats)."""
    logits = logits.float()
    logs = logits.log_softmax(dim=-1)
    two = logs.exp().topk(2, dim=-1).values
    entropy = -(logs.exp() * logs).nansum(dim=-1)
    return torch.stack(
        [logits.max(dim=-1).values, two[:, 0], two[:, 0] - two[:, 1], entropy], dim=-1
    )


def next_token_confidence(model: EditableModel, batch: Batch) -> Float[Tensor, "N 4"]:
    batch = move_batch(batch, model.device)
    logits = model.logits(batch)[:, :-1]
    return token_confidence(logits[is_predicted(batch["labels"])]).cpu()


def generated_confidence(
    model: EditableModel, batch: Batch, tokenizer: Any, new_tokens: int
) -> Float[Tensor, "N 4"]:
    """The same at the tokens that the model puts after the first half of each row."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    rows = zip(batch["input_ids"].tolist(), lengths, strict=True)
    halves = [row[: max(1, length // 2)] for row, length in rows]
    # padded on the left: all rows go on at the same column
    (prompts,) = batch_rows(halves, tokenizer, len(halves), "count")
    ids, mask = (prompts[k].to(model.device) for k in ("input_ids", "attention_mask"))
    ends = model.module.generation_config.eos_token_id
    out: Any = model.module.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=ends,
            pad_token_id=pad_id(tokenizer),
        ),
    )
    logits = torch.stack(out.logits, dim=1)  # (B, S, V)
    known = torch.tensor([] if ends is None else ends, device=ids.device).reshape(-1)
    ended = torch.isin(out.sequences[:, ids.shape[1] :], known).long()
    return token_confidence(
        logits[ended.cumsum(dim=1) == ended]
    ).cpu()  # up to the first end, with it


def measure_alignment(
    run: Run,
    model: EditableModel,
    tokenizer: Any,
    *,
    documents: int = 64,
    max_length: int = 128,
    watch: Watch = ignore_progress,
) -> Analysis:
    """Cosines of forget activations, before and after, and of their displacement h - h0, with the
    run's direction and with its target; means by layer, and a histogram at the run's own.

    SRMU's target is its direction times its map; elsewhere the two are parallel. `None` where
    nothing moved. Each text's first token is left out. `model` is `open_model` of the run.
    """
    method = run.config.method
    vectors = load_file(run.folder / STATE) if (run.folder / STATE).exists() else {}
    if not isinstance(method, Misdirection) or not any(".direction" in name for name in vectors):
        raise SrmuError(
            f"alignment needs a run with one direction; method {method.name} keeps none: "
            "use one of rmu, adaptive_rmu, srmu"
        )
    site, count = method.site, len(model.layers)
    numbers: dict[str, Any] = {"layer": site.layer, "stream": site.stream, "topics": {}}
    sentences, panels = [], []
    with watch("measuring directions", len(run.config.topics) * count) as tick:
        for number, (name, topic) in enumerate(run.config.topics.items(), 1):
            texts = read_texts(topic.forget, Path())
            batches = prepare_batches(texts, tokenizer, documents, max_length)
            layers = []
            for layer in range(count):
                place = Site(layer, site.stream)
                layers.append(
                    {
                        kind: token_cosines(model, batches, place, vectors[f"{name}.{kind}"])
                        for kind in ("direction", "target")
                    }
                )
                tick("")
            numbers["topics"][name] = [
                {kind: {k: mean_or_none(v) for k, v in row[kind].items()} for kind in row}
                for row in layers
            ]
            at = numbers["topics"][name][site.layer]
            sentences.append(
                f"Topic {number}, layer {site.layer}: cosine of forget activations with the "
                f"direction {format_number(at['direction']['before'])} before and "
                f"{format_number(at['direction']['after'])} after, of their displacement "
                f"{format_number(at['direction']['displacement'])}; with the target "
                f"{format_number(at['target']['after'])} after, displacement "
                f"{format_number(at['target']['displacement'])}."
            )
            for kind in ("direction", "target"):
                means = [row[kind] for row in numbers["topics"][name]]
                series = {key: [row[key] for row in means] for key in means[0]}
                title = f"Cosine with the {kind}, topic {number}"
                panels.append(Panel(title, "layer", "mean cosine", [*range(count)], series))
            panels.append(
                draw_histogram(
                    f"Cosines with the target at layer {site.layer}, topic {number}",
                    "cosine",
                    layers[site.layer]["target"],
                    -1.0,
                    1.0,
                )
            )
    return Analysis("Alignment with the direction", numbers, sentences, panels)


@torch.no_grad()
def token_cosines(
    model: EditableModel, batches: Sequence[Batch], site: Site, vector: Float[Tensor, " D"]
) -> dict[str, Float[Tensor, " N"]]:
    """Each token's cosine with a vector: `before`, `after`, and that of its `displacement`.

    Tokens that did not move have none.
    """
    found: dict[str, list[Tensor]] = {"before": [], "after": [], "displacement": []}
    for batch in batches:
        mask = without_first(is_counted(batch["labels"])).to(model.device)
        batch = move_batch(batch, model.device)
        with model.frozen():
            before = model.hidden(batch, site, keep=False)[mask].float()
        after = model.hidden(batch, site)[mask].float()
        moved = (after - before)[(after != before).any(dim=-1)]
        for name, values in zip(found, (before, after, moved), strict=True):
            line = vector.to(values.device, values.dtype)
            found[name].append(torch.cosine_similarity(values, line, dim=-1).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def measure_sensitivity(
    model: EditableModel,
    tokenizer: Any,
    texts: Texts,
    *,
    size: float = 0.1,
    draws: int = 2,
    documents: int = 16,
    max_length: int = 128,
    seed: int = 0,
    watch: Watch = ignore_progress,
) -> Analysis:
    """How much noise in each layer's output changes what the model reads its answer from.

    psi_l = E |g_l(h + |h| eta) - g_l(h)|^2 / |g_l(h)|^2, eta ~ N(0, size^2 I / D) a token, g_l
    the layers above l with the final norm: up to what the unembedding reads; the mean over tokens
    and `draws` draws. Each text's first token, an attention sink, stays as it is and is
    left out. A network that passes its input on unchanged has psi = size^2.
    """
    if size <= 0 or draws < 1:
        raise SrmuError(f"size {size} must be above 0, and draws {draws} 1 or more")
    parts = {
        k: prepare_batches(rows, tokenizer, documents, max_length) for k, rows in texts.items()
    }
    count, when = len(model.layers), model_states(model)
    found: dict[str, list[float]] = {}
    with watch("adding noise", count * len(parts) * len(when)) as tick:
        for name, batches in parts.items():
            for moment, state in when.items():
                values = []
                for layer in range(count):
                    with state(), torch.no_grad():
                        values.append(layer_sensitivity(model, batches, layer, size, draws, seed))
                    tick("")
                found[f"{name}, {moment}"] = values
    sentences = [
        f"{name}: noise of {size:g} of an activation's norm comes out most amplified from layer "
        f"{max(range(count), key=values.__getitem__)} (psi {max(values):.3g}) and least from "
        f"layer {min(range(count), key=values.__getitem__)} (psi {min(values):.3g}); "
        f"{size**2:.3g} is neither more nor less than went in."
        for name, values in found.items()
    ]
    panel = Panel("Noise sensitivity", "layer", "psi", [*range(count)], found)
    numbers = {"psi": found, "size": size, "draws": draws, "seed": seed}
    return Analysis("Noise sensitivity of layers", numbers, sentences, [panel])


@torch.no_grad()
def layer_sensitivity(
    model: EditableModel,
    batches: Sequence[Batch],
    layer: int,
    size: float,
    draws: int = 1,
    seed: int = 0,
) -> float:
    """Noise sensitivity of one layer in the model's present state."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch in batches:
        mask = without_first(is_counted(batch["labels"])).to(model.device)
        inputs = move_batch({k: batch[k] for k in ("input_ids", "attention_mask")}, model.device)
        clean = model.module.base_model(**inputs, use_cache=False)[0][mask].float()
        for _ in range(draws):
            with add_noise(model.layers[layer], mask, size, generator):
                noisy = model.module.base_model(**inputs, use_cache=False)[0][mask].float()
            # Adaptive RMU (arXiv 2408.06223), noise sensitivity of a layer
            found.append((noisy - clean).square().sum(dim=-1) / clean.square().sum(dim=-1))
    return float(torch.cat(found).double().mean())


@contextmanager
def add_noise(
    block: nn.Module, mask: Tensor, size: float, generator: torch.Generator
) -> Iterator[None]:
    """Add |h| eta to a block's output h at the marked tokens (B, T) while the block runs."""

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.ndim == 4:  # Gemma 3n
            raise SrmuError("this model keeps several streams: its layers' noise is not measured")
        eta = torch.randn(hidden.shape, generator=generator).to(hidden.device)
        eta = eta * size / hidden.shape[-1] ** 0.5
        marks = mask.reshape(*hidden.shape[:-1], 1)
        length = hidden.float().norm(dim=-1, keepdim=True)
        new = (hidden + marks * length * eta).to(hidden.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = block.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def sweep_layers(
    config: Config,
    score: Callable[[Run], Mapping[str, Mapping[str, Mapping[str, float]]]],
    forget_metrics: Sequence[str],
    *,
    at_most: int | None = None,
    watch: Watch = ignore_progress,
) -> Analysis:
    """Unlearn at every layer (l-2, l-1, l) with a config and compare forgetting with utility.

    `at_most` so many layers, where there are more: evenly spread from a fifth to three quarters of
    the depth.

    `score` is `srmu.score_model`, with the tasks to measure where the config names none;
    `forget_metrics` (such as `wmdp_bio/acc`) say which of its metrics should fall, all other
    accuracies are utility. Runs that are there already are used again, so a stopped sweep goes on.
    """
    method = config.method
    if not isinstance(method, Misdirection):
        raise SrmuError(f"method {method.name} has no layer to vary; use rmu, adaptive_rmu or srmu")
    tried = candidate_layers(method, read_config(base_of(config)), at_most)
    rows: list[dict[str, Any]] = []
    with watch("layer sweep", len(tried)) as tick:
        for layer in tried:
            at = config.model_copy(update={"method": replace(method, layer=layer)})
            try:
                found = score(unlearn(at))
                rows.append({"layer": layer, **compare_scores(found, forget_metrics)})
            except DivergedError as error:
                rows.append({"layer": layer, "diverged": str(error)})
            tick(f"layer {layer}")
    known = [row for row in rows if "diverged" not in row]
    if not known:
        raise SrmuError(f"every layer of {method.name} diverged; lower train.learning_rate")
    best = max(known, key=lambda row: row["forgetting"] - row["utility_loss"])
    sentences = [
        f"Layer {best['layer']} gains most: forget accuracy falls by {best['forgetting']:.1%} and "
        f"utility by {best['utility_loss']:.1%} (points); type method.layer={best['layer']}. The "
        "sweep chose on these questions: report others."
    ]
    if lost := [str(row["layer"]) for row in rows if "diverged" in row]:
        sentences.append(f"Diverged at layers {', '.join(lost)}.")
    series = {
        name: [row.get(name.replace(" ", "_")) for row in rows]
        for name in ("forgetting", "utility loss")
    }
    at_layers = [row["layer"] for row in rows]
    panel = Panel("Unlearning at each layer", "layer", "fall in accuracy", at_layers, series)
    return Analysis("Layer sweep", {"layers": rows, "best": best["layer"]}, sentences, [panel])


def candidate_layers(
    method: Misdirection, model_config: Any, at_most: int | None = None
) -> list[int]:
    """The layers that a method can steer in a model; `at_most` so many of them, evenly spread."""
    first = method.window - (method.stream != "mlp_post")
    count = model_config.num_hidden_layers
    last = count - (getattr(model_config, "num_kv_shared_layers", None) or 0)
    if first >= last:
        raise SrmuError(
            f"this model has {last} layers to change: too few for method.window={method.window}"
        )
    if at_most is None or last - first <= at_most:
        return [*range(first, last)]
    low, high = max(first, round(count / 5)), min(last - 1, round(count * 3 / 4))
    return sorted({round(layer) for layer in np.linspace(low, high, at_most)})


def compare_scores(
    scores: Mapping[str, Mapping[str, Mapping[str, float]]], forget_metrics: Sequence[str]
) -> dict[str, Any]:
    """Accuracies before and after a run, and the mean falls of forget and of other metrics."""
    falls = {
        metric: scores["before"][metric]["value"] - scores["after"][metric]["value"]
        for metric in scores["after"]
        if metric.endswith("/acc")
    }
    for metric in forget_metrics:
        if metric not in falls:
            known = ", ".join(falls) or "none"
            raise SrmuError(f"no accuracy {metric} was measured; there are {known}")
    others = [fall for metric, fall in falls.items() if metric not in forget_metrics]
    if not forget_metrics or not others:
        raise SrmuError("a layer sweep needs an accuracy to lower and another one to keep")
    return {
        "forgetting": fmean(falls[metric] for metric in forget_metrics),
        "utility_loss": fmean(others),
        "before": {metric: scores["before"][metric]["value"] for metric in falls},
        "after": {metric: scores["after"][metric]["value"] for metric in falls},
    }


def draw_histogram(
    title: str, x_title: str, values: Mapping[str, Tensor], low: float, high: float
) -> Panel:
    """Shares of values in bins between two limits, one series for each name that has values."""
    edges = np.linspace(low, high, BINS + 1)
    series = {}
    for name, each in values.items():
        if len(each):
            counts, _ = np.histogram(each.clamp(low, high).numpy(), edges)
            series[name] = (counts / len(each)).tolist()
    middles = ((edges[:-1] + edges[1:]) / 2).round(4).tolist()
    return Panel(title, x_title, "share of tokens", middles, series, "bars")


def mean_or_none(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None
