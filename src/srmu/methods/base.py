"""What a method is: a frozen dataclass with its options as fields, and one function."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, get_args, get_type_hints

from torch import Tensor, nn

from srmu.engine.losses import average_means, mean_nll
from srmu.engine.model import EditableModel
from srmu.engine.progress import Watch, ignore_progress
from srmu.engine.resume import Checkpoints
from srmu.engine.sites import count_mlp_inputs
from srmu.engine.stopping import CHECKED_BATCHES
from srmu.engine.topic import Batch, Topic, move_batch
from srmu.engine.train import FINISHED, NOWHERE, Log, LossFunction, Schedule, Terms, TrainOptions, fit_model
from srmu.errors import SrmuError

CHANGING = ("tensors", "numbers", "memory")  # the parts of a state that a loss may change
SHOWN = ("forget", "retain", "target_ratio", "forget_cos", "retain_cos")  # of a step's values, as progress


class Bounds(NamedTuple):
    """The lowest and highest value of an option, both allowed."""

    low: float
    high: float

    def find_fault(self, method: "Method", option: str) -> str:
        value = getattr(method, option)
        if value is None or (isinstance(value, int | float) and self.low <= value <= self.high):
            return ""
        room = f"from {self.low:g} to {self.high:g}" if self.high < LARGE else f"at least {self.low:g}"
        room = f"above 0 and at most {self.high:g}" if self.low == TINY else room
        return f"={value!r}: expected a number {room}"


class Needs(NamedTuple):
    """What an option has no effect without: `method.lora_rank` above 0, `anchors=random or self`."""

    condition: str

    def find_fault(self, method: "Method", option: str) -> str:
        other, _, values = self.condition.removeprefix("method.").partition("=")
        value = getattr(method, other)
        holds = value in values.split(" or ") if values else value not in (None, 0, "none")
        changed = getattr(method, option) != type(method).__dataclass_fields__[option].default
        return f" has no effect without {self.condition}" if changed and not holds else ""


def list_marks(cls: type["Method"]) -> Iterator[tuple[str, Bounds | Needs]]:
    """The bounds and needs of a method's options, which stand in their types."""
    for option, hint in get_type_hints(cls, include_extras=True).items():
        marks = (mark for kind in (hint, *get_args(hint)) for mark in getattr(kind, "__metadata__", ()))
        yield from ((option, mark) for mark in marks if isinstance(mark, Bounds | Needs))


LARGE, TINY = 1 << 30, 1e-12
Count = Annotated[int, Bounds(1, LARGE)]
Amount = Annotated[int, Bounds(0, LARGE)]
Share = Annotated[float, Bounds(0, 1)]
Part = Annotated[float, Bounds(TINY, 1)]  # above 0
Rate = Part
Weight = Annotated[float, Bounds(0, 1e300)]

Level = Literal["logit", "neuron", "representation", "weights"]


