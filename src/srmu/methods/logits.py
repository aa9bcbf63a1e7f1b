"""Objectives of the model's output, trained on all tensors, those named, or LoRA adapters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from torch import Tensor

from srmu.engine import losses
from srmu.engine.model import EditableModel, copy_values
from srmu.engine.sites import is_linear, is_stack
from srmu.engine.train import TrainOptions, fit_model
from srmu.errors import SrmuError
from srmu.methods.base import Amount, Batch, Needs, Objective, Terms, Topic, Weight


@dataclass(frozen=True, kw_only=True)
class LogitObjective(Objective):
    """An objective of next-token logits that trains all tensors, those named, or LoRA adapters."""

    learning_rate = 1e-5

    parameters: tuple[str, ...] = ()  # names, globs or roles (`*.mlp`) to train; (): all
    lora_rank: Amount = 0  # rank of adapters beside the linear maps, merged at the end; 0: none
    lora_alpha: Annotated[int, Needs("method.lora_rank")] = 16  # adapters are scaled by lora_alpha / lora_rank

    @property
    def trainable(self) -> tuple[str, ...]:
        return self.parameters or (("*.linear",) if self.lora_rank else ("*",))

    @contextmanager
    def editing(self, model: EditableModel, topics: Sequence[Topic]) -> Iterator[None]:
        if not self.lora_rank:
            yield
            return
        for name, parameter in model.trained.items():
            owner, _, kind = name.rpartition(".")
            if is_stack(name, parameter):
                continue
            if kind != "weight" or not is_linear(model.module.get_submodule(owner)):
                advice = "name others, for example method.parameters=['*.linear']"
                raise SrmuError(f"method.lora_rank adapts the matrices of linear maps, which {name} is not; {advice}")
        with model.adapted(self.lora_rank, self.lora_alpha, topics[0].number("adapters")):
            yield
            model.merge()


@dataclass(frozen=True, kw_only=True)
class Retaining(LogitObjective):
    """An objective of logits with a choice of retain loss."""

    spreads = True

    retain: Literal["none", "nll", "kl"] = "none"  # their likelihood, or KL(original || model)
    alpha: Annotated[Weight, Needs("method.retain")] = 1.0  # weight of the retain loss

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
    """Mean KL(original || model) over counted tokens, of logits over T, times T^2; `logits` are the model's."""
    logits = model.logits(batch) if logits is None else logits
    with model.frozen():
        before = model.logits(batch)
    if temperature != 1:
        before, logits = before.float() / temperature, logits.float() / temperature
    return temperature**2 * losses.mean_kl(before, logits, batch["labels"])


def log_ratios(model: EditableModel, batch: Batch) -> Tensor:
    """log p/p0 of each text's counted tokens together, (B,): by how much they are likelier than by the original."""

    def nll() -> Tensor:
        return losses.token_nll(model.logits(batch), batch["labels"]).sum(dim=1)

    with model.frozen():
        before = nll()
    return before - nll()


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
