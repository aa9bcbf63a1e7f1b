"""Places in a model: where activations are read and changed by hooks, and where the weights of a role lie."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor, nn

from srmu.engine.loading import find_layers
from srmu.errors import SrmuError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Edit = Callable[[Tensor], Tensor | None]  # of one tensor; None leaves it as it is
Stream = Literal["resid_post", "mlp_out", "mlp_post"]

# The down-projection of an MLP by its name in a decoder layer, never by position: the seventh parameter of a layer is
# down_proj on Llama, o_proj on Qwen2, gate_proj on Qwen3. fc2 alone is OPT's, w2 LFM2's, output.dense BERT's.
DOWN = re.compile(
    r"(.*\.)?(down_proj|proj_down|c_proj|dense_4h_to_h|fc2|fc_out|w2|w_out|Wo|ffn\.2|feed_forward\.(output|value)"
    r"|output_linear|output\.dense)(\.weight)?"
)
ELSEWHERE = re.compile("attn|attention|norm|router|gate\\.")  # names of matrices that are no part of an MLP
ROUTER = re.compile(r"(.*\.)?(router|gate|shared_expert_gate)(\..*)?")  # modules that send tokens to experts


@dataclass(frozen=True)
class Site:
    """A place in the network where activations are read; text form `7.resid_post`.

    `resid_post` is the output of the decoder layer (D wide), `mlp_out` that of its MLP (D wide), `mlp_post` the input
    of the MLP's down-projection (F wide).

    Examples:
        >>> str(srmu.Site(7, "mlp_out"))
        '7.mlp_out'
    """

    layer: int
    stream: Stream = "resid_post"

    def __post_init__(self) -> None:
        if self.stream not in get_args(Stream):
            raise SrmuError(f"stream {self.stream!r} does not exist; choose one of {', '.join(get_args(Stream))}")

    def __str__(self) -> str:
        return f"{self.layer}.{self.stream}"


def count_mlp_inputs(config: Any) -> int:
    """The inputs F of a layer's down-projection; of experts, of all those together that a token is sent to."""
    config = config.get_text_config()
    sizes = (getattr(config, name, None) for name in ("moe_intermediate_size", "intermediate_size"))
    each = next(filter(None, sizes), 4 * config.hidden_size)
    return max(each if isinstance(each, list) else [each]) * (getattr(config, "num_experts_per_tok", None) or 1)


@contextmanager
def catch_value(layer: nn.Module, stream: Stream) -> Iterator[list[Tensor]]:
    """Catch the value of a stream of a layer: a list that the next forward fills."""
    caught: list[Tensor] = []
    place: Any = layer if stream == "resid_post" else getattr(layer, "mlp", None)
    if stream == "mlp_out" and place is None:
        raise SrmuError(
            f"{type(layer).__name__} has no 'mlp'; it has {', '.join(n for n, _ in layer.named_children())}"
        )
    neurons = stream == "mlp_post"
    with edit_input(down_projection(layer), caught.append) if neurons else edit_outputs({place: caught.append}):
        yield caught


def in_role(layer: nn.Module, role: str) -> list[str]:
    """The names of a decoder layer's weights in a role: `mlp_down`, all `linear` maps, those of the `mlp`, `router`.

    Those of experts count as well: routed ones lie in one tensor of three dimensions, shared ones beside it. A layer
    may have no router.
    """
    named = dict(layer.named_parameters())
    maps = [f"{n}.weight" for n, m in layer.named_modules() if is_linear(m)]
    maps += [name for name, parameter in named.items() if is_stack(name, parameter)]
    found = {
        # Zamba's layers share a block, which no layer can change for itself
        "mlp_down": [name for name in named if "mlp_down" in name_roles(name) and "shared_transf" not in name],
        "mlp": [name for name in maps if not re.search("attn|attention", name) and not ROUTER.fullmatch(name)],
        "linear": maps,
        "router": [name for name, parameter in named.items() if parameter.ndim == 2 and ROUTER.fullmatch(name)],
    }
    if role not in found:
        raise SrmuError(f"role {role!r} does not exist; choose one of {', '.join(found)}")
    if not found[role] and role == "mlp_down":
        raise SrmuError(f"{type(layer).__name__} has no weight in the role {role!r}; it has {', '.join(named)}")
    return found[role]


def is_stack(name: str, parameter: Tensor) -> bool:
    """Whether a parameter of that name holds the matrices of all experts, one on top of the other."""
    return parameter.ndim == 3 and bool(re.search("expert|put_linear", name))


def find_routers(layer: nn.Module) -> list[nn.Module]:
    """The routers of a decoder layer, which send tokens to experts; empty for a layer without experts."""
    if not any(is_stack(name, parameter) for name, parameter in layer.named_parameters()):
        return []
    named = {name: part for name, part in layer.named_modules() if re.fullmatch(r"(.*\.)?(router|gate)", name)}
    return [part for name, part in named.items() if not any(name.startswith(f"{other}.") for other in named)]


