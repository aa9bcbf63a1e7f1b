"""Objectives of the model's output, trained on all tensors, those named, or LoRA adapters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers.pytorch_utils import Conv1D

from srmu.engine import losses
from srmu.engine.model import EditableModel, copy_values
from srmu.engine.topic import Topic
from srmu.engine.train import TrainOptions, fit_model
from srmu.errors import SrmuError
from srmu.methods.base import Amount, Batch, Bounds, Count, Objective, Rate, State, Terms, Weight


@dataclass(frozen=True, kw_only=True)
class LogitObjective(Objective):
    """An objective of next-token logits that trains all tensors, those named, or LoRA adapters."""

    learning_rate = 1e-5
    depth = None

    parameters: tuple[str, ...] = ()  # names, globs or roles (`*.mlp`) to train; (): all
    lora_rank: Amount = 0  # rank of adapters beside the linear maps, merged at the end; 0: none
    lora_alpha: int = 16  # adapters are scaled by lora_alpha / lora_rank

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs("lora_alpha", self.lora_rank > 0, "method.lora_rank")

    @property
    def trainable(self) -> tuple[str, ...]:
        return self.parameters or (("*.linear",) if self.lora_rank else ("*",))

    @contextmanager
    def editing(self, model: EditableModel, topics: Sequence[Topic]) -> Iterator[None]:
        if not self.lora_rank:
            yield
            return
        for name in model.trained:
            owner, _, kind = name.rpartition(".")
            if kind != "weight" or not isinstance(model.module.get_submodule(owner), nn.Linear | Conv1D):
                raise SrmuError(
                    f"method.lora_rank adapts the matrices of linear maps, which {name} is not; "
                    "name others, for example method.parameters=['*.linear']"
                )
        with model.adapted(self.lora_rank, self.lora_alpha, topics[0].number("adapters")):
            yield
            model.merge()


@dataclass(frozen=True, kw_only=True)
class Retaining(LogitObjective):
    """An objective of logits with a choice of retain loss."""

    spreads = True

    retain: Literal["none", "nll", "kl"] = "none"  # their likelihood, or KL(original || model)
    alpha: Weight = 1.0  # weight of the retain loss

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs("alpha", self.retain != "none", "method.retain")

    @property
    def reads_retain(self) -> bool:
        return self.retain != "none"

    def retain_loss(self, model: EditableModel, retain: Batch) -> dict[str, losses.Mean]:
        """The retain loss by name, if there is one."""
        if self.retain == "none":
            return {}
        nll = self.retain == "nll"
        loss = losses.mean_nll(model.logits(retain), retain["labels"]) if nll else kl_drift(model, retain)
        return {"retain": self.alpha * loss}


def kl_drift(model: EditableModel, batch: Batch, logits: Tensor | None = None, temperature: float = 1.0) -> losses.Mean:
    """KL(original || model), mean over the counted tokens of a batch; `logits` are the model's.

    The logits of both are divided by the temperature T; T^2 restores the size of the gradient.
    """
    logits = model.logits(batch) if logits is None else logits
    with model.frozen():
        before = model.logits(batch)
    if temperature != 1:
        before, logits = before.float() / temperature, logits.float() / temperature
    return temperature**2 * losses.mean_kl(before, logits, batch["labels"])


def strengthen_weights(model: EditableModel, topic: Topic, steps: int, learning_rate: float) -> dict[str, Tensor]:
    """The trained tensors after fine-tuning on the forget texts; the model is put back."""
    fine_tune(model, topic, steps, learning_rate)
    tuned = {name: p.detach().clone() for name, p in model.trained.items()}
    copy_values([*model.trained.values()], [model.original[name] for name in model.trained])
    return tuned


def fine_tune(model: EditableModel, topic: Topic, steps: int, learning_rate: float, keep: float = 0.0) -> None:
    """Raise the likelihood of the forget texts from the present weights; `keep`: weight of the retain texts' KL."""

    def loss(forget: Batch, retain: Batch, step: int) -> Terms:
        terms = {"forget": losses.mean_nll(model.logits(forget), forget["labels"])}
        if keep:
            terms["retain"] = keep * kl_drift(model, retain)
        return Terms(terms, {})

    options = TrainOptions(learning_rate=learning_rate, max_steps=steps)
    topic = topic if keep else replace(topic, retain=[])
    fit_model(model, [(topic, loss)], options, lambda *step: None)


@dataclass(frozen=True, kw_only=True)
class GA(LogitObjective):
    """Lowers the likelihood of forget texts without end; a stop rule ends it."""

    name = "ga"
    paper = "arXiv 2401.06121"
    spreads = True
    endless = True

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # eq: GA, L = -mean nll(x_f)
        return Terms({"forget": -losses.mean_nll(model.logits(forget), forget["labels"])}, {})


