"""The analyses of Adaptive RMU (arXiv 2408.06223) on a model, or on a run before and after."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from srmu.data.sources import read_texts
from srmu.data.tokens import batch_rows, tokenise_texts
from srmu.engine import generate, loading, losses, sites, train, weights
from srmu.engine.model import Batch, EditableModel, Site
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import DivergedError, SrmuError
from srmu.evals.figures import Analysis, Panel, draw_histogram, write_sentences
from srmu.evals.results import Metrics
from srmu.evals.score import score_model
from srmu.methods import Misdirection
from srmu.runs.config import Config
from srmu.runs.record import STATE
from srmu.runs.run import Run, open_target, unlearn_config

BATCH = 8  # texts read at once
DOCUMENTS = 64  # of each set that are read at most
LENGTH = 128  # tokens of a text that are read at most
NEW_TOKENS = 16  # written after half of a text
# Of the noise sensitivity: documents, size of the noise, draws, seed.
NOISY, SIZE, DRAWS, SEED = 16, 0.1, 2, 0
MEASURES = ("logit", "probability", "margin", "entropy")  # of confidence
Texts = Mapping[str, Sequence[str]]  # "forget" and "retain"


def open_model(target: str | Path, device: str = "auto") -> tuple[EditableModel, Any]:
    """A model folder, a hub id or a run, with its tokenizer; `frozen()` of a run's model is the model before it."""
    opened = open_target(target, device)
    run = opened.run
    if run and (reason := run.config.method.no_checkpoint):
        raise SrmuError(reason)
    model = EditableModel(opened.module, run.record["changed"] if run else [])
    with opened.after():
        return model, opened.tokenizer


def list_states(model: EditableModel) -> dict[str, Any]:
    return {"before": model.frozen, "after": nullcontext} if model.trained else {"model": nullcontext}


def prepare_sets(
    model: EditableModel, texts: Texts, tokenizer: Any, documents: int = DOCUMENTS
) -> dict[str, list[Batch]]:
    """The first `documents` texts of each set as batches; SrmuError where none has two tokens."""
    sets, length = {}, min(LENGTH, model.position_count or LENGTH)
    for name, some in texts.items():
        rows = tokenise_texts(list(some)[:documents], tokenizer, length) if some else []
        if not rows:
            raise SrmuError("no text of two tokens or more to analyse; name forget and retain texts")
        sets[name] = list(batch_rows(rows, tokenizer, BATCH, "mask"))
    return sets


def measure_confidence(
    model: EditableModel, tokenizer: Any, texts: Texts, *, watch: Watch = ignore_progress
) -> Analysis:
    """Means of MEASURES (entropy in nats) over NEW_TOKENS that a model writes greedily after half of each text."""
    parts, states = prepare_sets(model, texts, tokenizer), list_states(model)
    means: dict[str, dict[str, dict[str, float]]] = {name: {} for name in parts}
    probabilities: dict[str, Tensor] = {}
    with watch("reading the model's confidence", sum(map(len, parts.values())) * len(states)) as tick:
        for (when, state), (name, batches) in product(states.items(), parts.items()):
            rows = []
            for batch in batches:
                with state():
                    rows.append(measure_tokens(model, batch))
                tick("")
            table = torch.cat(rows)  # (N, 4)
            probabilities[f"{name}, {when}"] = table[:, 1]
            means[name][when] = dict(zip(MEASURES, table.double().mean(dim=0).tolist(), strict=True), tokens=len(table))
    panel = draw_histogram("Largest probability of each token", "largest probability", probabilities, 0.0, 1.0)
    return Analysis("Token confidence", {"confidence": means}, write_sentences("confidence.txt", means=means), [panel])


