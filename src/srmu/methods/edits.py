"""Methods that write weights, from gradients or task vectors, and what they share."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from srmu.engine import distributed
from srmu.engine.losses import mean_nll
from srmu.engine.model import EditableModel
from srmu.engine.stopping import StopRules
from srmu.engine.topic import Batch, Topic, interleave_batches, move_batch
from srmu.errors import DivergedError, SrmuError
from srmu.methods.base import Amount, Bounds, Count, Edit, Method, MethodOutcome, Rate, Session, State, Watch, Weight
from srmu.methods.logits import strengthen_weights


def split_batches(batches: Sequence[Batch]) -> list[Batch]:
    """Each text as a batch of its own, without padding."""
    return [
        batch.map(lambda tensor, row=row, real=mask == 1: tensor[row, real].unsqueeze(0))  # type: ignore[misc]
        for batch in batches
        for row, mask in enumerate(batch["attention_mask"])
    ]


def group_alike(*parts: list[Batch]) -> list[list[Batch]]:
    """Lists of as many single texts, each cut to the length of its partners: a longer text has a smaller gradient."""
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
            raise SrmuError(
                f"method {name} works on all topics at once, but {first.name} and "
                f"{topic.name} set its options differently; set them under method"
            )
    forget, retain = (interleave_batches([getattr(t, r) for t in topics]) for r in ("forget", "retain"))
    return replace(first, forget=forget, retain=retain)


@dataclass(frozen=True, kw_only=True)
class WholeEdit(Edit):
    """An edit of all tensors, or of those named."""

    level = "weights"
    depth = None

    parameters: tuple[str, ...] = ()  # names, globs or roles (`*.mlp`) to edit; (): all

    @property
    def trainable(self) -> tuple[str, ...]:
        return self.parameters or ("*",)


@dataclass(frozen=True, kw_only=True)
class WeightWalk(Method):
    """Moves the weights by equal steps in one direction, until a stop rule holds.

    The learning rate is the share of the norm of the weights that a step moves them by.
    """

    level = "weights"
    depth = None

    @abstractmethod
    def direction(self, model: EditableModel, topic: Topic, watch: Watch) -> dict[str, Tensor]:
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


@dataclass(frozen=True, kw_only=True)
class SSD(WholeEdit):
    """Dampens, once, the weights that matter far more to forget texts than to others."""

    name = "ssd"
    paper = "arXiv 2308.07707"
    spreads = True
    uses = ("retain texts",)

    alpha: Weight = 10.0  # times as important to forget texts a weight must be
    lam: Weight = 1.0  # factor of the remaining weight
    # `all`, as in the paper, is retain and forget texts together: then no weight can be more than
    # (all texts / forget texts) times as important, which is 2 for sets of equal size.
    reference: Literal["all", "retain"] = "retain"  # texts to compare importance with
    exclude: tuple[str, ...] = ()  # globs of tensors to leave as they are, such as *norm*
    samples: Count = 64  # texts of each kind, at most

    def edit(self, model: EditableModel, topics: Sequence[Topic], watch: Watch) -> dict[str, State]:
        pool = pool_topics(self.name, topics)
        method = self.with_options(pool.options)
        i_f, i_d = method.importances(model, pool, watch)
        selected, total = 0, 0.0
        for name in i_f:
            factor = dampening_factors(i_f[name], i_d[name], method.alpha, method.lam)
            with torch.no_grad():
                model.trained[name].copy_(model.trained[name].float() * factor)
            factors = distributed.gather_tensor(factor)
            selected += int((factors < 1).sum())
            total += float(factors[factors < 1].sum())
        if not selected:
            raise SrmuError(
                f"no weight is over {method.alpha:g} times as important to the forget texts; lower "
                "method.alpha" + ", or method.reference=retain" * (method.reference == "all")
            )
        count = sum(p.numel() for p in model.trained.values())
        numbers = {"dampened_share": selected / count, "mean_factor": total / selected}
        return {topic.name: State(numbers=numbers) for topic in topics}

    def importances(
        self, model: EditableModel, topic: Topic, watch: Watch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The importance of each weight, to the forget texts and to the reference."""
        left_out = {n for n in model.trained for glob in self.exclude if fnmatchcase(n, glob)}
        if self.exclude and not left_out:
            raise SrmuError(f"method.exclude={self.exclude}: matches no tensor that is edited")
        forget, retain = split_batches(topic.forget), split_batches(topic.retain)
        count = min(self.samples, len(forget), len(retain))
        pairs = group_alike(forget[:count], retain[:count])
        chosen = {name: p for name, p in model.trained.items() if name not in left_out}
        with watch("measuring importances", 2 * count) as tick, model.only([*chosen]):
            # eq: SSD, I_i = E_x (d nll(x) / d theta_i)^2, over single texts
            # This is the diagonal Fisher matrix. (Public code squares the mean gradient of a batch,
            # which depends on its size.) Only ratios are used, so sums over equal numbers do.
            sums = []
            for texts in pairs:
                # The gradient of a sharded tensor is a mean over processes, whose square would mix
                # several texts: then every process reads all texts.
                if not any(map(distributed.is_sharded, chosen.values())):
                    texts = texts[distributed.get_rank() :: distributed.get_size()]
                part = gradient_sums(chosen, batch_nlls(model, texts, tick), 2)
                sums.append({k: t if distributed.is_sharded(t) else distributed.sum_values(t) for k, t in part.items()})
        i_f, i_d = sums
        if self.reference == "all":
            for name in i_d:
                i_d[name].lerp_(i_f[name], len(forget) / (len(forget) + len(retain)))
        return i_f, i_d


def dampening_factors(i_f: Tensor, i_d: Tensor, alpha: float, lam: float) -> Tensor:
    """The factor of each weight, from its importance to forget texts and to the reference."""
    # eq: SSD, theta_i <- theta_i min(lambda I_D,i / I_f,i, 1) where I_f,i > alpha I_D,i
    return torch.where(i_f > alpha * i_d, (lam * i_d / i_f).clamp(max=1), 1.0)


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
    elicit_learning_rate: Weight = 0.01  # of the adapters, by plain gradient descent

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs("elicit_learning_rate", self.lora_rank > 0, "method.lora_rank")

    @property
    def reads_retain(self) -> bool:
        return self.spectrum == "retain"

    def direction(self, model: EditableModel, topic: Topic, watch: Watch) -> dict[str, Tensor]:
        ascent, source = self.gradients(model, topic, watch)
        with watch("damping main directions", len(ascent)) as tick:
            for name in ascent:
                turned = model.is_transposed(name)
                gradient, main = (x.T if turned else x for x in (ascent[name], source[name]))
                damped = damp_directions(gradient, main, self.components)
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
