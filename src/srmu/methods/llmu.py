"""LLMU: ascent, random answers, and a hold on retain texts (Yao et al., arXiv 2310.10683)."""

from dataclasses import dataclass
from typing import Literal

import torch

from srmu.engine import losses
from srmu.methods.base import Batch, Count, EditableModel, State, Terms, Topic, Weight
from srmu.methods.logits import LogitObjective, kl_drift


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
    average: Literal["tokens", "texts"] = "tokens"  # of likelihoods; the public code averages over texts

    def prepared(self, topic: Topic) -> Topic:
        return topic.split()

    def reads(self, topic: Topic) -> int:
        return len(topic.retain)

    def setup(self, model: EditableModel, topic: Topic) -> State:
        tokens = torch.cat([b["input_ids"][losses.is_counted(b["labels"])] for b in topic.retain])
        return State(memory={"topic": topic, "tokens": tokens[torch.isin(tokens, topic.vocabulary)]})

    def answer_randomly(self, state: State, forget: Batch, step: int) -> Batch:
        """Each text `answers` times, ending in random retain tokens; the paper takes answers to other questions."""
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
            logits, labels = model.logits(batch), batch["labels"]
            if self.average == "texts":
                return losses.row_mean(losses.text_nlls(logits, labels), labels)
            return losses.mean_nll(logits, labels)

        # eq: LLMU, L = -e1 nll(answer) + e2 mean_K nll(random answer) + e3 KL(p0 || p)(x_r)
        # (public code: an ascent on no token, random answers scored with their prompts)
        terms = {
            "forget": -self.forget_weight * nll(forget),
            "random": self.random_weight * nll(self.answer_randomly(state, forget, step)),
            "retain": self.retain_weight * kl_drift(model, retain),
        }
        return Terms(terms, {})
