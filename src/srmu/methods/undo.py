"""UNDO: unlearn, noise, distil on outputs (Lee et al., arXiv 2506.06278)."""

from dataclasses import dataclass
from typing import Annotated

from srmu.engine.generate import batch_texts
from srmu.engine.losses import mean_kl
from srmu.engine.model import EditableModel, copy_values
from srmu.engine.topic import Batch, Topic, move_batch
from srmu.methods.base import Amount, Bounds, Needs, Share, State, Terms, Weight
from srmu.methods.own_texts import free_samples
from srmu.methods.suppressing import Suppressing, perturb_weights


@dataclass(frozen=True, kw_only=True)
class Undo(Suppressing):
    """Suppresses, shrinks all weights into noise, and distils each topic's suppressed model back."""

    name = "undo"
    paper = "arXiv 2506.06278"
    uses = ("retain texts", "texts that the original writes")
    learning_rate = 2e-3 * 640 / 14336  # found on the testbed
    scales = True
    schedule = "linear"

    noise: Share = 0.4  # share of the weights that noise replaces
    beta: Annotated[Weight, Needs("method.noise")] = 1.0  # size of the noise relative to fresh weights
    own_texts: Amount = 480  # that the original writes, to distil on besides retain texts
    own_tokens: Annotated[int, Bounds(2, 1 << 20), Needs("method.own_texts")] = 32  # of each, at most

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