@dataclass
class State:
    """What a method draws or measures of a topic before the first step."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # saved with the run
    numbers: dict[str, Any] = field(default_factory=dict)  # printed and recorded
    memory: dict[str, Any] = field(default_factory=dict)  # carried from step to step
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)  # trained beside the model's


class MethodOutcome(NamedTuple):
    """What a method leaves besides the changed model: the state of each topic, and why it ended."""

    states: dict[str, State]
    stop_reason: str = FINISHED


class Session(NamedTuple):
    """How a method is to train, and where it logs, shows and saves its steps."""

    train: TrainOptions
    log: Log
    watch: Watch = ignore_progress
    checkpoints: Checkpoints = NOWHERE


def scale_rate(rate: float, config: Any) -> float:
    """A learning rate for the down-projections of a 7B model, adapted to the width of this one; three digits."""
    # A step of Adam moves every weight alike, so what a matrix puts out moves with the number of its inputs.
    return float(f"{rate * 14336 / count_mlp_inputs(config):.3g}")


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to unlearn: a frozen dataclass, whose fields are its options.

    Most derive from `Objective` or `Edit`. Class attributes say what a method is: `name`, by which configs call it;
    `paper`; `level`, what it works on; `uses`, what it needs besides the model and forget texts; `learning_rate` and
    `schedule`, where a run names none; `endless`, where nothing bounds its loss from below. SrmuError where an option
    is outside the bounds of its type (`Count`, `Share`, `Weight`).
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: ClassVar[str]
    paper: ClassVar[str] = "none"
    level: ClassVar[Level] = "logit"  # what it works on
    uses: ClassVar[tuple[str, ...]] = ()  # besides the model and forget texts
    learning_rate: ClassVar[float] = 5e-5  # where train.learning_rate is not given
    scales: ClassVar[bool] = False  # whether that rate is meant for a 7B model, and grows for narrower ones
    schedule: ClassVar[Schedule] = "constant"  # where train.schedule is not given
    spreads: ClassVar[bool] = False  # whether several processes can each work on a part of each batch
    endless: ClassVar[bool] = False  # its loss has no lower bound: a rule must stop it
    selective: ClassVar[bool] = False  # changes so few tokens of a text that their mean says little

    def __post_init__(self) -> None:
        for option, mark in list_marks(type(self)):
            if fault := mark.find_fault(self, option):
                raise SrmuError(f"method.{option}{fault}")

    @property
    def depth(self) -> int | None:
        """The number of layers it needs; None: the whole model."""
        return None

    @property
    def trainable(self) -> tuple[str, ...]:
        """What is trained: roles by layer, such as `7.mlp_down`, or glob patterns of parameter names."""
        return ("*",)

    @property
    def reads_retain(self) -> bool:
        """Whether it needs retain texts."""
        return "retain texts" in self.uses

    def resolved(self, config: Any) -> Self:
        """This method with what depends on the model filled in; SrmuError if it does not fit."""
        return self

    def choose_rate(self, config: Any) -> float:
        """The learning rate where none is given, for a model's config."""
        return scale_rate(self.learning_rate, config) if self.scales else self.learning_rate

    def training(self, options: TrainOptions, config: Any) -> TrainOptions:
        """The options with the learning rate and schedule of the method filled in, for a model's config."""
        rate = options.learning_rate or self.choose_rate(config)
        return replace(options, learning_rate=rate, schedule=options.schedule or self.schedule)

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """This method with the options of a topic."""
        return replace(self, **options)

    def check(self, topics: Sequence[Topic], train: TrainOptions) -> None:
        """SrmuError if the method or a stop rule needs texts, or layers, that are not there."""
        rules = [rule for rule in ("forget_ceiling", "kl_budget") if getattr(train, rule) is not None]
        bare = [topic.name for topic in topics if not topic.retain]
        if bare and (self.reads_retain or "kl_budget" in rules):
            reader = f"method {self.name} needs" if self.reads_retain else "train.kl_budget is measured on"
            raise SrmuError(f"{reader} retain texts; name them: retain, or topics.{bare[0]}.retain in a config")
        if rules and self.depth is not None:
            depth = f"method {self.name} loads {self.depth} layers"
            raise SrmuError(f"train.{rules[0]} needs the whole model's output, but {depth}; remove it")
        if rules and (isinstance(self, Edit) or self.no_checkpoint):
            raise SrmuError(f"train.{rules[0]} has no effect: method {self.name} writes the weights at once; remove it")

    @property
    def no_checkpoint(self) -> str:
        """Why the result is not a model by itself; "" if it is one."""
        return ""

    def at_inference(self, module: nn.Module, write: Callable[[], None]) -> AbstractContextManager[Any]:
        """Turn the original module into the result; `write` puts the changed tensors into it."""
        write()
        return nullcontext()

    def result_logits(self, model: EditableModel, batch: Batch) -> Tensor:
        """What the result answers, (B, T, V)."""
        return model.logits(batch)

    def measure_effect(self, model: EditableModel, topic: Topic, state: State) -> dict[str, float]:
        """How far a run moved the first batches of a topic: nats of a token before and after."""
        numbers: dict[str, float] = {}
        if self.depth is not None:
            return numbers  # a part of a model has no likelihoods
        for role in ("forget", "retain"):
            batches = [move_batch(batch, model.device) for batch in getattr(topic, role)[:CHECKED_BATCHES]]
            with model.frozen():
                before = [mean_nll(model.logits(batch), batch["labels"]) for batch in batches]
            after = [mean_nll(self.result_logits(model, batch), batch["labels"]) for batch in batches]
            if batches:
                both = {"before": before, "after": after}
                numbers |= {f"{role}_nll_{when}": average_means(means) for when, means in both.items()}
        return numbers

    @abstractmethod
    def apply(self, model: EditableModel, topics: Sequence[Topic], session: Session) -> MethodOutcome:
        """Change the model. Optimisation resumes from its checkpoint, if there is one."""


