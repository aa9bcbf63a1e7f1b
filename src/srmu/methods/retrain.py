"""Exact unlearning on the testbed: training again without the hazard facts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from srmu.engine.files import read_json
from srmu.engine.model import copy_values
from srmu.errors import SrmuError
from srmu.methods.base import Edit, EditableModel, State, Topic, Watch
from srmu.testbed import build
from srmu.testbed import train as training
from srmu.testbed.world import World


@dataclass(frozen=True, kw_only=True)
class Retrain(Edit):
    """Trains the testbed's model again without the facts to forget, as a reference."""

    name = "retrain"
    paper = "arXiv 1912.03817"
    level = "weights"
    uses = ("the testbed's recipe",)

    def edit(self, model: EditableModel, topics: Sequence[Topic], watch: Watch) -> dict[str, State]:
        world, seed, recipe = read_recipe(model.folder)
        # New documents without the hazard facts: the same number, for as many steps.
        entry = training.train_testbed(world, seed, recipe, oracle=True, watch=watch)
        tensors = load_file(entry / "model.safetensors")
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in model.trained.items()}:
            raise SrmuError(f"{model.folder} is not the model that testbed.json beside it describes")
        copy_values([*model.trained.values()], [tensors[name] for name in model.trained])
        return {}


def read_recipe(folder: Path | None) -> tuple[World, int, training.Recipe]:
    """World, seed and recipe of the testbed that the model in `folder` belongs to."""
    path = folder.parent / "testbed.json" if folder else None
    if path is None or not path.is_file():
        why = f"{folder or 'this'} is not a testbed's model (no testbed.json beside it)"
        raise SrmuError(f"method retrain knows only the testbed's recipe: {why}; srmu testbed OUT")
    try:
        report: Any = read_json(path)
        if report["world"] == "atlas":
            raise SrmuError(f"method retrain: the model of the testbed {path.parent} is a real one; it has no recipe")
        recipe = training.Recipe(**report["recipe"])
        create, _ = build.WORLDS[report["world"]]
        return create(report["seed"], recipe.size), report["seed"], recipe
    except (ValueError, KeyError, TypeError):
        raise SrmuError(f"{path}: not the report of a testbed of this version; make it anew") from None
