"""Quark: quantised reward (Lu et al., arXiv 2205.13636)."""

from dataclasses import dataclass
from typing import Annotated

from srmu.engine.generate import join_responses
from srmu.engine.losses import is_predicted, token_entropy, token_kl, token_nll
from srmu.engine.topic import move_batch
from srmu.errors import SrmuError
from srmu.methods.base import Batch, Bounds, Count, EditableModel, State, Terms, Topic, Weight
from srmu.methods.logits import LogitObjective
from srmu.methods.quark_pool import Pool, control_tokens, controlled_logits, find_reward


@dataclass(frozen=True, kw_only=True)
class Quark(LogitObjective):
    """Learns to write those of its own continuations of forget texts that a reward prefers."""

    name = "quark"
    paper = "arXiv 2205.13636"
    uses = ("texts that it samples", "the original's logits")

    reward: str = "likelihood"  # likelihood, overlap, or your own: path/to/file.py:function
    fluency: Weight = 1.0  # weight, in the reward, of a continuation's likelihood by itself
    quantiles: Annotated[int, Bounds(2, 1 << 16)] = 5  # of the pool by reward; the best has no control token
    kl: Weight = 0.05  # weight of KL(model || original)
    entropy: Weight = 0.06  # weight of the entropy
    response: Count = 20  # tokens of a continuation, at most
    sample_every: Count = 40  # steps between two samples of each prompt
    pool: Count = 64  # prompts, at most

    def __post_init__(self) -> None:
        super().__post_init__()
        find_reward(self.reward)

    def reads(self, topic: Topic) -> int:
        return len(topic.forget)

    def setup(self, model: EditableModel, topic: Topic) -> State:
        pool = Pool(model, topic, find_reward(self.reward), self.fluency, prompts=self.pool, length=self.response)
        if self.quantiles > (begun := len(pool.entries)):
            raise SrmuError(f"method.quantiles: topic {topic.name} has {begun} continuations")
        # One token fewer than quantiles: the best has none, because an export is an ordinary
        # checkpoint, used without tokens (the paper uses its model with the token of the best).
        control = control_tokens(model, topic, self.quantiles - 1)
        return State(memory={"pool": pool}, parameters={"control": control})

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        pool = state.memory["pool"]
        if step - pool.explored >= self.sample_every:
            pool.explore(model, step)
        entries, ranks = pool.draw(len(forget["input_ids"]), self.quantiles, step)
        batch = move_batch(join_responses([e.prompt for e in entries], [e.response for e in entries]), model.device)
        with model.frozen():
            before = model.logits(batch)  # the original sees no control token
        logits = controlled_logits(model, batch, ranks, state.parameters["control"])
        mask = is_predicted(batch["labels"])
        tokens = {  # (B, S) each, 0 where no token of a response is predicted
            "forget": token_nll(logits, batch["labels"]),
            # The public code's order; the paper's text has KL(original || model).
            "kl": self.kl * token_kl(logits, before) * mask,
            "entropy": -self.entropy * token_entropy(logits) * mask,
        }
        # eq: Quark, L = mean_y [ -log p(y|k,x) + kl KL(p(.|k,x) || p0(.|x)) - entropy H(p(.|k,x)) ]
        losses = {name: values.sum() / mask.sum() for name, values in tokens.items()}
        return Terms(losses, {"reward": pool.latest})
