"""How well each layer of a model tells forget from retain texts, and advice for a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from srmu.data.overlap import Definition, count_shared, measure_contamination, measure_coverage, ngram_overlap
from srmu.data.tokens import batch_rows, tokenise_texts
from srmu.engine import losses, sites, train
from srmu.engine.model import Batch, count_positions
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.evals.figures import Analysis, Panel, write_sentences
from srmu.evals.statistics import Array
from srmu.evals.subject import Question
from srmu.methods.importance import (
    FLAT,
    FLAT_WORDS,
    describe_importance,
    importance_map,
    measure_features,
    sum_features,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DOCUMENTS = 200  # of each set that are read at most
TOKENS = 1000  # of each set that are compared at most
LENGTH = 512  # tokens of a text that are read at most
BATCH = 8  # texts read at once
COMPONENTS = 10  # principal directions of each set
SEED = 0
FOLDS = 5
OUTLIER = 10  # times the median: what is larger is an outlier of the importance map
LISTED = 20  # outliers of a layer, the largest first
CLEAR = 0.75  # balanced accuracy from which a layer tells the sets apart
# Entanglement: below the one no protection, above the other a risk. On the testbed it is 0.06 for
# general texts, 0.33 for those on other compounds, 0.6 for those on all compounds to forget.
LOW, HIGH = 0.2, 0.5
# Of each picture: its title, that of its axis, and the series with their keys in the numbers of a layer.
PANELS = (
    ("Telling forget from retain tokens", "balanced accuracy", {"accuracy": "accuracy"}),
    ("How alike the two sets are", "cosine", {"of the means": "mean_cosine", "of the subspaces": "subspace_cosine"}),
    ("Importance map", "in 0-1", {"Gini coefficient": "gini", "share above 0.5": "share_above_half"}),
)


class Sample(NamedTuple):
    """Documents of a set as batches, which tokens are kept (`chosen`), and the document of each (`owners`)."""

    batches: list[Batch]
    masks: list[Tensor]
    chosen: list[Tensor]
    owners: Array


def measure_entanglement(
    forget: list[str],
    retain: list[str],
    questions: Sequence[Question] = (),
    model: tuple[PreTrainedModel, Any] | None = None,
    *,
    layers: Sequence[int] | None = None,
    definition: Definition = "pair_containment",
    watch: Watch = ignore_progress,
) -> Analysis:
    """Measure what can be known about a forget and a retain set before training, with advice.

    `model` is a module with its tokenizer, whose `layers` (None: all) are compared; `definition` is that of
    `ngram_overlap`. `entanglement` is the share of the forget set's word types, stop words left out, that the retain
    set uses too: more shared words never lower it.
    """
    numbers: dict[str, Any] = {"entanglement": measure_coverage(forget, retain)}
    numbers["shared"] = count_shared(forget, retain)
    numbers["overlap"] = ngram_overlap(forget, retain, definition=definition)
    if asked := [(question.prompt, question.answer, question.entry) for question in questions]:
        sets = {"forget": forget, "retain": retain}
        numbers["contamination"] = {name: measure_contamination(asked, texts) for name, texts in sets.items()}
    panels = []
    if model is not None:
        numbers["separability"] = measure_separability(*model, forget, retain, layers, watch=watch)
        rows = [row | row["importance"] for row in numbers["separability"]["layers"]]
        for title, y_title, keys in PANELS:
            series = {name: [row[key] for row in rows] for name, key in keys.items()}
            panels.append(Panel(title, "layer", y_title, [row["layer"] for row in rows], series))
    return Analysis("Entanglement of forget and retain set", numbers, advise_user(numbers), panels)


def measure_separability(
    module: PreTrainedModel,
    tokenizer: Any,
    forget: list[str],
    retain: list[str],
    layers: Sequence[int] | None = None,
    *,
    watch: Watch = ignore_progress,
) -> dict[str, Any]:
    """Numbers of the output of `layers` (None: of each) on forget and retain texts; a text's first token is left out.

    By layer: `accuracy`, the balanced one of a logistic regression between the tokens of the two sets, cross-validated
    by document, with its standard error over folds; `mean_cosine` of the two means; `subspace_cosine`, the mean over
    the principal angles between the first COMPONENTS principal directions of each set; `importance`, SRMU's map there,
    of all tokens that are read.
    """
    generator = torch.Generator().manual_seed(SEED)
    samples = []
    for name, texts in (("forget", forget), ("retain", retain)):
        few = [texts[i] for i in torch.randperm(len(texts), generator=generator)[:DOCUMENTS]]
        read = tokenise_texts(few, tokenizer, min(LENGTH, count_positions(module) or LENGTH)) if few else []
        samples.append(draw_sample(name, [*batch_rows(read, tokenizer, BATCH, "mask")], TOKENS, generator))
    if (least := min(len(sample.owners) for sample in samples)) <= COMPONENTS:
        raise SrmuError(f"{least} tokens of a set are too few to compare: more than {COMPONENTS} are needed; add texts")
    compared = range(len(sites.decoder_blocks(module))) if layers is None else layers
    with watch("reading the texts", sum(len(s.batches) for s in samples)) as tick:
        read_all = [sample_activations(module, sample, compared, tick) for sample in samples]
    rows = []
    with watch("comparing layers", len(compared)) as tick:
        for layer, (left, f_sums), (right, r_sums) in zip(compared, *read_all, strict=True):
            accuracy, error = classify_sets(left, right, *(sample.owners for sample in samples))
            one, other = left.mean(axis=0), right.mean(axis=0)
            row: dict[str, Any] = {"layer": layer, "accuracy": accuracy, "stderr": error}
            row["mean_cosine"] = float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other) + 1e-12))
            row["subspace_cosine"] = float(measure_principal_cosines(left, right, COMPONENTS).mean())
            rows.append(row | {"importance": describe_selectivity(f_sums, r_sums)})
            tick("")
    documents = [len(set(sample.owners.tolist())) for sample in samples]
    return {"layers": rows, "documents": documents, "tokens": [len(sample.owners) for sample in samples]}


def draw_sample(name: str, batches: list[Batch], tokens: int, generator: torch.Generator) -> Sample:
    """Choose `tokens` tokens at random, never the first of a document."""
    masks = [losses.without_first(losses.is_counted(batch["labels"]), batch["attention_mask"]) for batch in batches]
    flat = torch.cat([torch.zeros(0, dtype=torch.bool), *(mask.flatten() for mask in masks)])
    places = flat.nonzero()[:, 0]
    kept = torch.zeros_like(flat)
    kept[places[torch.randperm(len(places), generator=generator)[:tokens]]] = True
    parts = kept.split([mask.numel() for mask in masks])
    chosen = [part.view_as(mask) for part, mask in zip(parts, masks, strict=True)]
    widths = torch.tensor([mask.shape[1] for mask in masks for _ in mask], dtype=torch.long)
    documents = torch.arange(len(widths)).repeat_interleave(widths)[kept].numpy()
    if (count := len(set(documents.tolist()))) < 2:
        raise SrmuError(f"{count} document of the {name} set has tokens to compare; 2 or more are needed")
    return Sample(batches, masks, chosen, documents)


@torch.no_grad()
def sample_activations(
    module: PreTrainedModel, sample: Sample, layers: Sequence[int], tick: Callable[[str], None]
) -> list[tuple[Array, Tensor]]:
    """The activations of the chosen tokens (N, D), and `sum_features` of all tokens, by layer."""
    blocks = [sites.decoder_blocks(module)[layer] for layer in layers]
    values: list[list[Tensor]] = [[] for _ in blocks]
    totals: list[Tensor | int] = [0 for _ in blocks]
    masks: list[Tensor] = []  # of the batch that is read: all tokens, the chosen ones

    def see(layer: int, hidden: Tensor) -> None:
        if hidden.ndim == 4:  # Gemma 3n
            raise SrmuError(f"{type(module).__name__} keeps several streams, which srmu does not compare")
        hidden = hidden.reshape(*masks[0].shape, -1)  # OPT flattens inside its layers
        totals[layer] = totals[layer] + sum_features(hidden, masks[0]).cpu()
        values[layer].append(hidden[masks[1]].float().cpu())

    with sites.edit_outputs({block: partial(see, i) for i, block in enumerate(blocks)}):
        for batch, mask, chosen in zip(sample.batches, sample.masks, sample.chosen, strict=True):
            masks[:] = mask.to(module.device), chosen.to(module.device)
            read = train.move_batch({k: batch[k] for k in ("input_ids", "attention_mask")}, module.device)
            module.base_model(**read, use_cache=False)
            tick("")
    return [(torch.cat(parts).numpy(), torch.as_tensor(total)) for parts, total in zip(values, totals, strict=True)]


def classify_sets(left: Array, right: Array, left_owners: Array, right_owners: Array) -> tuple[float, float]:
    """Balanced accuracy of a linear classifier on documents it has not seen, and its standard error over folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    values = np.concatenate([left, right])
    labels = np.repeat([1, 0], [len(left), len(right)])
    groups = np.concatenate([left_owners, right_owners + left_owners.max() + 1])
    folds = min(FOLDS, *(len(np.unique(x)) for x in (left_owners, right_owners)))
    # Scaled: a few outlier features would rule the penalty.
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=200, tol=1e-3))
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=SEED)
    accuracies = cross_val_score(model, values, labels, groups=groups, cv=parts, scoring="balanced_accuracy")
    return float(np.mean(accuracies)), float(np.std(accuracies, ddof=1) / len(accuracies) ** 0.5)


