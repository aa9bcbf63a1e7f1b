"""Task arithmetic: subtracting a task vector (Ilharco et al., arXiv 2212.04089)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch

from srmu.methods.base import Bounds, Count, EditableModel, Rate, State, Topic, Watch
from srmu.methods.edits import WholeEdit, pool_topics
from srmu.methods.logits import strengthen_weights


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(WholeEdit):
    """Subtracts from the weights what fine-tuning on the forget texts adds to them."""

    name = "task_arithmetic"
    paper = "arXiv 2212.04089"
    uses = ("a model strengthened on the forget texts",)

    strength: Annotated[float, Bounds(-1e6, 1e6)] = 1.0  # factor of the difference; above 1 it soon harms everything
    teacher_steps: Count = 40  # of fine-tuning on the forget texts
    teacher_learning_rate: Rate = 1e-5

    def edit(self, model: EditableModel, topics: Sequence[Topic], watch: Watch) -> dict[str, State]:
        pool = pool_topics(self.name, topics)
        method = self.with_options(pool.options)
        with watch("fine-tuning on the forget texts", method.teacher_steps) as tick:
            followed = pool.with_tick(partial(tick, ""))
            tuned = strengthen_weights(model, followed, method.teacher_steps, method.teacher_learning_rate)
        moved, size = 0.0, 0.0
        for name, parameter in model.trained.items():
            before, after = model.original[name].float(), tuned[name].float()
            moved += float((after - before).square().sum())
            size += float(before.square().sum())
            # eq: task arithmetic, theta = theta0 - alpha (theta_ft - theta0), exact at 0 and -1
            with torch.no_grad():
                parameter.copy_(torch.lerp(before, after, -method.strength))
        numbers = {"task_vector": (moved / size) ** 0.5}  # its norm over that of the weights
        return {topic.name: State(numbers=numbers) for topic in topics}
