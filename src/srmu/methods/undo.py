"""UNDO: unlearn, noise, distil on outputs (Lee et al., arXiv 2506.06278)."""

from dataclasses import dataclass
from typing import ClassVar

from srmu.engine.batch import Batch, move_batch
from srmu.engine.generate import batch_texts
from srmu.engine.losses import mean_kl
from srmu.engine.model import EditableModel, copy_values
from srmu.engine.topic import Topic
from srmu.engine.train import Schedule, Terms
from srmu.methods.base import SHARE, WEIGHT, State
from srmu.methods.own_texts import free_samples
from srmu.methods.suppressing import Suppressing, perturb_weights


@dataclass(frozen=True, kw_only=True)
class Undo(Suppressing):
    """Suppresses, shrinks all weights into noise, and distils the suppressed model again.

    Each topic has its own teacher; the student starts from the last one.
    """

    name: ClassVar[str] = "undo"
    paper: ClassVar[str] = "arXiv 2506.06278"
    uses: ClassVar[tuple[str, ...]] = ("retain texts", "texts that the original writes")
    learning_rate: ClassVar[float] = 2e-3
    schedule: ClassVar[Schedule] = "linear"

    noise: float = 0.4  # share of the weights that noise replaces
    beta: float = 1.0  # size of the noise relative to fresh weights
    own_texts: int = 480  # that the original writes, to distil on besides retain texts
    own_tokens: int = 32  # of each, at most

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within(noise=SHARE, beta=WEIGHT, own_texts=(0, 1 << 30), own_tokens=(2, 1 << 20))
        self.needs("beta", self.noise > 0, "method.noise")
        self.needs("own_tokens", self.own_texts > 0, "method.own_texts")

    def setup(self, model: EditableModel, topic: Topic) -> State:
        copy_values([*model.trained.values()], [model.original[name] for name in model.trained])
        self.suppress(model, topic)
        teacher = {name: p.detach().clone() for name, p in model.trained.items()}
        perturb_weights(model, topic.generator("noise", shared=True), self.noise, self.beta)
        number = topic.number("own texts")
        texts = free_samples(model, self.own_texts, self.own_tokens, number)
        texts = [text for text in texts if len(text) > 1]
        return State(memory={"teacher": teacher, "texts": texts, "read": 0})

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        memory, batches = state.memory, {"retain": retain}
        if texts := memory["texts"]:
            size, read = len(retain["input_ids"]), memory["read"]
            rows = [texts[i % len(texts)] for i in range(read, read + size)]
            memory["read"] = read + size
            batches["own"] = move_batch(batch_texts(rows), model.device)
        losses = {}
        for name, batch in batches.items():
            with model.using(memory["teacher"]):
                target = model.logits(batch)
            # eq: UNDO, L = mean KL(p_T || p) of retain texts and of texts that the original wrote
            losses[name] = mean_kl(target, model.logits(batch), batch["labels"])
        return Terms(losses, {})
