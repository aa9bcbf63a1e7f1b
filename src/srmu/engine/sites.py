"""Places in a model where activations are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from srmu.engine.hooks import edit_input, edit_outputs
from srmu.engine.roles import down_projection, find_child
from srmu.errors import SrmuError

Stream = Literal["resid_post", "mlp_out", "mlp_post"]


@dataclass(frozen=True)
class Site:
    """A place in the network where activations are read; text form `7.resid_post`.

    `resid_post` is the output of the decoder layer (D wide), `mlp_out` that of its MLP (D wide), `mlp_post` the input
    of the MLP's down-projection (F wide). The input of layer l is `resid_post` of layer l-1.
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
    reading: AbstractContextManager[None]
    if stream == "mlp_post":
        reading = edit_input(down_projection(layer), caught.append)
    else:
        place = layer if stream == "resid_post" else find_child(layer, "mlp")
        reading = edit_outputs({place: caught.append})
    with reading:
        yield caught
