"""Two sets of weights that answer as one model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn


@contextmanager
def combine_logits(
    module: nn.Module, write: Callable[[], None], combine: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Run the block with a module whose logits are those before and after `write`, combined.

    It keeps no keys and values: one set of tensors would read those of the other.
    """
    places = dict(module.named_parameters())
    before = {name: place.detach().clone() for name, place in places.items()}
    write()
    before = {name: old for name, old in before.items() if not torch.equal(old, places[name])}
    after = {name: places[name].data for name in before}
    inner: Any = module.forward
    generate: Any = module.generate

    def put(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            places[name].data = tensor

    # Evals and `generate` choose what to pass by these names: positions, but no past.
    def forward(
        input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **options: Any
    ) -> Any:
        named = {"attention_mask": attention_mask, "position_ids": position_ids}
        options |= {name: value for name, value in named.items() if value is not None}
        options |= {"use_cache": False, "past_key_values": None}
        put(before)
        try:
            old = inner(input_ids, **options).logits
        finally:
            put(after)
        output = inner(input_ids, **options)
        output.logits = combine(old, output.logits).to(old.dtype)
        return output

    def uncached(*args: Any, **options: Any) -> Any:
        return generate(*args, **options | {"use_cache": False})

    with patch.object(module, "forward", forward), patch.object(module, "generate", uncached):
        yield
