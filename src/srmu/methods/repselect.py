"""RepSelect: ascent along what is left of a gradient without its main directions (2606.17168)."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from srmu.engine.model import EditableModel
from srmu.engine.progress import Watch
from srmu.engine.topic import Topic
from srmu.errors import DivergedError
from srmu.methods.base import WEIGHT
from srmu.methods.edits import WeightWalk
from srmu.methods.gradients import batch_nlls, damp_directions, gradient_sums


@dataclass(frozen=True, kw_only=True)
class RepSelect(WeightWalk):
    """Climbs the gradient of forget texts without its main directions, which other texts share."""

    name: ClassVar[str] = "repselect"
    paper: ClassVar[str] = "arXiv 2606.17168"
    uses: ClassVar[tuple[str, ...]] = ("adapters trained on the forget texts", "retain texts (spectrum=retain)")
    endless: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3  # of the matrices' norm; public code: of the gradient
    trainable: ClassVar[tuple[str, ...]] = ("*.mlp",)

    components: int = 64  # main directions to damp in the gradient of each matrix
    damping: Literal["hard", "soft", "quadratic"] = "soft"  # times 0, S_min/S or (S_min/S)^2
    side: Literal["both", "input", "output"] = "both"  # of the matrix on which to damp them
    spectrum: Literal["forget", "retain"] = "forget"  # texts whose gradient gives the directions
    lora_rank: int = 8  # of adapters trained on forget texts first, to elicit more; 0: none
    elicit_learning_rate: float = 0.01  # of the adapters, by plain gradient descent

    def __post_init__(self) -> None:
        self.within(components=(0, 1 << 30), lora_rank=(0, 1 << 16))
        self.within(elicit_learning_rate=WEIGHT)
        self.needs("elicit_learning_rate", self.lora_rank > 0, "method.lora_rank")

    @property
    def reads_retain(self) -> bool:
        return self.spectrum == "retain"

    def direction(self, model: EditableModel, topic: Topic, watch: Watch) -> dict[str, Tensor]:
        ascent, source = self.gradients(model, topic, watch)
        with watch("damping main directions", len(ascent)) as tick:
            for name in ascent:
                turned = model.is_transposed(name)
                g, main = (x.T if turned else x for x in (ascent[name], source[name]))
                damped = damp_directions(g, main, self.components, self.damping, self.side)
                ascent[name] = damped.T if turned else damped
                tick("")
        return ascent

    def gradients(
        self, model: EditableModel, topic: Topic, watch: Watch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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
