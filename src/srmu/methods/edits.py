"""Methods that write weights, from gradients or task vectors, and what they share."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from srmu.engine.losses import mean_nll
from srmu.engine.stopping import StopRules
from srmu.engine.topic import Batch, Topic, interleave_batches, move_batch
from srmu.errors import DivergedError, SrmuError
from srmu.methods.base import Edit, EditableModel, Method, MethodOutcome, Session, State, Watch

Tensors = dict[str, Tensor]  # by name of parameter


def split_batches(batches: Sequence[Batch]) -> list[Batch]:
    """Each text as a batch of its own, without padding."""
    return [
        batch.map(lambda tensor, row=row, real=mask == 1: tensor[row, real].unsqueeze(0))  # type: ignore[misc]
        for batch in batches
        for row, mask in enumerate(batch["attention_mask"])
    ]


def batch_nlls(model: EditableModel, batches: Iterable[Batch], tick: Callable[[str], None]) -> Iterator[Tensor]:
    """The mean cost of a token of each batch; `tick` is called once a batch has been used."""
    for batch in batches:
        batch = move_batch(batch, model.device)
        yield mean_nll(model.logits(batch), batch["labels"]).value
        tick("")


def gradient_sums(parameters: Mapping[str, nn.Parameter], losses: Iterable[Tensor], power: int = 1) -> Tensors:
    """The sum over losses of each gradient to a power, in float32; each is added and freed as soon as it exists."""
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


def pool_topics(name: str, topics: Sequence[Topic]) -> Topic:
    """All topics as one, for the method of that name; their options must agree."""
    first = topics[0]
    for topic in topics:
        if topic.options != first.options:
            why = f"{first.name} and {topic.name} set its options differently; set them under method"
            raise SrmuError(f"method {name} works on all topics at once, but {why}")
    forget, retain = (interleave_batches([getattr(t, r) for t in topics]) for r in ("forget", "retain"))
    return replace(first, forget=forget, retain=retain)


@dataclass(frozen=True, kw_only=True)
class WholeEdit(Edit):
    """An edit of all tensors, or of those named."""

    level = "weights"

    parameters: tuple[str, ...] = ()  # names, globs or roles (`*.mlp`) to edit; (): all

    @property
    def trainable(self) -> tuple[str, ...]:
        return self.parameters or ("*",)


@dataclass(frozen=True, kw_only=True)
class WeightWalk(Method):
    """Moves the weights in one direction by steps of learning rate times their norm, until a stop rule holds."""

    level = "weights"

    @abstractmethod
    def direction(self, model: EditableModel, topic: Topic, watch: Watch) -> Tensors:
        """The direction of each trained tensor, in float32."""

    def apply(self, model: EditableModel, topics: Sequence[Topic], session: Session) -> MethodOutcome:
        train, log, watch, _ = session
        pool = pool_topics(self.name, topics)
        assert train.learning_rate is not None, "Method.training fills it in"
        direction = self.with_options(pool.options).direction(model, pool, watch)
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
