"""What a method would load and change in a model, from its config alone; what a run has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srmu.engine import weights
from srmu.engine.loading import build_skeleton, read_config, refuse_quantised
from srmu.engine.model import EditableModel
from srmu.errors import SrmuError
from srmu.methods import METHODS
from srmu.runs.config import make_config
from srmu.runs.run import Run

Rows = list[dict[str, str]]


def list_reach(target: str) -> tuple[dict[str, Any], Rows]:
    """Each method's reach in a model, and a table of them; where one cannot work, why."""
    answers: dict[str, Any] = {}
    for name in METHODS:
        try:
            answers[name], _ = measure_reach(target, name)
        except SrmuError as error:
            if "such folder" in str(error) or "config.json" in str(error):
                raise  # the model's fault
            answers[name] = {"error": str(error)}
    rows = [
        {
            "method": name,
            "layers loaded": str(answer.get("layers_loaded", "")),
            "tensors": str(len(answer.get("tensors", ""))),
            "numbers changed": f"{answer.get('share', 0):.2%}",
            "note": answer.get("error", ""),
        }
        for name, answer in answers.items()
    ]
    works = sum("error" not in answer for answer in answers.values())
    sentence = f"{works} of {len(METHODS)} methods fit {target} at their defaults"
    return {"model": target, "methods": answers, "sentence": sentence}, rows


def measure_reach(target: str, name: str, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Rows]:
    """The layers a method would load and the tensors it would change, and a table of these.

    No weight is read. SrmuError where the method does not fit the model.
    """
    folder = weights.locate_model(target)
    settings = read_config(folder)
    refuse_quantised(folder, settings)
    method = make_config(target, "none", "none", name, overrides).method.resolved(settings)  # no text is read
    skeleton = build_skeleton(settings)
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    model = EditableModel(skeleton, method.trainable, method.depth, copy=False)
    shapes = {name: list(parameter.shape) for name, parameter in model.trained.items()}
    numbers = sum(parameter.numel() for parameter in model.trained.values())
    layers = settings.num_hidden_layers
    loaded = min(layers, layers if method.depth is None else method.depth)
    answer = {
        "model": target,
        "method": method.name,
        "layers": layers,
        "layers_loaded": loaded,
        "fixed_layers": model.fixed,
        "tensors": shapes,
        "numbers": numbers,
        "share": numbers / total,
        "sentence": f"{method.name} loads {loaded} of {layers} layers of {type(skeleton).__name__} and trains "
        f"{len(shapes)} tensors, {numbers / total:.2%} of {total:,} numbers",
    }
    return answer, [{"tensor": key, "shape": " x ".join(map(str, size))} for key, size in shapes.items()]


def run_changes(run: Run) -> tuple[dict[str, Any], Rows]:
    """The tensors that a run changed and by how much, and a table of them."""
    change = run.record["change"]
    rows = [
        {
            "tensor": name,
            "shape": " x ".join(map(str, entry["shape"])),
            "moved by": f"{entry['relative_norm']:.3%} of its norm",
            "numbers changed": f"{entry['share_changed']:.1%}",
        }
        for name, entry in change["tensors"].items()
    ]
    sentence = (
        f"{run.config.method.name} changed {len(rows)} tensors; the other {change['others']} are as in "
        f"{run.record['model']}"
    )
    return {"run": str(run.folder), "tensors": change["tensors"], "sentence": sentence}, rows
