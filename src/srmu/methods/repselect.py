"""RepSelect: ascent along what is left of a gradient without its main directions (2606.17168)."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from srmu.errors import DivergedError
from srmu.methods.base import Amount, EditableModel, Needs, Topic, Watch, Weight
from srmu.methods.edits import Tensors, WeightWalk, batch_nlls, gradient_sums


@dataclass(frozen=True, kw_only=True)
class RepSelect(WeightWalk):
    """Climbs the gradient of forget texts without its main directions, which other texts share."""

    name = "repselect"
    paper = "arXiv 2606.17168"
    uses = ("adapters trained on the forget texts", "retain texts (spectrum=retain)")
    endless = True
    learning_rate = 1e-3  # of the matrices' norm; public code: of the gradient
    trainable = ("*.mlp",)

    components: Amount = 64  # main directions to damp in the gradient of each matrix
    spectrum: Literal["forget", "retain"] = "forget"  # texts whose gradient gives the directions
    lora_rank: Amount = 8  # of adapters trained on forget texts first, to elicit more; 0: none
    elicit_learning_rate: Annotated[Weight, Needs("method.lora_rank")] = 0.01  # of the adapters, by gradient descent

    @property
    def reads_retain(self) -> bool:
        return self.spectrum == "retain"

    def direction(self, model: EditableModel, topic: Topic, watch: Watch) -> Tensors:
        ascent, source = self.gradients(model, topic, watch)
        with watch("damping main directions", len(ascent)) as tick:
            for name in ascent:
                turned = model.is_transposed(name)
                gradient, main = (x.T if turned else x for x in (ascent[name], source[name]))
                damped = damp_experts(gradient, main, self.components)
                ascent[name] = damped.T if turned else damped
                tick("")
        return ascent

    def gradients(self, model: EditableModel, topic: Topic, watch: Watch) -> tuple[Tensors, Tensors]:
        """The gradient of the nll of forget texts, and the one whose main directions are damped."""
        dense, rank = model.trained, self.lora_rank
        texts = [topic.forget] + [topic.retain] * self.reads_retain
        total = sum(map(len, texts)) + len(topic.forget) * (rank > 0)
        adapters = model.adapted(rank, rank, topic.number("adapters")) if rank else nullcontext()
        with watch("measuring gradients", total) as tick, adapters:
            if rank:
                optimiser = torch.optim.SGD(model.trained.values(), self.elicit_learning_rate)
                for loss in batch_nlls(model, topic.forget, tick):
                    loss.backward()
                    optimiser.step()
                    optimiser.zero_grad()
            for parameters, wanted in ((model.trained, False), (dense, True)):
                for parameter in parameters.values():
                    parameter.requires_grad_(wanted)
            # eq: RepSelect, G = sum over batches of d nll(x; W + BA) / dW, the adapters BA held
            sums = [gradient_sums(dense, batch_nlls(model, batches, tick)) for batches in texts]
        if not all(g.isfinite().all() for part in sums for g in part.values()):
            raise DivergedError("a gradient is not finite; lower method.elicit_learning_rate")
        return sums[0], sums[-1]


def damp_experts(gradient: Float[Tensor, "*E O I"], source: Float[Tensor, "*E O I"], components: int) -> Tensor:
    """A gradient with its main directions damped: of one matrix, or of each expert's in a stack."""
    if gradient.ndim == 2:
        return damp_directions(gradient, source, components)
    return torch.stack([damp_directions(*pair, components) for pair in zip(gradient, source, strict=True)])


def damp_directions(
    gradient: Float[Tensor, "O I"], source: Float[Tensor, "O I"], components: int
) -> Float[Tensor, "O I"]:
    """A gradient with the main directions of `source` damped on both sides."""
    # Exact, so that runs repeat: 2.5 s on one core for 1024 x 4096, 8 times that at twice the size.
    u, s, vh = torch.linalg.svd(source, full_matrices=False)
    # One direction stays, and rounding is none: where few tokens give a low rank, public code divides by almost 0.
    rank = int((s > s[0] * max(source.shape) * torch.finfo(s.dtype).eps).sum())
    count = max(0, min(components, rank - 1))
    u, s, v = u[:, :count], s[:count], vh[:count].T
    # eq: RepSelect, the part along direction i times S_min / S_i
    left = s[-1:] / s
    gradient = gradient - (gradient @ v * (1 - left)) @ v.T
    return gradient - (u * (1 - left)) @ (u.T @ gradient)
