"""Quark: quantised reward (Lu et al., arXiv 2205.13636)."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Annotated, Any, NamedTuple

import torch

from srmu.engine.files import import_from_file
from srmu.engine.generate import Ids, join_responses, response_likelihoods, sample_continuations
from srmu.engine.losses import is_counted, is_predicted, token_entropy, token_kl, token_nll
from srmu.engine.topic import move_batch
from srmu.errors import SrmuError, suggest_word
from srmu.methods.base import Batch, Bounds, Count, EditableModel, State, Terms, Topic, Weight
from srmu.methods.edits import split_batches
from srmu.methods.logits import LogitObjective

# (the original model, prompts, responses, true continuations) -> the reward of each response
Reward = Callable[[EditableModel, list[Ids], list[Ids], list[Ids]], list[float]]


class PoolEntry(NamedTuple):
    """A continuation of a prompt, with its reward."""

    prompt: Ids
    response: Ids
    reward: float


def split_continuations(topic: Topic, count: int) -> list[tuple[Ids, Ids]]:
    """The first `count` forget texts, each as a prompt and its true continuation."""
    texts = [(text["input_ids"][0], is_counted(text["labels"][0])) for text in split_batches(topic.split().forget)]
    return [(ids[~answer].tolist(), ids[answer].tolist()) for ids, answer in texts[:count]]


def reward_unlikely(model: EditableModel, prompts: list[Ids], responses: list[Ids], truths: list[Ids]) -> list[float]:
    """Minus the mean log-likelihood of the response under the original: - mean log p0(y | x)."""
    return [-value for value in response_likelihoods(model, prompts, responses)]


def reward_different(model: EditableModel, prompts: list[Ids], responses: list[Ids], truths: list[Ids]) -> list[float]:
    """Minus the share of the bigrams of a response that the true continuation has."""
    rewards = []
    for response, truth in zip(responses, truths, strict=True):
        grams: list[Any] = list(pairwise(response)) or response  # a single token counts itself
        known: set[Any] = {*pairwise(truth), *truth}
        rewards.append(-sum(gram in known for gram in grams) / len(grams))
    return rewards


REWARDS: dict[str, Reward] = {"likelihood": reward_unlikely, "overlap": reward_different}


def find_reward(name: str) -> Reward:
    """A reward by its name, or the user's own: `path/to/file.py:function`."""
    if name in REWARDS:
        return REWARDS[name]
    if ".py:" not in name:
        raise SrmuError(f"unknown method.reward {name!r}{suggest_word(name, REWARDS)}, or path/to/file.py:function")
    function: Any = import_from_file("method.reward", name)
    if not callable(function):
        raise SrmuError(f"method.reward {name}: there is no such function in that file")
    return function


def judge_responses(
    model: EditableModel, reward: Reward, fluency: float, texts: list[tuple[Ids, Ids]], responses: list[Ids]
) -> list[PoolEntry]:
    """The responses with their rewards, plus `fluency` times the mean log p0 of a response after <s> alone."""
    contexts, truths = map(list, zip(*texts, strict=True))
    with model.frozen():
        values = reward(model, contexts, responses, truths)
        fluent = response_likelihoods(model, [x[:1] for x in contexts], responses)
    if len(values) != len(responses):
        raise SrmuError(f"method.reward gave {len(values)} numbers for {len(responses)} responses")
    rewards = [float(value) + fluency * extra for value, extra in zip(values, fluent, strict=True)]
    return [PoolEntry(*row) for row in zip(contexts, responses, rewards, strict=True)]


def split_quantiles(pool: list[PoolEntry], count: int) -> list[list[PoolEntry]]:
    """The pool by reward in `count` equal parts, best first; the remainder joins the worst."""
    ranked = sorted(pool, key=lambda entry: -entry.reward)
    ends = [*(i * (len(ranked) // count) for i in range(count)), len(ranked)]
    return [ranked[start:end] for start, end in pairwise(ends)]


class Pool:
    """The true continuations of a topic's prompts and samples, which are added as training goes on, with rewards."""

    def __init__(self, model: EditableModel, topic: Topic, method: "Quark") -> None:
        self.topic, self.method, self.reward = topic, method, find_reward(method.reward)
        self.texts = split_continuations(topic, method.pool)
        self.entries: list[PoolEntry] = []
        self.add(model, [truth[: method.response] for _, truth in self.texts])
        self.explore(model, 0)
        self.fixed = len(self.entries)  # those that are the same in every run

    def add(self, model: EditableModel, responses: list[Ids]) -> list[PoolEntry]:
        """Add a response to each prompt."""
        entries = judge_responses(model, self.reward, self.method.fluency, self.texts, responses)
        self.entries += entries
        return entries

    def explore(self, model: EditableModel, step: int) -> None:
        """Add a sample for each prompt, drawn without a control token, as for the best quantile."""
        contexts = [prompt for prompt, _ in self.texts]
        seed = self.topic.number(f"samples {step}")
        entries = self.add(model, sample_continuations(model.module, contexts, self.method.response, seed))
        self.explored, self.latest = step, torch.tensor([entry.reward for entry in entries]).mean()

    def state_dict(self) -> dict[str, Any]:
        """What later samples added: responses and rewards, without the prompts."""
        added = [(entry.response, entry.reward) for entry in self.entries[self.fixed :]]
        return {"added": added, "explored": self.explored, "latest": float(self.latest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        prompts = cycle(prompt for prompt, _ in self.texts)
        self.entries += [PoolEntry(prompt, *row) for prompt, row in zip(prompts, state["added"], strict=False)]
        self.explored, self.latest = state["explored"], torch.tensor(state["latest"])

    def draw(self, count: int, parts: int, step: int) -> tuple[list[PoolEntry], list[int]]:
        """Entries, as many from each quantile as possible, with their quantiles, best (0) first."""
        generator = self.topic.generator(f"batch {step}")
        order = torch.randperm(parts, generator=generator).tolist()
        ranks = sorted(order[i % parts] for i in range(count))
        places = torch.rand(count, generator=generator).tolist()
        ranked = split_quantiles(self.entries, parts)
        chosen = [ranked[k][int(u * len(ranked[k]))] for k, u in zip(ranks, places, strict=True)]
        return chosen, ranks


def control_tokens(model: EditableModel, topic: Topic, count: int) -> torch.nn.Parameter:
    """Embeddings of new tokens, (count, D), distributed like those of ordinary tokens."""
    with torch.no_grad():
        known = model.module.get_input_embeddings()(topic.vocabulary.to(model.device))
    draw = torch.randn(count, known.shape[1], generator=topic.generator("control tokens"))
    rows = known.float().mean(0) + known.float().std(0) * draw.to(model.device)
    return torch.nn.Parameter(rows.to(known.dtype))


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
        pool = Pool(model, topic, self)
        if self.quantiles > (begun := len(pool.entries)):
            raise SrmuError(f"method.quantiles: topic {topic.name} has {begun} continuations, too few; lower it")
        # The best quantile has none: an export is used without (the paper uses its model with the best one's token).
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
        best = ranks.count(0)  # rows without a control token, which come first
        parts = [model.logits(batch.cut(slice(best)))] if best else []
        if best < len(ranks):
            control = state.parameters["control"][[rank - 1 for rank in ranks[best:]]]
            parts.append(model.logits(batch.cut(slice(best, None)), control))
        logits = torch.cat(parts)
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
