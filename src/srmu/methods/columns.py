"""Which input columns of a matrix are trained: those that forget texts excite most."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from srmu.engine.batch import Batch, move_batch
from srmu.engine.model import EditableModel
from srmu.engine.sites import Site
from srmu.engine.topic import Topic
from srmu.errors import SrmuError

TINY = 1e-30  # avoids a division by 0

Mask = Callable[[Batch], Bool[Tensor, "B T"]]  # the tokens of a batch to measure


@contextmanager
def mask_columns(
    model: EditableModel, layers: Sequence[int], share: float, parts: Sequence[Topic], mask: Mask
) -> Iterator[None]:
    """Train only a share of the columns of each layer's down-projection.

    The gradients of the others are 0, so AdamW leaves those weights unchanged, bit for bit.
    """
    handles = []
    for layer, (name, parameter) in zip(layers, model.trained.items(), strict=True):
        if parameter.ndim != 2:
            raise SrmuError(f"{name} holds all experts, each with inputs of its own; set method.columns=1")
        sums = [
            input_moments(model, layer, [batch for part in parts for batch in role(part)], mask)
            for role in (lambda part: part.forget, lambda part: part.retain)
        ]
        # eq: input columns, r_j = E_f[x_j^2] / E_r[x_j^2], the largest are updated
        ratio = sums[0] / sums[1].clamp(min=TINY)
        chosen = torch.zeros_like(ratio, dtype=torch.bool)
        order = ratio.argsort(descending=True, stable=True)
        chosen[order[: max(1, round(share * len(ratio)))]] = True
        kept = chosen[:, None] if model.is_transposed(name) else chosen
        handles.append(parameter.register_hook(lambda slope, kept=kept: slope * kept))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_moments(model: EditableModel, layer: int, batches: Sequence[Batch], mask: Mask) -> Float[Tensor, " F"]:
    """Mean squares of the inputs of a layer's down-projection, in the original model."""
    total, count = torch.zeros((), device=model.device), 0
    with model.frozen():
        for batch in batches:
            batch = move_batch(batch, model.device)
            read = model.hidden(batch, Site(layer, "mlp_post"), keep=False)[mask(batch)]
            total, count = total + read.float().square().sum(0), count + len(read)
    return total / count
