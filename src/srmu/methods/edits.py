"""What methods share that work on the weights of the whole model."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor
from torch.nn.utils import get_total_norm

from srmu.engine.stopping import StopRules
from srmu.engine.topic import interleave_batches
from srmu.errors import DivergedError, SrmuError
from srmu.methods.base import Edit, EditableModel, Method, MethodOutcome, Session, State, Topic, Watch


@dataclass(frozen=True, kw_only=True)
class Pooling(Method):
    """A method that treats all topics as one and works on the weights of the whole model."""

    level = "weights"
    depth = None

    def pool_topics(self, topics: Sequence[Topic]) -> tuple[Self, Topic]:
        """This method with the options of the topics, which must agree, and all topics as one."""
        first = topics[0]
        for topic in topics:
            if topic.options != first.options:
                raise SrmuError(
                    f"method {self.name} works on all topics at once, but {first.name} and "
                    f"{topic.name} set its options differently; set them under method"
                )
        forget, retain = (interleave_batches([getattr(t, r) for t in topics]) for r in ("forget", "retain"))
        return self.with_options(first.options), replace(first, forget=forget, retain=retain)


@dataclass(frozen=True, kw_only=True)
class WholeEdit(Pooling, Edit):
    """An edit of all tensors, or of those named."""

    parameters: tuple[str, ...] = ()  # names, globs or roles (`*.mlp`) to edit; (): all

    @property
    def trainable(self) -> tuple[str, ...]:
        return self.parameters or ("*",)


@dataclass(frozen=True, kw_only=True)
class WeightWalk(Pooling):
    """Moves the weights by equal steps in one direction, until a stop rule holds.

    The learning rate is the share of the norm of the weights that a step moves them by.
    """

    @abstractmethod
    def direction(self, model: EditableModel, topic: Topic, watch: Watch) -> dict[str, Tensor]:
        """The direction of each trained tensor, in float32."""

    def change(self, model: EditableModel, topics: Sequence[Topic], session: Session) -> MethodOutcome:
        train, log, watch, _ = session
        method, pool = self.pool_topics(topics)
        assert train.learning_rate is not None, "Method.training fills it in"
        direction = method.direction(model, pool, watch)
        weights, length = (float(get_total_norm(d.values())) for d in (model.original, direction))
        if not 0 < length < float("inf"):
            raise DivergedError(f"the norm of the direction of {self.name} is {length:g}")
        states = {topic.name: State(numbers={"direction_norm": length}) for topic in topics}
        rules = StopRules(model, topics, train, self.endless)
        with watch(self.name, train.max_steps) as tick:
            for step in range(train.max_steps):
                moved = train.learning_rate * (step + 1)
                for name, parameter in model.trained.items():
                    # From the original by the sum of all steps: bf16 would lose each single one.
                    change = moved * weights / length * direction[name]
                    parameter.data.copy_(model.original[name].float() + change)
                reason, measured = rules.check_step(step, f"step {step}")
                log(step, {"topic": pool.name, "moved": moved, **measured})
                tick("")
                if reason:
                    return MethodOutcome(states, reason)
        return MethodOutcome(states)