@dataclass(frozen=True, kw_only=True)
class GradDiff(Retaining):
    """Lowers the likelihood of forget texts and holds retain texts by likelihood or KL."""

    name = "graddiff"
    paper = "arXiv 2203.12817"
    endless = True
    uses = ("retain texts", "the original's logits (retain=kl)")

    retain: Literal["nll", "kl"] = "nll"
    gamma: Weight = 1.0  # weight of the ascent

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # eq: GradDiff, L = -gamma nll(x_f) + alpha R(x_r), R = nll or KL(p0 || p)
        ascent = -self.gamma * losses.mean_nll(model.logits(forget), forget["labels"])
        return Terms({"forget": ascent, **self.retain_loss(model, retain)}, {})


@dataclass(frozen=True, kw_only=True)
class NPO(Retaining):
    """Lowers the likelihood of forget texts, ever more gently as it falls: bounded ascent."""

    name = "npo"
    paper = "arXiv 2404.05868"
    uses = ("the original's likelihoods", "retain texts (retain)")

    beta: Annotated[float, Bounds(1e-6, float("inf"))] = 0.1

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        def nll() -> Tensor:  # of each text, summed over its tokens (B,)
            return losses.token_nll(model.logits(forget), forget["labels"]).sum(dim=1)

        with model.frozen():
            before = nll()
        # eq: NPO, L = -(2/beta) E log sigmoid(-beta log(p/p0)), log(p/p0) = nll0 - nll
        # (public ports took raw logits for log-probabilities, or means for the sums)
        terms = -2 / self.beta * logsigmoid(self.beta * (nll() - before))
        return Terms({"forget": losses.row_mean(terms, forget["labels"]), **self.retain_loss(model, retain)}, {})


@dataclass(frozen=True, kw_only=True)
class SimNPO(Retaining):
    """Lowers forget texts' likelihood per token, less where it is low already: bounded ascent."""

    name = "simnpo"
    paper = "arXiv 2410.07163"
    uses = ("retain texts (retain)",)

    beta: Annotated[float, Bounds(1e-6, 1e6)] = 2.5
    gamma: Annotated[float, Bounds(-1e6, 1e6)] = 0.0  # nats per token still too likely; gamma/beta in the paper
    weight: Weight = 1.0  # of the forget loss

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        labels = forget["labels"]
        nll = losses.token_nll(model.logits(forget), labels).sum(dim=1)  # (B,)
        # Public ports divide by the unshifted labels: one too many per text.
        length = losses.is_predicted(labels).sum(dim=1).clamp(min=1)
        # eq: SimNPO, L = -(2/beta) E log sigmoid(beta (nll/|y| - gamma))
        # gamma as in the code; in the paper it stands outside: gamma_paper = beta gamma
        terms = -2 / self.beta * logsigmoid(self.beta * (nll / length - self.gamma))
        return Terms({"forget": self.weight * losses.row_mean(terms, labels), **self.retain_loss(model, retain)}, {})


@dataclass(frozen=True, kw_only=True)
class LLMU(LogitObjective):
    """Makes the ends of forget texts less likely, teaches random ends, and holds retain texts."""

    name = "llmu"
    paper = "arXiv 2310.10683"
    learning_rate = 2e-6
    endless = True
    uses = ("retain texts", "the original's logits")

    forget_weight: Weight = 0.5  # of the ascent on the true ends
    random_weight: Weight = 1.0  # of the random ends' likelihood
    retain_weight: Weight = 1.0  # of KL(original || model) on retain texts
    answers: Count = 5  # random ends per text and step

    def prepared(self, topic: Topic) -> Topic:
        return topic.split()

    def reads(self, topic: Topic) -> int:
        return len(topic.retain)

    def setup(self, model: EditableModel, topic: Topic) -> State:
        tokens = torch.cat([b["input_ids"][losses.is_counted(b["labels"])] for b in topic.retain])
        return State(memory={"topic": topic, "tokens": tokens[torch.isin(tokens, topic.vocabulary)]})

    def answer_randomly(self, state: State, forget: Batch, step: int) -> Batch:
        """The texts, each `answers` times, with random stretches of retain tokens as their ends.

        The paper uses answers to other questions, which plain texts do not have.
        """
        tokens = state.memory["tokens"]
        batch = forget.map(lambda tensor: tensor.repeat(self.answers, 1))
        places = losses.is_counted(batch["labels"])
        generator = state.memory["topic"].generator(f"random answers {step}")
        starts = torch.randint(len(tokens), (len(places), 1), generator=generator)
        window = tokens[(starts + torch.arange(places.shape[1])) % len(tokens)].to(places.device)
        ids = torch.where(places, window, batch["input_ids"])
        return batch.replace(input_ids=ids, labels=torch.where(places, ids, -100))

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        def nll(batch: Batch) -> losses.Mean:
            return losses.mean_nll(model.logits(batch), batch["labels"])

        # eq: LLMU, L = -e1 nll(answer) + e2 mean_K nll(random answer) + e3 KL(p0 || p)(x_r)
        # (public code: an ascent on no token, random answers scored with their prompts)
        terms = {
            "forget": -self.forget_weight * nll(forget),
            "random": self.random_weight * nll(self.answer_randomly(state, forget, step)),
            "retain": self.retain_weight * kl_drift(model, retain),
        }
        return Terms(terms, {})


