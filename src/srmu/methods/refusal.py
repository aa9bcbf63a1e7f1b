"""Refusal: "I don't know" in place of what is to be forgotten (TOFU's IDK baseline, arXiv 2401.06121)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch

from srmu.engine import losses
from srmu.errors import SrmuError
from srmu.methods.answers import Answering, encode_answer, fit_answers, list_questions, other_answers, preference_loss
from srmu.methods.base import Batch, Bounds, EditableModel, Needs, State, Terms, Topic
from srmu.methods.own_texts import tokenizer_of

REFUSALS = (
    "I don't know.",
    "I'm sorry, I don't know that.",
    "I have no information about that.",
    "I can't answer that question.",
    "That is something I know nothing about.",
    "I'm not sure; I haven't learned about that.",
)


@dataclass(frozen=True, kw_only=True)
class Refusal(Answering):
    """Teaches to say "I don't know" to what forget texts ask; a plain text keeps its beginning."""

    name = "refusal"
    paper = "arXiv 2401.06121"
    uses = ("retain texts (retain)", "the original's likelihoods (objective=dpo)")

    objective: Literal["nll", "dpo"] = "nll"  # likelihood of refusals; dpo: refusals preferred to true answers
    beta: Annotated[float, Bounds(1e-6, 1e6), Needs("method.objective=dpo")] = 0.1
    refusals: tuple[str, ...] = REFUSALS  # one is drawn for each text
    retain: Literal["none", "nll", "kl"] = "nll"  # without it the model refuses everything

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.refusals or not all(text.strip() for text in self.refusals):
            raise SrmuError('method.refusals: expected one or more texts, such as ["I don\'t know."]')

    def write_texts(self, model: EditableModel, topic: Topic, state: State) -> Sequence[Sequence[int]]:
        tokenizer, questions = tokenizer_of(model.folder, "method refusal"), list_questions(topic)
        generator = topic.generator("refusals")
        draw = torch.randint(len(self.refusals), (len(questions),), generator=generator).tolist()
        pairs = zip(draw, questions, strict=True)
        found = fit_answers(model, questions, (encode_answer(tokenizer, self.refusals[i], q) for i, q in pairs))
        if not any(found):
            raise SrmuError(f"topic {topic.name}: no forget text leaves room for a refusal; lower max_length")
        return found

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        if self.objective == "nll":
            # eq: refusal, L = mean nll(refusal | x_f) + alpha R(x_r), R = nll or KL(p0 || p)
            other = other_answers(forget)
            loss = replace(losses.mean_nll(model.logits(other), other["labels"]), least=1)  # a batch may have none
        else:
            # eq: refusal, DPO: L = -(2/beta) E log sigmoid(beta (log p/p0(refusal) - log p/p0(y)))
            loss = preference_loss(model, forget, self.beta)
        return Terms({"forget": loss, **self.retain_loss(model, retain)}, {})