class Edit(Method):
    """A method that writes weights once."""

    @abstractmethod
    def edit(self, model: EditableModel, topics: Sequence[Topic], watch: Watch) -> dict[str, State]:
        """Write the new values into the tensors of `model.trained`; gives the state of each topic by its name."""

    def apply(self, model: EditableModel, topics: Sequence[Topic], session: Session) -> MethodOutcome:
        return MethodOutcome(self.edit(model, topics, session.watch), "edited")


class Objective(Method):
    """A method that optimises a loss."""

    def setup(self, model: EditableModel, topic: Topic) -> State:
        """What to draw or measure of a topic before the first step; nothing, unless a method says so."""
        return State()

    @abstractmethod
    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        """The losses of a step, to be summed, and the values to log beside them.

        `model` answers as it is now, inside `model.frozen()` as it was before. Where there are no retain texts,
        `retain` is empty.
        """

    def write_texts(self, model: EditableModel, topic: Topic, state: State) -> Sequence[Sequence[int]]:
        """The model's own texts that `prepared` is to find in the topic."""
        return topic.own

    def prepared(self, topic: Topic) -> Topic:
        """The topic as the loss reads it."""
        return topic

    def reads(self, topic: Topic) -> int:
        """The number of batches of a topic that `setup` reads, for the progress."""
        return 0

    def editing(self, model: EditableModel, topics: Sequence[Topic]) -> AbstractContextManager[Any]:
        """A context in which the model is trained."""
        return nullcontext()

    def apply(self, model: EditableModel, topics: Sequence[Topic], session: Session) -> MethodOutcome:
        train, log, watch, checkpoints = session
        parts: list[tuple[Topic, LossFunction]] = []
        states = {}
        with self.editing(model, topics):
            with watch("measuring and preparing", sum(map(self.reads, topics))) as tick:
                for topic in topics:
                    method = self.with_options(topic.options)
                    followed = topic.with_tick(partial(tick, topic.name))
                    state = states[topic.name] = method.setup(model, followed)
                    topic = replace(topic, own=method.write_texts(model, followed, state))
                    parts.append((method.prepared(topic), partial(method.loss, model, state)))
            with watch(self.name, train.max_steps) as tick:
                steps = count()

                def follow(step: int, values: dict[str, float | str]) -> None:
                    while next(steps) < step:
                        tick("from the checkpoint")
                    log(step, values)
                    tick(" ".join(f"{name} {values[name]:.4g}" for name in SHOWN if name in values))

                extra = [p for state in states.values() for p in state.parameters.values()]
                memory = {f"{n}.{k}": getattr(s, k) for n, s in states.items() for k in CHANGING}
                stop_reason = fit_model(
                    model, parts, train, follow, extra, checkpoints, memory, spread=self.spreads, endless=self.endless
                )
        return MethodOutcome(states, stop_reason)
