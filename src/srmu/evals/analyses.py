"""The analyses of Adaptive RMU (arXiv 2408.06223) on a model, or on a run before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from srmu.data.sources import read_texts
from srmu.data.tokens import batch_rows, tokenise_texts
from srmu.engine.generate import list_ends, write_on
from srmu.engine.hooks import edit_outputs
from srmu.engine.losses import is_counted, is_predicted, without_first
from srmu.engine.model import Batch, EditableModel, Site
from srmu.engine.progress import Watch, ignore_progress
from srmu.engine.train import move_batch
from srmu.errors import SrmuError
from srmu.evals.figures import Analysis, Panel, draw_histogram, format_number
from srmu.methods import Misdirection
from srmu.runs.open import open_target
from srmu.runs.record import STATE
from srmu.runs.run import Run

MEASURES = ("logit", "probability", "margin", "entropy")  # of confidence
Texts = Mapping[str, Sequence[str]]  # "forget" and "retain"


def open_model(target: str | Path, device: str = "auto") -> tuple[EditableModel, Any]:
    """Open a model folder, a hub id or a run, with its tokenizer.

    For a run, `frozen()` of the model that is returned is the model before it.
    """
    opened = open_target(target, device)
    run = opened.run
    if run and (reason := run.config.method.no_checkpoint):
        raise SrmuError(reason)
    model = EditableModel(opened.module, run.record["changed"] if run else [])
    with opened.after():
        return model, opened.tokenizer


def read_topic_texts(run: Run) -> dict[str, list[str]]:
    """The forget and the retain texts of a run's topics."""
    topics = run.config.topics.values()
    return {
        "forget": [text for topic in topics for text in read_texts(topic.forget)],
        "retain": [text for topic in topics for text in read_texts(topic.retain)],
    }


def list_states(model: EditableModel) -> dict[str, Any]:
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


def prepare_sets(texts: Texts, tokenizer: Any, documents: int, max_length: int) -> dict[str, list[Batch]]:
    return {name: prepare_batches(rows, tokenizer, documents, max_length) for name, rows in texts.items()}


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
    """Measure how sure a model is of its next token, as means over tokens.

    These are the largest logit, the largest probability, its margin over the second largest, and
    the entropy in nats.

    `predicted`: at each token of the texts that another comes before. `generated`: at `new_tokens`
    greedily chosen tokens after the first half of each text, up to its end of sequence.
    """
    parts = prepare_sets(texts, tokenizer, documents, max_length)
    states = list_states(model)
    means: dict[str, dict[str, dict[str, float]]] = {name: {} for name in parts}
    probabilities: dict[str, Tensor] = {}
    with watch("reading the model's confidence", sum(map(len, parts.values())) * len(states)) as tick:
        for (when, state), (name, batches) in product(states.items(), parts.items()):
            rows = []
            for batch in batches:
                with state(), torch.no_grad():
                    if tokens == "predicted":
                        rows.append(measure_predicted(model, batch))
                    else:
                        rows.append(measure_generated(model, batch, new_tokens))
                tick("")
            table = torch.cat(rows)  # (N, 4)
            probabilities[f"{name}, {when}"] = table[:, 1]
            columns = zip(MEASURES, table.double().mean(dim=0).tolist(), strict=True)
            means[name][when] = {**dict(columns), "tokens": len(table)}
    panel = draw_histogram(f"Largest probability of {tokens} tokens", "largest probability", probabilities, 0.0, 1.0)
    numbers = {"tokens": tokens, "confidence": means}
    return Analysis("Token confidence", numbers, describe_confidence(means, tokens), [panel])


def describe_confidence(means: Mapping[str, Mapping[str, Mapping[str, float]]], tokens: str) -> list[str]:
    """The numbers of `measure_confidence`, in sentences."""
    sentences = [
        f"{name}, {when}: largest probability {row['probability']:.2f} (margin "
        f"{row['margin']:.2f}), largest logit {row['logit']:.1f}, entropy {row['entropy']:.2f} "
        f"nats, over {row['tokens']} {tokens} tokens."
        for name, states in means.items()
        for when, row in states.items()
    ]
    changes = [
        f"{states['after']['probability'] - states['before']['probability']:+.2f} on {name} texts"
        for name, states in means.items()
        if "before" in states
    ]
    if changes:
        sentences.append(f"The run changed the largest probability by {', '.join(changes)}.")
    return sentences


