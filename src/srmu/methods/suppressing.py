"""Methods that harden or repeat the suppression of another method, or suppress at several layers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor

from srmu.engine.generate import batch_texts
from srmu.engine.losses import is_predicted, masked_mean, mean_kl, token_entropy
from srmu.engine.model import EditableModel, copy_values
from srmu.engine.topic import Batch, Topic, move_batch
from srmu.engine.train import TrainOptions, divide_means, fit_model
from srmu.methods.base import Amount, Bounds, Count, Objective, Rate, Share, State, Terms, Weight
from srmu.methods.logits import GradDiff, fine_tune, kl_drift
from srmu.methods.own_texts import free_samples
from srmu.methods.rmu import RMU
from srmu.methods.srmu import SRMU


@dataclass(frozen=True, kw_only=True)
class Suppressing(Objective):
    """An objective that trains all weights after some steps of a first method.

    A killed run takes these first steps again: only what comes after them is saved.
    """

    depth = None
    trainable = ("*",)

    first: Literal["srmu", "rmu", "graddiff"] = "srmu"  # graddiff: with KL on retain texts
    layer: int | None = None  # of srmu and rmu
    kappa: Weight = 16.0  # of srmu and rmu
    alpha: Weight = 100.0  # weight of the first method's retain loss
    gamma: Weight = 10.0  # weight of graddiff's ascent
    anchors: Literal["none", "random"] = "none"  # random: rows of random tokens to retain
    anchor_share: Share = 0.5  # of each retain batch
    scope: Literal["window", "all"] = "window"  # tensors of the first method: its own, or all
    teacher_steps: Count = 80  # of the first method
    teacher_learning_rate: Rate = 4e-3  # of the first method

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs("anchor_share", self.anchors != "none", "anchors=random")
        for option in ("kappa", "scope"):
            self.needs(option, self.first != "graddiff", "first=srmu or rmu")
        self.needs("gamma", self.first == "graddiff", "first=graddiff")

    @property
    def suppression(self) -> Objective:
        """The first method."""
        if self.first == "graddiff":
            return GradDiff(retain="kl", alpha=self.alpha, gamma=self.gamma)
        cls = SRMU if self.first == "srmu" else RMU
        return cls(layer=self.layer, kappa=self.kappa, alpha=self.alpha)

    def resolved(self, config: Any) -> Self:
        return replace(self, layer=getattr(self.suppression.resolved(config), "layer", None))

    def prepared(self, topic: Topic) -> Topic:
        return topic.add_anchors(self.anchor_share) if self.anchors == "random" else topic

    def reads(self, topic: Topic) -> int:
        return self.suppression.reads(topic) + 2 * self.teacher_steps

    def train_scope(self, model: EditableModel) -> AbstractContextManager[None]:
        """Train the tensors that the first method trains."""
        return model.only(self.suppression.trainable if self.scope == "window" else ("*",))

    def suppress(self, model: EditableModel, topic: Topic) -> State:
        """Take the steps of the first method from the present weights; returns its state."""
        first = self.suppression
        state = first.setup(model, topic)
        part = Suppressing.prepared(self, topic), partial(first.loss, model, state)
        options = TrainOptions(learning_rate=self.teacher_learning_rate, max_steps=self.teacher_steps)
        with self.train_scope(model):
            fit_model(model, [part], options, lambda *step: None, endless=first.endless)
        return state


def perturb_weights(model: EditableModel, generator: torch.Generator, noise: float, beta: float = 1.0) -> None:
    """Shrink all weights into noise that is `beta` times the size of fresh weights."""
    std = getattr(model.module.config, "initializer_range", 0.02)
    for parameter in model.trained.values():
        if parameter.ndim > 1:  # weights of norms start at 1, not at random
            fresh = std * torch.randn(parameter.shape, generator=generator)
            # eq: UNDO, theta = (1 - a) theta_T + a b N, N ~ fresh weights
            change = noise * beta * fresh.to(model.device)
            parameter.data.copy_((1 - noise) * parameter.data.float() + change)


@dataclass(frozen=True, kw_only=True)
class Undo(Suppressing):
    """Suppresses, shrinks all weights into noise, and distils the suppressed model again.

    Each topic has its own teacher; the student starts from the last one.
    """

    name = "undo"
    paper = "arXiv 2506.06278"
    uses = ("retain texts", "texts that the original writes")
    learning_rate = 2e-3
    schedule = "linear"

    noise: Share = 0.4  # share of the weights that noise replaces
    beta: Weight = 1.0  # size of the noise relative to fresh weights
    own_texts: Amount = 480  # that the original writes, to distil on besides retain texts
    own_tokens: Annotated[int, Bounds(2, 1 << 20)] = 32  # of each, at most

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs("beta", self.noise > 0, "method.noise")
        self.needs("own_tokens", self.own_texts > 0, "method.own_texts")

    def setup(self, model: EditableModel, topic: Topic) -> State:
        copy_values([*model.trained.values()], [model.original[name] for name in model.trained])
        self.suppress(model, topic)
        teacher = {name: p.detach().clone() for name, p in model.trained.items()}
        perturb_weights(model, topic.generator("noise", shared=True), self.noise, self.beta)
        texts = free_samples(model, topic, self.own_texts, self.own_tokens, "own texts")
        return State(memory={"teacher": teacher, "texts": [text for text in texts if len(text) > 1], "read": 0})

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        memory, batches = state.memory, {"retain": retain}
        if texts := memory["texts"]:
            size, read = len(retain["input_ids"]), memory["read"]
            memory["read"] = read + size
            rows = batch_texts([texts[i % len(texts)] for i in range(read, read + size)])
            batches["own"] = move_batch(rows, model.device)
        losses = {}
        for name, batch in batches.items():
            with model.using(memory["teacher"]):
                target = model.logits(batch)
            # eq: UNDO, L = mean KL(p_T || p) of retain texts and of texts that the original wrote
            losses[name] = mean_kl(target, model.logits(batch), batch["labels"])
        return Terms(losses, {})


@dataclass(frozen=True, kw_only=True)
class TAR(Suppressing):
    """Suppresses, then continues from where an adversary has fine-tuned the model on forget texts.

    The adversary learns every other batch of them; the loss is that of the batches between.
    """

    name = "tar"
    paper = "arXiv 2408.00761"
    uses = ("retain texts", "the original's logits")
    learning_rate = 1e-4

    tamper: Literal["entropy", "first"] = "entropy"  # first: the first method's forget loss
    strength: Weight = 1.0  # weight of that loss
    hold: Weight = 10.0  # weight of KL(original || model) on retain texts
    adversary_steps: Count = 4  # of its fine-tuning, which each step starts anew
    adversary_learning_rate: Rate = 1e-4  # of that fine-tuning

    def prepared(self, topic: Topic) -> Topic:
        return replace(super().prepared(topic), forget=topic.forget[::2])

    def setup(self, model: EditableModel, topic: Topic) -> State:
        state = self.suppress(model, topic)
        learned = list(topic.forget[1::2]) or list(topic.forget)
        return State(state.tensors, state.numbers, {"first": state, "learned": learned, "turn": 0})

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        memory, weights = state.memory, [*model.trained.values()]
        start = [weight.detach().clone() for weight in weights]
        learned, begin = memory["learned"], memory["turn"] * self.adversary_steps
        memory["turn"] += 1
        batches = [learned[(begin + i) % len(learned)] for i in range(self.adversary_steps)]
        fine_tune(model, Topic("adversary", batches, []), self.adversary_steps, self.adversary_learning_rate)
        if self.tamper == "first":
            cost = self.suppression.loss(model, memory["first"], forget, forget, step).loss_values["forget"]
        else:
            cost = -masked_mean(token_entropy(model.logits(forget)), is_predicted(forget["labels"])).value
        slopes = torch.autograd.grad(self.strength * cost, weights, allow_unused=True, materialize_grads=True)
        copy_values(weights, start)
        # eq: TAR, to first order: the gradient of L(adv(theta)) is taken for that at theta
        pairs = zip(weights, slopes, strict=True)
        line = torch.stack([(weight.float() * slope.float()).sum() for weight, slope in pairs]).sum()
        held = self.hold * kl_drift(model, retain)
        return Terms({"forget": self.strength * cost.detach() + line - line.detach(), "retain": held}, {})


@dataclass(frozen=True, kw_only=True)
class Iterated(Suppressing):
    """Suppresses, relearns the forget texts, and repeats; it ends by suppressing.

    `train` configures the last suppression, `teacher_steps` those before it.
    """

    name = "iterated"
    paper = "none"
    uses = ("retain texts", "the original activations")
    learning_rate = 4e-3

    rounds: Count = 2  # of suppressing and relearning, before the last suppressing
    relearn_steps: Count = 20  # of each round
    relearn_learning_rate: Rate = 1e-4
    hold: Weight = 1.0  # weight of KL(original || model) on retain texts while it relearns

    def editing(self, model: EditableModel, topics: Sequence[Topic]) -> AbstractContextManager[None]:
        return self.train_scope(model)

    def reads(self, topic: Topic) -> int:
        return self.rounds * super().reads(topic)

    def setup(self, model: EditableModel, topic: Topic) -> State:
        for _ in range(self.rounds):
            self.suppress(model, topic)
            with model.only(self.trainable):
                fine_tune(model, topic, self.relearn_steps, self.relearn_learning_rate, self.hold)
        return self.suppression.setup(model, topic)

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # eq: unlearn-relearn, (L_first steps, then nll(x_f) + hold KL(p0 || p)(x_r) steps) x rounds
        return self.suppression.loss(model, state, forget, retain, step)


@dataclass(frozen=True, kw_only=True)
class MultiSite(Objective):
    """Drives forget activations at several layers to a target each; retain activations stay."""

    name = "multi_site"
    paper = "none"
    level = "representation"
    uses = ("retain texts", "the original activations")

    target: Literal["srmu", "rmu"] = "srmu"  # the method whose targets are used
    layers: tuple[int, ...] = ()  # (): three, evenly spread, including the last
    window: Count = 3  # number of layers to update up to each
    kappa: Weight = 32.0  # norm of each target over mean norm of forget activations there
    alpha: Weight = 1200.0  # weight of the retain loss
    anchors: Literal["none", "random"] = "none"  # random: rows of random tokens to retain
    anchor_share: Share = 0.5  # of each retain batch

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs("anchor_share", self.anchors != "none", "anchors=random")

    def part(self, layer: int) -> SRMU | RMU:
        """The method at one of the layers."""
        cls = SRMU if self.target == "srmu" else RMU
        window = max(1, min(self.window, layer + 1))
        return cls(layer=layer, window=window, kappa=self.kappa, alpha=self.alpha)

    @property
    def depth(self) -> int | None:
        return max(self.layers) + 1 if self.layers else None

    @property
    def trainable(self) -> tuple[str, ...]:
        named = {name for layer in self.layers for name in self.part(layer).trainable}
        return tuple(sorted(named)) or ("*.mlp_down",)

    def resolved(self, config: Any) -> Self:
        count = config.num_hidden_layers
        spread = {max(0, round(count * part / 3) - 1) for part in (1, 2, 3)}
        method = replace(self, layers=self.layers or tuple(sorted(spread)))
        for layer in method.layers:
            method.part(layer).resolved(config)
        return method

    def prepared(self, topic: Topic) -> Topic:
        return topic.add_anchors(self.anchor_share) if self.anchors == "random" else topic

    def reads(self, topic: Topic) -> int:
        return sum(self.part(layer).reads(topic) for layer in self.layers)

    def setup(self, model: EditableModel, topic: Topic) -> State:
        parts = {layer: self.part(layer).setup(model, topic) for layer in self.layers}
        tensors = {f"{i}/{key}": t for i, part in parts.items() for key, t in part.tensors.items()}
        return State(tensors, {str(i): p.numbers for i, p in parts.items()}, {"parts": parts})

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        def average(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {key: torch.stack([row[key] for row in rows]).mean() for key in rows[0]}

        parts = state.memory["parts"].items()
        terms = [self.part(layer).loss(model, part, forget, retain, step) for layer, part in parts]
        # eq: multi-site, L = mean over layers of SRMU eq. 5
        logged = average([divide_means(each.logged, shared=False) for each in terms])
        return Terms(average([each.loss_values for each in terms]), logged)
