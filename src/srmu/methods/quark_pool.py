"""Continuations with their rewards, and the control tokens of Quark."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from srmu.engine.files import import_from_file
from srmu.engine.generate import Ids, response_likelihoods, sample_continuations
from srmu.engine.losses import is_counted
from srmu.errors import SrmuError, suggest_word
from srmu.methods.base import Batch, EditableModel, Topic
from srmu.methods.gradients import split_batches

# (model, prompts, responses, true continuations) -> the reward of each response. The model is the
# original, without gradients; use `response_likelihoods` or `model.logits`.
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
    """The responses to prompts, with their rewards.

    `fluency` times the original's mean log-likelihood of the response after <s> alone is added.
    """
    contexts, truths = [x for x, _ in texts], [y for _, y in texts]
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
    size = len(ranked) // count
    ends = [*(i * size for i in range(count)), len(ranked)]
    return [ranked[start:end] for start, end in pairwise(ends)]


class Pool:
    """The true continuations of a topic's prompts and samples, which are added as training goes on, with rewards."""

    def __init__(
        self, model: EditableModel, topic: Topic, reward: Reward, fluency: float, *, prompts: int, length: int
    ) -> None:
        self.topic, self.reward, self.fluency, self.length = topic, reward, fluency, length
        self.texts = split_continuations(topic, prompts)
        own = [truth[:length] for _, truth in self.texts]
        self.entries = judge_responses(model, reward, fluency, self.texts, own)
        self.explore(model, 0)
        self.fixed = len(self.entries)  # those that are the same in every run

    def explore(self, model: EditableModel, step: int) -> None:
        """Add a sample for each prompt, drawn without a control token, as for the best quantile."""
        contexts = [prompt for prompt, _ in self.texts]
        responses = sample_continuations(model, contexts, self.length, self.topic.number(f"samples {step}"))
        entries = judge_responses(model, self.reward, self.fluency, self.texts, responses)
        self.entries += entries
        self.explored, self.latest = step, torch.tensor([entry.reward for entry in entries]).mean()

    def state_dict(self) -> dict[str, Any]:
        """What later samples added: responses and rewards, without the prompts."""
        added = [(entry.response, entry.reward) for entry in self.entries[self.fixed :]]
        return {"added": added, "explored": self.explored, "latest": float(self.latest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, (response, reward) in enumerate(state["added"]):
            prompt, _ = self.texts[i % len(self.texts)]
            self.entries.append(PoolEntry(prompt, response, reward))
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


def controlled_logits(model: EditableModel, batch: Batch, ranks: list[int], control: torch.Tensor) -> torch.Tensor:
    """Logits of rows, each read with the control token of its rank; rank 0, first, has none."""
    best = ranks.count(0)
    logits = [model.logits(batch.cut(slice(best)))] if best else []
    if best < len(ranks):
        logits.append(model.logits(batch.cut(slice(best, None)), control[[rank - 1 for rank in ranks[best:]]]))
    return torch.cat(logits)