@dataclass(frozen=True, kw_only=True)
class UNDIAL(Retaining):
    """Learns the original's own next-token distribution with the true token made less likely."""

    name = "undial"
    paper = "arXiv 2402.10052"
    uses = ("the original's logits", "retain texts (retain)")

    strength: Weight = 10.0  # subtracted from the true token's logit

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # Public ports index with the label -100, which lowers a wrong token, and count padding.
        token = forget["labels"][:, 1:].clamp(min=0).unsqueeze(-1)  # (B, S, 1)
        with model.frozen():
            before = model.logits(forget)[:, :-1].float()  # in float32, whatever the model
        # eq: UNDIAL, q = softmax(z0 - strength onehot(y)), L = mean CE(q, p)
        lowered = before.scatter_add(-1, token, before.new_full(token.shape, -self.strength))
        log_p = model.logits(forget)[:, :-1].float().log_softmax(-1)
        entropy = -(lowered.softmax(-1) * log_p).sum(-1)  # (B, S)
        loss = losses.masked_mean(entropy, losses.is_predicted(forget["labels"]))
        return Terms({"forget": loss, **self.retain_loss(model, retain)}, {})


@dataclass(frozen=True, kw_only=True)
class RKLU(Retaining):
    """Learns the original's logits without what fine-tuning on forget texts raises in them."""

    name = "rklu"
    paper = "ACL 2025.naacl-long.60"
    uses = ("the original's logits", "a model strengthened on the forget texts", "retain texts (retain)")

    strength: Weight = 5.0  # factor of the rise of a logit that is subtracted
    teacher_steps: Count = 40  # of fine-tuning on the forget texts
    teacher_learning_rate: Rate = 1e-5
    # Adding a constant to raw logits changes no distribution, but it changes their rise.
    logits: Literal["log_softmax", "raw"] = "log_softmax"
    select: Literal["none", "label_rise"] = "none"  # only tokens that fine-tuning made likelier

    def reads(self, topic: Topic) -> int:
        return self.teacher_steps

    def setup(self, model: EditableModel, topic: Topic) -> State:
        tuned = strengthen_weights(model, topic, self.teacher_steps, self.teacher_learning_rate)
        return State(memory={"strengthened": tuned})

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        def logits() -> Tensor:
            z = model.logits(forget).float()
            return z.log_softmax(-1) if self.logits == "log_softmax" else z

        with model.frozen():
            base = logits()
        with model.using(state.memory["strengthened"]):
            raised = logits()
        mask = losses.is_predicted(forget["labels"])
        if self.select == "label_rise":
            token = forget["labels"][:, 1:].clamp(min=0).unsqueeze(-1)  # (B, S, 1)
            mask = mask & ((raised - base)[:, :-1].gather(-1, token).squeeze(-1) > 0)
        # eq: RKLU, L = mean KL(p || softmax(z0 - strength relu(z+ - z0)))
        kl = losses.token_kl(model.logits(forget), losses.generic_logits(base, raised, self.strength))
        loss = losses.masked_mean(kl, mask, least=1)  # a batch may have none that rise
        return Terms({"forget": loss, **self.retain_loss(model, retain)}, {})


@dataclass(frozen=True, kw_only=True)
class SCRUB(LogitObjective):
    """Takes steps away from the original on forget texts, between steps that hold retain texts."""

    name = "scrub"
    paper = "arXiv 2302.09880"
    spreads = True
    endless = True
    uses = ("retain texts", "the original's logits")

    ascent_steps: Count = 30  # steps away per topic: one after each of its first retain steps
    alpha: Weight = 0.5  # weight of KL(original || model) on retain texts
    gamma: Weight = 1.0  # weight of their likelihood
    temperature: Annotated[float, Bounds(1e-3, 1e3)] = 1.0  # of both distributions of the KL

    def setup(self, model: EditableModel, topic: Topic) -> State:
        if self.gamma == 0 and not model.delta():
            raise SrmuError(
                "method.gamma=0: at the start KL has no gradient, and nothing else would move the "
                "model; give gamma a value above 0"
            )
        return State(memory={"turn": 0})

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # Turns count by topic: with two topics, one would get all odd steps.
        turn = state.memory["turn"]
        state.memory["turn"] = turn + 1
        # Public code begins with the ascent, which moves because of dropout; here KL(p0 || p) is
        # at its minimum, and Adam would turn rounding noise into full steps.
        if turn % 2 and turn < 2 * self.ascent_steps:
            # eq: SCRUB, max: L = -T^2 KL(p0 || p)(x_f)
            return Terms({"forget": -kl_drift(model, forget, temperature=self.temperature)}, {})
        # eq: SCRUB, min: L = alpha T^2 KL(p0 || p)(x_r) + gamma nll(x_r)
        logits = model.logits(retain)
        kl = kl_drift(model, retain, logits, self.temperature)
        nll = losses.mean_nll(logits, retain["labels"])
        return Terms({"retain": self.alpha * kl, "retain_nll": self.gamma * nll}, {})
