"""Where the weights of a role, such as the MLP's down-projection, lie in a decoder layer."""

from __future__ import annotations

import re

from torch import nn
from transformers.pytorch_utils import Conv1D

from srmu.errors import SrmuError

# Role -> where that weight sits inside a decoder layer, by architecture. Never by position: the seventh parameter of a
# layer is down_proj on Llama, o_proj on Qwen2, gate_proj on Qwen3.
ROLES: dict[str, tuple[str, ...]] = {
    "mlp_down": (
        "mlp.down_proj.weight",  # Llama, Mistral, Qwen, Gemma, Phi-3, OLMo
        "mlp.experts.down_proj",  # Mixtral, Qwen-MoE: all experts in one tensor
        "mlp.c_proj.weight",  # GPT-2
        "mlp.dense_4h_to_h.weight",  # GPT-NeoX, Falcon, BLOOM
        "mlp.fc2.weight",  # Phi
        "mlp.fc_out.weight",  # GPT-J
        "fc2.weight",  # OPT
    )
}


def in_role(layer: nn.Module, role: str) -> list[str]:
    """The names, inside a decoder layer, of the weights in a role.

    Besides ROLES there are `linear`, the matrices of all linear maps, and `mlp`, those of the MLP.
    """
    if role not in ("linear", "mlp"):
        return [role_in_layer(layer, role)]
    names = [f"{n}.weight" for n, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    return [n for n in names if role == "linear" or not re.search("attn|attention", n)]


def role_in_layer(layer: nn.Module, role: str) -> str:
    """The name, inside a decoder layer, of the weight in a role of ROLES."""
    if role not in ROLES:
        known = ", ".join([*ROLES, "linear", "mlp"])
        raise SrmuError(f"role {role!r} does not exist; choose one of {known}")
    names = dict(layer.named_parameters())
    for name in ROLES[role]:
        if name in names:
            return name
    raise SrmuError(f"{type(layer).__name__} has no weight in the role {role!r}; it has {', '.join(names)}")


def find_child(layer: nn.Module, name: str) -> nn.Module:
    """A submodule of a decoder layer; SrmuError, listing those it has, if it is missing."""
    try:
        return layer.get_submodule(name)
    except AttributeError:
        names = ", ".join(n for n, _ in layer.named_children())
        raise SrmuError(f"{type(layer).__name__} has no {name!r}; it has {names}") from None


def down_projection(layer: nn.Module) -> nn.Module:
    """The linear map that reads a layer's neurons; SrmuError in a mixture of experts."""
    name = role_in_layer(layer, "mlp_down")
    if layer.get_parameter(name).ndim != 2:
        raise SrmuError(
            "this model is a mixture of experts, each with neurons of its own: read resid_post or "
            "mlp_out, or take a method that needs no neurons, for example method.name=ssd"
        )
    return find_child(layer, name.removesuffix(".weight"))