def measure_logits(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N 4"]:
    """Each row's largest logit, largest probability, its margin over the next, entropy (nats)."""
    logits = logits.float()
    logs = logits.log_softmax(dim=-1)
    two = logs.exp().topk(2, dim=-1).values
    entropy = -(logs.exp() * logs).nansum(dim=-1)
    return torch.stack([logits.max(dim=-1).values, two[:, 0], two[:, 0] - two[:, 1], entropy], dim=-1)


def measure_predicted(model: EditableModel, batch: Batch) -> Float[Tensor, "N 4"]:
    batch = move_batch(batch, model.device)
    logits = model.logits(batch)[:, :-1]
    return measure_logits(logits[is_predicted(batch["labels"])]).cpu()


def measure_generated(model: EditableModel, batch: Batch, new_tokens: int) -> Float[Tensor, "N 4"]:
    """The same numbers at the tokens that the model generates after the first half of each row."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    rows = zip(batch["input_ids"].tolist(), lengths, strict=True)
    halves = [row[: max(1, length // 2)] for row, length in rows]
    ends = list_ends(model.module)
    _, logits = write_on(model.module, halves, new_tokens, ends, keep_logits=True)
    return measure_logits(torch.cat(logits)).cpu()


def measure_alignment(
    run: Run,
    model: EditableModel,
    tokenizer: Any,
    *,
    documents: int = 64,
    max_length: int = 128,
    watch: Watch = ignore_progress,
) -> Analysis:
    """Compare forget activations with a run's direction and its target, by their cosine.

    This is done before the run, after it, and for the displacement h - h0: means by layer, and a
    histogram at the run's own layer.

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
    topics, sentences, panels = {}, [], []
    with watch("measuring directions", len(run.config.topics) * count) as tick:
        for number, (name, topic) in enumerate(run.config.topics.items(), 1):
            texts = read_texts(topic.forget)
            batches = prepare_batches(texts, tokenizer, documents, max_length)
            layers = []
            for layer in range(count):
                place = Site(layer, site.stream)
                layers.append(
                    {
                        kind: measure_cosines(model, batches, place, vectors[f"{name}.{kind}"])
                        for kind in ("direction", "target")
                    }
                )
                tick("")
            topics[name] = means = [
                {kind: {k: average_or_none(v) for k, v in row[kind].items()} for kind in row} for row in layers
            ]
            sentences.append(describe_alignment(number, site.layer, means[site.layer]))
            panels += draw_alignment(number, means, layers[site.layer]["target"], site.layer)
    numbers = {"layer": site.layer, "stream": site.stream, "topics": topics}
    return Analysis("Alignment with the direction", numbers, sentences, panels)


def describe_alignment(number: int, layer: int, means: Mapping[str, Mapping[str, Any]]) -> str:
    direction, target = (
        {key: format_number(value) for key, value in means[kind].items()} for kind in ("direction", "target")
    )
    return (
        f"Topic {number}, layer {layer}: cosine of forget activations with the direction "
        f"{direction['before']} before and {direction['after']} after, of their displacement "
        f"{direction['displacement']}; with the target {target['after']} after, displacement "
        f"{target['displacement']}."
    )


def draw_alignment(
    number: int, layers: Sequence[Mapping[str, Any]], at_own: Mapping[str, Tensor], own: int
) -> list[Panel]:
    """Mean cosines by layer, and all of them with the target at the layer `own`."""
    panels = []
    for kind in ("direction", "target"):
        means = [row[kind] for row in layers]
        series = {key: [row[key] for row in means] for key in means[0]}
        title = f"Cosine with the {kind}, topic {number}"
        panels.append(Panel(title, "layer", "mean cosine", [*range(len(layers))], series))
    title = f"Cosines with the target at layer {own}, topic {number}"
    return [*panels, draw_histogram(title, "cosine", at_own, -1.0, 1.0)]


@torch.no_grad()
def measure_cosines(
    model: EditableModel, batches: Sequence[Batch], site: Site, vector: Float[Tensor, " D"]
) -> dict[str, Float[Tensor, " N"]]:
    """Each token's cosine with a vector: `before`, `after`, and that of its `displacement`.

    Tokens that did not move have none.
    """
    cosines: dict[str, list[Tensor]] = {"before": [], "after": [], "displacement": []}
    for batch in batches:
        mask = without_first(is_counted(batch["labels"])).to(model.device)
        batch = move_batch(batch, model.device)
        with model.frozen():
            before = model.hidden(batch, site, keep=False)[mask].float()
        after = model.hidden(batch, site)[mask].float()
        moved = (after - before)[(after != before).any(dim=-1)]
        for name, values in zip(cosines, (before, after, moved), strict=True):
            line = vector.to(values.device, values.dtype)
            cosines[name].append(torch.cosine_similarity(values, line, dim=-1).cpu())
    return {name: torch.cat(parts) for name, parts in cosines.items()}


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
    parts = prepare_sets(texts, tokenizer, documents, max_length)
    count, states = len(model.layers), list_states(model)
    psi: dict[str, list[float]] = {}
    with watch("adding noise", count * len(parts) * len(states)) as tick:
        for (name, batches), (when, state) in product(parts.items(), states.items()):
            values = psi[f"{name}, {when}"] = []
            for layer in range(count):
                with state(), torch.no_grad():
                    values.append(measure_layer(model, batches, layer, size, draws, seed))
                tick("")
    sentences = [
        f"{name}: noise of {size:g} of an activation's norm comes out most amplified from layer "
        f"{values.index(max(values))} (psi {max(values):.3g}) and least from layer "
        f"{values.index(min(values))} (psi {min(values):.3g}); {size**2:.3g} is neither more nor "
        "less than went in."
        for name, values in psi.items()
    ]
    panel = Panel("Noise sensitivity", "layer", "psi", [*range(count)], psi)
    numbers = {"psi": psi, "size": size, "draws": draws, "seed": seed}
    return Analysis("Noise sensitivity of layers", numbers, sentences, [panel])


@torch.no_grad()
def measure_layer(
    model: EditableModel, batches: Sequence[Batch], layer: int, size: float, draws: int = 1, seed: int = 0
) -> float:
    """Noise sensitivity of one layer in the model's present state."""
    generator = torch.Generator().manual_seed(seed)
    ratios = []
    for batch in batches:
        mask = without_first(is_counted(batch["labels"])).to(model.device)
        inputs = move_batch({k: batch[k] for k in ("input_ids", "attention_mask")}, model.device)
        clean = model.module.base_model(**inputs, use_cache=False)[0][mask].float()
        for _ in range(draws):
            with add_noise(model.layers[layer], mask, size, generator):
                noisy = model.module.base_model(**inputs, use_cache=False)[0][mask].float()
            # Adaptive RMU (arXiv 2408.06223), noise sensitivity of a layer
            ratios.append((noisy - clean).square().sum(dim=-1) / clean.square().sum(dim=-1))
    return float(torch.cat(ratios).double().mean())


def add_noise(block: nn.Module, mask: Tensor, size: float, generator: torch.Generator) -> AbstractContextManager[None]:
    """Add |h| eta to a block's output h at the marked tokens (B, T)."""

    def add(hidden: Tensor) -> Tensor:
        if hidden.ndim == 4:  # Gemma 3n
            raise SrmuError("this model keeps several streams: its layers' noise is not measured")
        eta = torch.randn(hidden.shape, generator=generator).to(hidden.device)
        eta = eta * size / hidden.shape[-1] ** 0.5
        marks = mask.reshape(*hidden.shape[:-1], 1)
        length = hidden.float().norm(dim=-1, keepdim=True)
        return hidden + marks * length * eta

    return edit_outputs({block: add})


def average_or_none(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None