def measure_principal_cosines(left: Array, right: Array, k: int) -> Array:
    """Cosines of the principal angles between the first `k` principal directions of two sets."""
    bases = []
    for values in (left, right):
        centred = torch.from_numpy(values - values.mean(axis=0)).double()
        bases.append(torch.linalg.svd(centred, full_matrices=False).Vh[:k])
    return torch.linalg.svdvals(bases[0] @ bases[1].T).clamp(max=1).numpy()


def describe_selectivity(forget: Float[Tensor, "5 D"], retain: Float[Tensor, "5 D"]) -> dict[str, Any]:
    """How selective SRMU's default map is for these sums, and its outlier dimensions."""
    map_ = importance_map(measure_features([forget])[0], measure_features([retain])[0], "ratio")
    median = float(map_.median())
    largest = map_.argsort(descending=True)[:LISTED].tolist()
    outliers = [{"dimension": i, "value": float(map_[i])} for i in largest if map_[i] > OUTLIER * median]
    return {**describe_importance(map_), "median": median, "outliers": outliers}


def choose_layer(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lowest layer whose accuracy is within one standard error of the highest."""
    top = max(layers, key=lambda row: row["accuracy"])
    return next(r for r in layers if r["accuracy"] >= top["accuracy"] - top["stderr"])


def advise_user(numbers: dict[str, Any]) -> list[str]:
    """What the numbers of `measure_entanglement` mean, in sentences."""
    best = choose_layer(numbers["separability"]["layers"]) if "separability" in numbers else None
    limits = {"low": LOW, "high": HIGH, "clear": CLEAR, "flat": FLAT, "flat_words": FLAT_WORDS, "outlier": OUTLIER}
    return write_sentences("entanglement.txt", **numbers, **limits, best=best)
