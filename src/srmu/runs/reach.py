"""What a method reaches in a model: the matrices that change, and those of the same role that stay."""

import re
from collections.abc import Collection
from math import prod
from typing import Any

from torch import nn

from srmu.engine.loading import build_skeleton
from srmu.engine.model import EditableModel
from srmu.engine.sites import decoder_blocks, name_roles
from srmu.runs.config import make_config
from srmu.runs.plan import plan_run


def inspect_reach(model: str, method: str, overrides: list[str]) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The layers a method would load and the tensors it would change, and a table of these; no weight is read."""
    plan = plan_run(make_config(model, "none", "none", method, overrides))  # no text is read
    unlearner, layers, skeleton = plan.config.method, plan.settings.num_hidden_layers, build_skeleton(plan.settings)
    loaded, edited = unlearner.depth or layers, EditableModel(skeleton, unlearner.trainable, copy=False)
    shapes = {name: list(parameter.shape) for name, parameter in edited.trained.items()}
    numbers, reach = sum(map(prod, shapes.values())), describe_reach(skeleton, shapes)
    answer = {
        "model": model,
        "method": unlearner.name,
        "layers": layers,
        "layers_loaded": loaded,
        "tensors": shapes,
        "numbers": numbers,
        "reach": reach,
        "sentence": f"{unlearner.name} loads {loaded} of {layers} layers of {type(skeleton).__name__} and "
        f"trains {len(shapes)} tensors, {numbers / skeleton.num_parameters():.2%} of "
        f"{skeleton.num_parameters():,} numbers; {explain_reach(reach)}",
    }
    return answer, [
        {
            "tensor": name,
            "shape": " x ".join(map(str, skeleton.get_parameter(name).shape)),
            "": "" if name in shapes else "stays, of the same role",
        }
        for name in (*shapes, *reach["left"])
    ]


def describe_reach(skeleton: Any, changed: Collection[str]) -> dict[str, Any]:
    """How many matrices change, which of the same role in the same layer stay, and the share of a token's path."""
    sizes = measure_path(skeleton)
    matrices, left, prefix = 0, [], next(n for n, m in skeleton.named_modules() if m is decoder_blocks(skeleton))
    for number, layer in enumerate(decoder_blocks(skeleton)):
        named = {f"{prefix}.{number}.{name}": parameter for name, parameter in layer.named_parameters()}
        inside = {name: parameter for name, parameter in named.items() if parameter.ndim > 1 and "conv" not in name}
        roles = {role for name in inside if name in changed for role in name_roles(name)}
        matrices += sum(name in changed for name in inside)
        left += [name for name in inside if name not in changed and roles & name_roles(name)]
    share = sum(size for name, size in sizes.items() if name in changed) / sum(sizes.values())
    return {"matrices": matrices, "left": left, "share_of_path": share}


def measure_path(module: Any) -> dict[str, float]:
    """The numbers of each parameter that a token passes: of experts, as many as the router sends it to."""
    sizes = {name: float(parameter.numel()) for name, parameter in module.named_parameters()}
    blocks = decoder_blocks(module)
    prefix = next(name for name, part in module.named_modules() if part is blocks)
    for number, layer in enumerate(blocks):
        for name, parameter in layer.named_parameters():
            if parameter.ndim == 3 and "conv" not in name and "shared" not in name:
                sizes[f"{prefix}.{number}.{name}"] *= share_routed(layer, len(parameter))
    return sizes


def share_routed(layer: nn.Module, count: int) -> float:
    """The share of a layer's experts that a token is sent to; 1 where there is no router."""
    taken = (getattr(part, "top_k", None) for part in layer.modules())
    return min(1.0, next((k for k in taken if isinstance(k, int)), count) / count)


def explain_reach(reach: dict[str, Any]) -> str:
    """A record's or an inspection's reach, as a person reads it."""
    text = f"{reach['matrices']} matrices of layers, {reach['share_of_path']:.2%} of the parameters that a token uses"
    if not reach["left"]:
        return f"{text}: every matrix of this kind in these layers"
    kinds = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in reach["left"]})
    return (
        f"{text}; NOT changed, though of the same kind and in these layers: {len(reach['left'])} ({', '.join(kinds)})"
    )
