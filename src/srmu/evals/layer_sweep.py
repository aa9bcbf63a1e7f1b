"""A run at every layer: where forgetting costs least."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np

from srmu.engine.loading import read_config
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import DivergedError, SrmuError
from srmu.evals.figures import Analysis, Panel, write_sentences
from srmu.methods import Misdirection
from srmu.runs.config import Config
from srmu.runs.plan import locate_base
from srmu.runs.run import Run, unlearn_config

Scores = Mapping[str, Mapping[str, Mapping[str, float]]]  # before and after, by metric


def sweep_layers(
    config: Config, score: Callable[[Run], Scores], forget_metrics: Sequence[str], *, watch: Watch = ignore_progress
) -> Analysis:
    """Unlearn at every layer (l-2, l-1, l) with a config and compare forgetting with utility.

    `score` is `srmu.score_model`, with the tasks to measure where the config names none; `forget_metrics` (such as
    `wmdp_bio/acc`) say which of its metrics should fall, all other accuracies are utility. Runs that are there already
    are used again, so a stopped sweep goes on.
    """
    method = config.method
    if not isinstance(method, Misdirection):
        raise SrmuError(f"method {method.name} has no layer to vary; use rmu, adaptive_rmu or srmu")
    tried = candidate_layers(method, read_config(locate_base(config)))
    rows: list[dict[str, Any]] = []
    with watch("layer sweep", len(tried)) as tick:
        for layer in tried:
            at = config.model_copy(update={"method": replace(method, layer=layer)})
            try:
                rows.append({"layer": layer, **compare_scores(score(unlearn_config(at)), forget_metrics)})
            except DivergedError as error:
                rows.append({"layer": layer, "diverged": str(error)})
            tick(f"layer {layer}")
    known = [row for row in rows if "diverged" not in row]
    if not known:
        raise SrmuError(f"every layer of {method.name} diverged; lower train.learning_rate")
    best = max(known, key=lambda row: row["forgetting"] - row["utility_loss"])
    lost = [row["layer"] for row in rows if "diverged" in row]
    sentences = write_sentences("layer_sweep.txt", best=best, lost=lost)
    falls = {"forgetting": "forgetting", "utility loss": "utility_loss"}
    series = {name: [row.get(key) for row in rows] for name, key in falls.items()}
    panel = Panel("Unlearning at each layer", "layer", "fall in accuracy", [row["layer"] for row in rows], series)
    return Analysis("Layer sweep", {"layers": rows, "best": best["layer"]}, sentences, [panel])


def candidate_layers(method: Misdirection, model_config: Any, at_most: int | None = None) -> list[int]:
    """The layers that a method can steer in a model.

    With `at_most` no more than so many, spread evenly from a fifth to three quarters of the depth.
    """
    first = method.window - (method.stream != "mlp_post")
    count = model_config.num_hidden_layers
    last = count - (getattr(model_config, "num_kv_shared_layers", None) or 0)
    if first >= last:
        raise SrmuError(f"this model has {last} layers to change: too few for method.window={method.window}")
    if at_most is None or last - first <= at_most:
        return [*range(first, last)]
    low, high = max(first, round(count / 5)), min(last - 1, round(count * 3 / 4))
    return sorted({round(layer) for layer in np.linspace(low, high, at_most)})


def compare_scores(scores: Scores, forget_metrics: Sequence[str]) -> dict[str, Any]:
    """Accuracies before and after a run, and the mean falls of forget and of other metrics."""
    before, after = (
        {metric: scores[when][metric]["value"] for metric in scores["after"] if metric.endswith("/acc")}
        for when in ("before", "after")
    )
    falls = {metric: before[metric] - after[metric] for metric in after}
    for metric in forget_metrics:
        if metric not in falls:
            raise SrmuError(f"no accuracy {metric} was measured; there are {', '.join(falls) or 'none'}")
    others = [fall for metric, fall in falls.items() if metric not in forget_metrics]
    if not forget_metrics or not others:
        raise SrmuError("a layer sweep needs an accuracy to lower and another one to keep")
    forgetting = fmean(falls[metric] for metric in forget_metrics)
    return {"forgetting": forgetting, "utility_loss": fmean(others), "before": before, "after": after}
