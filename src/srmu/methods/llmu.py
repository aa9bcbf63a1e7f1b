"""LLMU: ascent, random answers, and a hold on retain texts (Yao et al., arXiv 2310.10683)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from srmu.engine.batch import Batch
from srmu.engine.losses import Mean, is_counted, mean_nll
from srmu.engine.model import EditableModel
from srmu.engine.topic import Topic
from srmu.engine.train import Terms
from srmu.methods.base import COUNT, WEIGHT, State
from srmu.methods.logits import LogitObjective, kl_drift


@dataclass(frozen=True, kw_only=True)
class LLMU(LogitObjective):
    """Makes the ends of forget texts less likely, teaches random ends, and holds retain texts."""

    name: ClassVar[str] = "llmu"
    paper: ClassVar[str] = "arXiv 2310.10683"
    learning_rate: ClassVar[float] = 2e-6
    endless: ClassVar[bool] = True
    uses: ClassVar[tuple[str, ...]] = ("retain texts", "the original's logits")

    forget_weight: float = 0.5  # of the ascent on the true ends
    random_weight: float = 1.0  # of the random ends' likelihood
    retain_weight: float = 1.0  # of KL(original || model) on retain texts
    answers: int = 5  # random ends per text and step

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = ("forget_weight", "random_weight", "retain_weight")
        self.within(**dict.fromkeys(weights, WEIGHT), answers=COUNT)

    def prepared(self, topic: Topic) -> Topic:
        return topic.split()

    def reads(self, topic: Topic) -> int:
        return len(topic.retain)

    def setup(self, model: EditableModel, topic: Topic) -> State:
        tokens = torch.cat([b["input_ids"][is_counted(b["labels"])] for b in topic.retain])
        ordinary = tokens[torch.isin(tokens, topic.vocabulary)]
        return State(memory={"topic": topic, "tokens": ordinary})

    def answer_randomly(self, state: State, forget: Batch, step: int) -> Batch:
        """The texts, each `answers` times, with random stretches of retain tokens as their ends.

        The paper uses answers to other questions, which plain texts do not have. A stretch wraps
        from the last retain token to the first. It depends on topic, seed and step only.
        """
        tokens, topic = state.memory["tokens"], state.memory["topic"]
        generator = topic.generator(f"random answers {step}")
        batch = forget.map(lambda tensor: tensor.repeat(self.answers, 1))
        places = is_counted(batch["labels"])
        starts = torch.randint(len(tokens), (len(places), 1), generator=generator)
        window = tokens[(starts + torch.arange(places.shape[1])) % len(tokens)].to(places.device)
        ids = torch.where(places, window, batch["input_ids"])
        return batch.replace(input_ids=ids, labels=torch.where(places, ids, -100))

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        def nll(batch: Batch) -> Mean:
            return mean_nll(model.logits(batch), batch["labels"])

        # eq: LLMU, L = -e1 nll(answer) + e2 mean_K nll(random answer) + e3 KL(p0 || p)(x_r)
        # (public code: an ascent on no token, random answers scored with their prompts)
        losses = {
            "forget": -self.forget_weight * nll(forget),
            "random": self.random_weight * nll(self.answer_randomly(state, forget, step)),
            "retain": self.retain_weight * kl_drift(model, retain, model.logits(retain)),
        }
        return Terms(losses, {})
