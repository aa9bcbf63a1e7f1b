"""Places in a model where activations are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from srmu.engine.roles import down_projection, find_child
from srmu.errors import SrmuError

Stream = Literal["resid_post", "mlp_out", "mlp_post"]


@dataclass(frozen=True)
class Site:
    """A place in the network where activations are read; text form `7.resid_post`.

    `resid_post` is the output of the decoder layer (D wide), `mlp_out` that of its MLP (D wide),
    `mlp_post` the input of the MLP's down-projection (F wide). The input of layer l is
    `resid_post` of layer l-1.
    """

    layer: int
    stream: Stream = "resid_post"

    def __post_init__(self) -> None:
        if self.stream not in get_args(Stream):
            known = ", ".join(get_args(Stream))
            raise SrmuError(f"stream {self.stream!r} does not exist; choose one of {known}")

    def __str__(self) -> str:
        return f"{self.layer}.{self.stream}"


@contextmanager
def catch_value(layer: nn.Module, stream: Stream) -> Iterator[list[Tensor]]:
    """Catch the value of a stream of a layer: a list that the next forward fills."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: Any, output: Any = None) -> None:
        value = args if output is None else output
        caught.append(value[0] if isinstance(value, tuple) else value)

    if stream == "mlp_post":
        handle = down_projection(layer).register_forward_pre_hook(catch)
    else:
        place = layer if stream == "resid_post" else find_child(layer, "mlp")
        handle = place.register_forward_hook(catch)
    try:
        yield caught
    finally:
        handle.remove()