@contextmanager
def catch_choices(routers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Catch the experts that each router chooses for each token, (B T, k), sorted: the next forward fills the list.

    For a router that gives scores alone, that is its first choice.
    """
    caught: list[Tensor] = []

    def record(read: Any, output: Any) -> None:
        parts = [part for part in (output if isinstance(output, tuple | list) else [output]) if is_table(part)]
        chosen = [part for part in parts if not part.is_floating_point()]
        for part in chosen[:1] or [scores.argmax(-1, keepdim=True) for scores in parts[:1]]:
            caught.append(part.reshape(-1, part.shape[-1]).sort().values)

    def is_table(part: Any) -> bool:
        return isinstance(part, Tensor) and part.ndim > 1

    with hook_outputs(dict.fromkeys(routers, record)):
        yield caught


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain product with its matrix, beside which an adapter can lie."""
    # routers give choices beside scores, and grouped maps multiply parts: each calls itself so
    return (isinstance(module, nn.Linear) or is_turned(module)) and not re.search(
        "Router|Grouped", type(module).__name__
    )


def name_roles(name: str) -> set[str]:
    """What the matrix of that name in a decoder layer does; a fused one does what its parts do."""
    place = "attention." if re.search("attn|attention", name) else "mlp."
    if ELSEWHERE.search(name) is None and DOWN.fullmatch(name):
        return {"mlp_down"}
    last = name.removesuffix(".weight").rpartition(".")[2]
    return {place + part for part in (["gate_proj", "up_proj"] if last == "gate_up_proj" else [last])}


def down_projection(layer: nn.Module) -> nn.Module:
    """The linear map that reads a layer's neurons; SrmuError in a mixture of experts."""
    name, *others = in_role(layer, "mlp_down")
    if others or layer.get_parameter(name).ndim != 2:
        advice = "read resid_post or mlp_out, or take a method that needs no neurons, for example method.name=ssd"
        raise SrmuError(f"this model is a mixture of experts, each with neurons of its own: {advice}")
    return layer.get_submodule(name.removesuffix(".weight"))


def shape_by_token(value: Tensor, batch: int, tokens: int) -> Tensor:
    """Activations as (B, T, D), all that a token has together; SrmuError where a layer reads more than the tokens."""
    if value.shape[:2] != (batch, tokens) and value.shape[0] != batch * tokens:  # OPT flattens inside its layers
        raise SrmuError(
            f"a layer gives {tuple(value.shape)} for {batch} texts of {tokens} tokens: this architecture reads more "
            "than its tokens there, and srmu does not support it"
        )
    return value.reshape(batch, tokens, -1)


def is_turned(module: nn.Module) -> bool:
    """Whether a linear map is stored as (in, out)."""
    from transformers.pytorch_utils import Conv1D  # here, as everywhere: most verbs start without transformers

    return isinstance(module, Conv1D)


def has_inputs_first(module: nn.Module) -> bool:
    """Whether matrices of a linear map, or of a stack of experts, are stored as (in, out)."""
    named = getattr(module, "is_transposed", False) or type(module).__name__ == "Llama4TextExperts"
    return named or is_turned(module)


def decoder_blocks(module: PreTrainedModel) -> nn.ModuleList:
    return getattr(*find_layers(module))


@contextmanager
def swap_blocks(place: tuple[nn.Module, str], blocks: nn.ModuleList) -> Iterator[None]:
    """Run a model with other decoder blocks in the place that `find_layers` names."""
    whole = getattr(*place)
    setattr(*place, blocks)
    try:
        yield
    finally:
        setattr(*place, whole)


def cut_blocks(module: PreTrainedModel, depth: int) -> AbstractContextManager[None]:
    """Run the model with its first `depth` decoder blocks only, under its own norm and head."""
    return swap_blocks(find_layers(module), decoder_blocks(module)[:depth])


@contextmanager
def hook_outputs(hooks: Mapping[nn.Module, Callable[[Any, Any], Any]]) -> Iterator[None]:
    """Call a function with what each module read and what it put out, which its result replaces unless it is None."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.enter_context(module.register_forward_hook(lambda _, *read, hook=hook: hook(*read)))
        yield


def edit_outputs(edits: Mapping[nn.Module, Edit]) -> AbstractContextManager[None]:
    """Put each module's output, the first of them where it is a tuple, through a function."""

    def hook(edit: Edit, args: Any, output: Any) -> Any:
        several = isinstance(output, tuple | list)
        value, *others = output if several else (output,)
        new = edit(value)
        if new is None:
            return None
        return type(output)((new.to(value.dtype), *others)) if several else new.to(value.dtype)

    return hook_outputs({module: partial(hook, edit) for module, edit in edits.items()})


@contextmanager
def edit_input(module: nn.Module, edit: Edit) -> Iterator[None]:
    """Put what a module reads, its first argument, through a function."""

    def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
        value = args[0] if args else kwargs["hidden_states"]
        new = edit(value)
        if new is None:
            return None
        new = new.to(value.dtype)
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    with module.register_forward_pre_hook(hook, with_kwargs=True):
        yield