def measure_logits(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N 4"]:
    """Each row's largest logit, largest probability, its margin over the next, entropy (nats)."""
    logits = logits.float()
    logs = logits.log_softmax(dim=-1)
    two = logs.exp().topk(2, dim=-1).values
    entropy = -(logs.exp() * logs).nansum(dim=-1)
    return torch.stack([logits.max(dim=-1).values, two[:, 0], two[:, 0] - two[:, 1], entropy], dim=-1)


def measure_tokens(model: EditableModel, batch: Batch) -> Float[Tensor, "N 4"]:
    """`measure_logits` at each token that the model writes after half of each row."""
    rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(dim=1).tolist(), strict=True)
    halves = [row[: max(1, length // 2)] for row, length in rows]
    room = (model.position_count or LENGTH + NEW_TOKENS) - max(map(len, halves))
    ends = generate.list_ends(model.module)
    _, logits = generate.write_on(model.module, halves, min(NEW_TOKENS, room), ends, keep_logits=True)
    return measure_logits(torch.cat(logits)).cpu()


def measure_alignment(run: Run, model: EditableModel, tokenizer: Any, *, watch: Watch = ignore_progress) -> Analysis:
    """The cosine of forget activations, and of their displacement h - h0, with a run's direction.

    Before the run and after it: means by layer (`None` where nothing moved), and a histogram at the run's own layer.
    Each text's first token is left out. `model` is `open_model` of the run.
    """
    method = run.config.method
    vectors = load_file(run.folder / STATE) if (run.folder / STATE).exists() else {}
    if not isinstance(method, Misdirection) or not any(".direction" in name for name in vectors):
        raise SrmuError(f"alignment needs a run with one direction, like one of rmu or srmu; {method.name} keeps none")
    site, count = method.site, len(model.layers)
    topics, panels = {}, []
    with watch("measuring directions", len(run.config.topics) * count) as tick:
        for number, (name, topic) in enumerate(run.config.topics.items(), 1):
            batches = prepare_sets(model, {name: read_texts(topic.forget)}, tokenizer)[name]
            layers = []
            for layer in range(count):
                layers.append(measure_cosines(model, batches, Site(layer, site.stream), vectors[f"{name}.direction"]))
                tick("")
            topics[name] = means = [
                {key: float(each.double().mean()) if len(each) else None for key, each in row.items()} for row in layers
            ]
            series = {key: [row[key] for row in means] for key in means[0]}
            about = f"Cosine with the direction, topic {number}"
            panels.append(Panel(about, "layer", "mean cosine", [*range(count)], series))
            panels.append(draw_histogram(f"{about}, layer {site.layer}", "cosine", layers[site.layer], -1.0, 1.0))
    numbers = {"layer": site.layer, "stream": site.stream, "topics": topics}
    sentences = write_sentences("alignment.txt", rows=[rows[site.layer] for rows in topics.values()], layer=site.layer)
    return Analysis("Alignment with the direction", numbers, sentences, panels)


@torch.no_grad()
def measure_cosines(
    model: EditableModel, batches: Sequence[Batch], site: Site, vector: Float[Tensor, " D"]
) -> dict[str, Float[Tensor, " N"]]:
    """Each token's cosine with a vector: `before`, `after`, and that of its `displacement` where it moved."""
    cosines: dict[str, list[Tensor]] = {"before": [], "after": [], "displacement": []}
    for batch in batches:
        mask = losses.without_first(losses.is_counted(batch["labels"]), batch["attention_mask"]).to(model.device)
        batch = train.move_batch(batch, model.device)
        with model.frozen():
            before = model.hidden(batch, site, keep=False)[mask].float()
        after = model.hidden(batch, site)[mask].float()
        moved = (after - before)[(after != before).any(dim=-1)]
        line = vector.to(after)
        for name, values in zip(cosines, (before, after, moved), strict=True):
            cosines[name].append(torch.cosine_similarity(values, line, dim=-1).cpu())
    return {name: torch.cat(parts) for name, parts in cosines.items()}


def measure_sensitivity(
    model: EditableModel, tokenizer: Any, texts: Texts, *, watch: Watch = ignore_progress
) -> Analysis:
    """How much noise in each layer's output changes what the model reads its answer from.

    psi_l = E |g_l(h + |h| eta) - g_l(h)|^2 / |g_l(h)|^2, eta ~ N(0, SIZE^2 I / D) a token, g_l the layers above l with
    the final norm: up to what the unembedding reads; the mean over tokens and DRAWS draws. Each text's first token, an
    attention sink, stays as it is and is left out. A network that passes its input on unchanged has psi = SIZE^2.
    """
    parts, states, count = prepare_sets(model, texts, tokenizer, NOISY), list_states(model), len(model.layers)
    psi: dict[str, list[float]] = {}
    with watch("adding noise", count * len(parts) * len(states)) as tick:
        for (name, batches), (when, state) in product(parts.items(), states.items()):
            values = psi[f"{name}, {when}"] = []
            for layer in range(count):
                with state(), torch.no_grad():
                    values.append(measure_layer(model, batches, layer))
                tick("")
    ends = {name: [(values.index(one), one) for one in (max(values), min(values))] for name, values in psi.items()}
    sentences = write_sentences("sensitivity.txt", ends=ends, size=SIZE, neutral=SIZE**2)
    panel = Panel("Noise sensitivity", "layer", "psi", [*range(count)], psi)
    numbers = {"psi": psi, "size": SIZE, "draws": DRAWS, "seed": SEED}
    return Analysis("Noise sensitivity of layers", numbers, sentences, [panel])


@torch.no_grad()
def measure_layer(
    model: EditableModel, batches: Sequence[Batch], layer: int, size: float = SIZE, draws: int = DRAWS
) -> float:
    """Noise sensitivity of one layer in the model's present state."""
    generator = torch.Generator().manual_seed(SEED)
    ratios = []
    for batch in batches:
        mask = losses.without_first(losses.is_counted(batch["labels"]), batch["attention_mask"]).to(model.device)
        inputs = train.move_batch({k: batch[k] for k in ("input_ids", "attention_mask")}, model.device)

        def add_noise(hidden: Tensor, mask: Tensor = mask) -> Tensor:
            if hidden.ndim == 4:  # Gemma 3n
                raise SrmuError("this model keeps several streams: srmu does not measure noise in its layers")
            eta = torch.randn(hidden.shape, generator=generator).to(hidden.device)
            eta = eta * size / hidden.shape[-1] ** 0.5
            length = hidden.float().norm(dim=-1, keepdim=True)
            return hidden + mask.reshape(*hidden.shape[:-1], 1) * length * eta

        clean = model.module.base_model(**inputs, use_cache=False)[0][mask].float()
        for _ in range(draws):
            with sites.edit_outputs({model.layers[layer]: add_noise}):
                noisy = model.module.base_model(**inputs, use_cache=False)[0][mask].float()
            # Adaptive RMU (arXiv 2408.06223), noise sensitivity of a layer
            ratios.append((noisy - clean).square().sum(dim=-1) / clean.square().sum(dim=-1))
    return float(torch.cat(ratios).cpu().double().mean())


def sweep_layers(config: Config, forget_metrics: Sequence[str], *, watch: Watch = ignore_progress) -> Analysis:
    """Unlearn at every layer with a config: `forget_metrics` (`wmdp_bio/acc`) should fall, other accuracies stay."""
    method = config.method
    if not isinstance(method, Misdirection):
        raise SrmuError(f"method {method.name} has no layer to vary; use rmu, adaptive_rmu or srmu")
    tried = candidate_layers(method, loading.read_config(weights.locate_model(config.model, config.revision)))
    rows: list[dict[str, Any]] = []
    with watch("layer sweep", len(tried)) as tick:
        for layer in tried:
            at = config.model_copy(update={"method": replace(method, layer=layer)})
            try:
                rows.append({"layer": layer, **compare_scores(score_model(unlearn_config(at)), forget_metrics)})
            except DivergedError as error:
                rows.append({"layer": layer, "diverged": str(error)})
            tick(f"layer {layer}")
    known = [row for row in rows if "diverged" not in row]
    if not known:
        raise SrmuError(f"every layer of {method.name} diverged; lower train.learning_rate")
    best = max(known, key=lambda row: row["forgetting"] - row["utility_loss"])
    lost = [row["layer"] for row in rows if "diverged" in row]
    sentences = write_sentences("layer_sweep.txt", best=best, lost=lost)
    series = {key.replace("_", " "): [row.get(key) for row in rows] for key in ("forgetting", "utility_loss")}
    panel = Panel("Unlearning at each layer", "layer", "fall in accuracy", [row["layer"] for row in rows], series)
    return Analysis("Layer sweep", {"layers": rows, "best": best["layer"]}, sentences, [panel])


def candidate_layers(method: Misdirection, model_config: Any, at_most: int | None = None) -> list[int]:
    """The layers that a method can steer; at most `at_most`, spread from a fifth to three quarters of the depth."""
    first = method.window - (method.stream != "mlp_post")
    count = model_config.num_hidden_layers
    last = count - (getattr(model_config, "num_kv_shared_layers", None) or 0)
    if first >= last:
        raise SrmuError(f"this model has {last} layers to change: too few for method.window={method.window}")
    if at_most is None or last - first <= at_most:
        return [*range(first, last)]
    low, high = max(first, round(count / 5)), min(last - 1, round(count * 3 / 4))
    return sorted({round(layer) for layer in np.linspace(low, high, at_most)})


def compare_scores(scores: Mapping[str, Metrics], forget_metrics: Sequence[str]) -> dict[str, float]:
    """How much a run lowered the forget accuracies and the others, on average."""
    before, after = scores["before"], scores["after"]
    falls = {name: before[name]["value"] - after[name]["value"] for name in after if name.endswith("/acc")}
    for metric in forget_metrics:
        if metric not in falls:
            raise SrmuError(f"no accuracy {metric} was measured; there are {', '.join(falls) or 'none'}")
    others = [fall for metric, fall in falls.items() if metric not in forget_metrics]
    if not forget_metrics or not others:
        raise SrmuError("a layer sweep needs an accuracy to lower and another one to keep")
    return {"forgetting": fmean(falls[metric] for metric in forget_metrics), "utility_loss": fmean(others)}
