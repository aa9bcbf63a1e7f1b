"""Gradients of texts: sums of powers, attributions to neurons, main directions."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from srmu.engine.losses import is_predicted, mean_nll, token_nll
from srmu.engine.sites import edit_input
from srmu.engine.topic import move_batch
from srmu.methods.base import Batch, EditableModel


def split_batches(batches: Sequence[Batch]) -> list[Batch]:
    """Each text as a batch of its own, without padding."""
    return [
        batch.map(lambda tensor, row=row, real=mask == 1: tensor[row, real].unsqueeze(0))  # type: ignore[misc]
        for batch in batches
        for row, mask in enumerate(batch["attention_mask"])
    ]


def group_alike(*parts: list[Batch]) -> list[list[Batch]]:
    """Lists of single texts of equal number, each text cut to the length of its partners.

    The mean gradient of a long text is smaller, and lengths must not decide.
    """
    parts = tuple(sorted(part, key=lambda text: text["labels"].shape[1]) for part in parts)
    ends = [min(text["labels"].shape[1] for text in texts) for texts in zip(*parts, strict=True)]
    return [[text.cut(tokens=slice(end)) for text, end in zip(part, ends, strict=True)] for part in parts]


def batch_nlls(model: EditableModel, batches: Iterable[Batch], tick: Callable[[str], None]) -> Iterator[Tensor]:
    """The mean cost of a token of each batch; `tick` is called once a batch has been used."""
    for batch in batches:
        batch = move_batch(batch, model.device)
        yield mean_nll(model.logits(batch), batch["labels"]).value
        tick("")


def gradient_sums(
    parameters: Mapping[str, nn.Parameter], losses: Iterable[Tensor], power: int = 1
) -> dict[str, Tensor]:
    """The sum over losses of each gradient to a power, element by element, in float32.

    Each gradient is added and freed as soon as it exists, so they never all live at once.
    """
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    places = {id(parameter): sums[name] for name, parameter in parameters.items()}

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        # Squared in float32: squares of small bf16 numbers are coarse, or 0.
        places[id(parameter)].add_(parameter.grad.float() ** power)
        parameter.grad = None

    with ExitStack() as stack:
        for parameter in parameters.values():
            stack.callback(parameter.register_post_accumulate_grad_hook(add).remove)
        for loss in losses:
            loss.backward()
    return sums


def attribute_neurons(model: EditableModel, downs: Sequence[Any], text: Batch, points: int) -> Float[Tensor, "L F"]:
    """What each neuron adds to the mean log-likelihood of the tokens of a single text.

    `downs` are the linear maps that read the neurons of each layer. The neurons of a layer are
    scaled at all positions that predict a counted token; their attributions sum to what they add
    together. All points between neurons off and on are rows of one batch.

    Behind a norm that reads the output of the MLP (Gemma 2, OLMo 2) all points but those next to
    `off` look alike: attributions still rank the neurons, but their sum is too small.
    """
    rows = text.map(lambda tensor: tensor.expand(points, -1))
    ahead = nn.functional.pad(is_predicted(rows["labels"]), (0, 1)).unsqueeze(-1)  # (m, T, 1)
    # Midpoints, whose error falls with m^2. (Public code takes left ends, from all neurons off
    # to not quite on: their error falls with m.)
    scales = (torch.arange(points, device=model.device) + 0.5) / points
    seen: list[Tensor] = []

    def scale(read: Tensor) -> Tensor:
        w = read.detach().reshape(*ahead.shape[:2], -1)  # OPT flattens inside its layers
        scaled = torch.where(ahead, scales[:, None, None].to(w.dtype) * w, w).requires_grad_()
        seen[:] = w, scaled
        return scaled.reshape(read.shape)

    attributions = []
    for down in downs:
        with edit_input(down, scale):
            cost = token_nll(model.logits(rows), rows["labels"]).sum()
        (slope,) = torch.autograd.grad(-cost / is_predicted(text["labels"]).sum(), seen[1])
        # eq: DEPN, Att_k = w_k / m sum_j dP/dw_k at s_j w, summed over the predicted tokens
        attributions.append((seen[0].float() * slope.float() * ahead).sum(dim=(0, 1)) / points)
    return torch.stack(attributions)


def damp_directions(
    gradient: Float[Tensor, "O I"], source: Float[Tensor, "O I"], components: int
) -> Float[Tensor, "O I"]:
    """A gradient with the main directions of `source` damped on both sides."""
    # Exact, so that runs repeat: 2.5 s on one core for 1024 x 4096, 8 times that at twice the size.
    u, s, vh = torch.linalg.svd(source, full_matrices=False)
    # At least one direction stays, and rounding is none: few tokens give a gradient of low rank,
    # where public code divides by an S_min near 0.
    rank = int((s > s[0] * max(source.shape) * torch.finfo(s.dtype).eps).sum())
    count = max(0, min(components, rank - 1))
    u, s, v = u[:, :count], s[:count], vh[:count].T
    # eq: RepSelect, the part along direction i times S_min / S_i
    left = s[-1:] / s
    gradient = gradient - (gradient @ v * (1 - left)) @ v.T
    return gradient - (u * (1 - left)) @ (u.T @ gradient)
