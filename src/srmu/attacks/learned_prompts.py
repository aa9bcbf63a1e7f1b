"""E12, E13 and E22: tokens, embeddings and activations that are searched for by gradients."""

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import takewhile
from timeit import repeat
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from srmu.attacks.base import Attack, AttackResult, Exam, Texts, ask_exam
from srmu.attacks.residual import answer_nll, answer_rows, pad_answers
from srmu.engine.fine_tune import Row, descend
from srmu.engine.sites import decoder_blocks, edit_outputs, hook_outputs
from srmu.evals.subject import Question, Subject, list_facts, pick_evenly


class Target(NamedTuple):
    """A question ready for suffixes: what is before them is read already."""

    past: Any
    cue: Tensor
    answer: Tensor


class SplicedSubject(Subject):
    """The subject as it answers with tokens put into each prompt: after `at` tokens, or -`at` from its end."""

    def __init__(self, model: Subject, added: list[int], at: int) -> None:
        super().__init__(model.module, model.tokenizer)
        self.added, self.at = added, at

    def split(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        before, after = super().split(prompt, answer)
        at = self.at if self.at > 0 else len(before) + self.at
        return [*before[:at], *self.added, *before[at:]], after


class GCG(Attack, id="E12", name="gcg", tier="deep"):
    """Tokens between a question and its cue (what all prompts end with) that make right answers likely."""

    steps: int = 200
    candidates: int = 128  # suffixes tried a step
    length: int = 20  # tokens of the suffix
    top: int = 256  # replacements considered for each of them
    questions: int = 5  # trained on, of the validation half; they count in `val` like the others
    rows: int = 32  # candidates read at once
    behind: int = 10  # tokens of cue and answer, as `cost` guesses

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        generator = torch.Generator().manual_seed(seed)
        chosen = random.Random(seed).sample(exam.val, min(self.questions, len(exam.val)))
        cue = common_end([model.tokens(q.prompt) for q in exam.both])
        targets = [make_target(model, q, cue, self.length) for q in chosen]
        size = min(len(model.tokenizer), model.module.get_input_embeddings().weight.shape[0])
        allowed = torch.tensor([*{*range(size)} - {*model.tokenizer.all_special_ids}])
        suffix = best = allowed[torch.randint(len(allowed), (self.length,), generator=generator)]
        before = least = float(suffix_losses(model, targets, suffix[None], self.rows))
        for _ in range(self.steps):
            slopes = suffix_gradient(model, targets, suffix)
            tried = self.draw_swaps(slopes, suffix, allowed, generator)
            values = suffix_losses(model, targets, tried, self.rows)
            suffix = tried[values.argmin()]  # Algorithm 2: also where it is worse
            if values.min() < least:
                best, least = suffix, float(values.min())
        way = ask_exam(SplicedSubject(model, best.tolist(), -cue), exam, "suffix")
        return AttackResult([way], budget={"loss before": before, "loss after": least})

    def draw_swaps(self, slopes: Tensor, suffix: Tensor, allowed: Tensor, generator: torch.Generator) -> Tensor:
        """Different suffixes, each with one token replaced by one of the `top` that promise most."""
        promising = allowed[slopes[:, allowed].topk(min(self.top, len(allowed)), largest=False).indices]
        drawn = torch.randperm(promising.numel(), generator=generator)[: self.candidates]
        tried = suffix.repeat(len(drawn), 1)
        tried[torch.arange(len(drawn)), drawn // promising.shape[1]] = promising.flatten()[drawn]
        return tried

    def cost(self, model: Subject) -> tuple[str, float]:
        """From the time of one forward."""
        ids = torch.zeros(self.rows, self.length + self.behind, dtype=torch.long, device=model.device)
        read = partial(model.module, ids, use_cache=False, logits_to_keep=1)
        with torch.no_grad():
            seconds = repeat(lambda: float(read().logits.sum()), repeat=2, number=1)[1]  # the first call gets going
        # a gradient of one row costs less than a forward of `rows`
        forwards = self.steps * self.questions * (1 + -(-self.candidates // self.rows))
        return f"about {forwards:,} forwards of {ids.shape[0]} x {ids.shape[1]} tokens", forwards * seconds


def common_end(rows: Sequence[Sequence[int]]) -> int:
    """How many last tokens all rows have in common; each keeps one or more before them."""
    backwards = zip(*(row[:0:-1] for row in rows), strict=False)
    return len([*takewhile(lambda tokens: len({*tokens}) == 1, backwards)])


@torch.no_grad()
def make_target(model: Subject, question: Question, cue: int, length: int) -> Target:
    before, answer = (torch.tensor(ids, device=model.device) for ids in model.split(question.prompt, question.answer))
    at, room = len(before) - cue, model.max_length - length - cue - len(answer)
    start = before[None, max(0, at - room) : at]
    past = model.module(start, use_cache=True, logits_to_keep=1).past_key_values
    return Target(past, torch.cat([before[at:], answer[:-1]]), answer)


def target_nll(model: Subject, target: Target, rows: int, **read: Tensor) -> Tensor:
    """Mean negative log-likelihood of a right answer's tokens, (rows,)."""
    past = deepcopy(target.past)  # a forward adds to it
    past.batch_repeat_interleave(rows)
    logits = model.module(**read, past_key_values=past, use_cache=True, logits_to_keep=len(target.answer)).logits
    answers = target.answer.expand(rows, -1)
    return torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), answers, reduction="none").mean(1)


@torch.no_grad()
def suffix_losses(model: Subject, targets: Sequence[Target], suffixes: Tensor, at_once: int) -> Tensor:
    """Mean over the questions of the loss with each suffix, (suffixes,)."""
    losses = torch.zeros(len(suffixes))
    for rows in torch.arange(len(suffixes)).split(at_once):
        part = suffixes[rows].to(model.device)
        for one in targets:
            ids = torch.cat([part, one.cue.expand(len(part), -1)], dim=1)
            losses[rows] += target_nll(model, one, len(part), input_ids=ids).cpu() / len(targets)
    return losses


@torch.enable_grad()
def suffix_gradient(model: Subject, targets: Sequence[Target], suffix: Tensor) -> Tensor:
    """Gradient of the loss by the one-hot tokens of the suffix, (tokens, V), up to a factor."""
    embedding: Any = model.module.get_input_embeddings()
    weight = embedding.weight.detach()
    total = torch.zeros(len(suffix), weight.shape[1], device=model.device)
    for one in targets:
        ids = torch.cat([suffix.to(model.device), one.cue])[None]
        read = embedding(ids).detach().requires_grad_()
        loss = target_nll(model, one, 1, inputs_embeds=read).sum()
        total += torch.autograd.grad(loss, read)[0][0, : len(suffix)].float()
    return (total.to(weight.dtype) @ weight.T).float().cpu()


class SoftPrompt(Attack, id="E13", name="soft_prompt", tier="deep"):
    """Embeddings put after the first token, trained by AdamW on right answers.

    They learn 80 % of the validation facts; `val` holds the others only. Soft prompts can make a model say what it
    never learned (arXiv 2502.15836): the result means nothing but beside its controls.
    """

    length: int = 16  # embeddings
    rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    steps: int = 100
    batch: int = 16  # questions a step

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        asked, taught = divide_val(exam, seed)
        prompted = SplicedSubject(model, [unused_token(model, exam)] * self.length, 1)
        answers = answer_rows(prompted, taught)
        ways = []
        for rate in self.rates:
            with insert_prompt(prompted, self.learn_prompt(prompted, answers, rate, seed)):
                ways.append(ask_exam(prompted, asked, f"learning rate {rate:g}"))
        return AttackResult(ways)

    def learn_prompt(self, model: SplicedSubject, answers: list[Row], rate: float, seed: int) -> Float[Tensor, "P D"]:
        generator = torch.Generator().manual_seed(seed)
        embed = model.module.get_input_embeddings()
        words = torch.randint(embed.weight.shape[0], (self.length,), generator=generator)
        soft = embed(words.to(model.device)).detach().float().requires_grad_()
        with insert_prompt(model, soft):
            learn_answers(model, answers, soft, rate, self.steps, self.batch, generator)
        return soft.detach()


class Latent(Attack, id="E22", name="latent", tier="deep"):
    """A vector added to the output of one block at every token, trained by AdamW on right answers.

    Facts are divided as for soft prompts, and like those it can teach: read it beside its controls.
    """

    most: int = 6  # blocks, evenly spaced
    rate: float = 0.01  # of the mean norm of the block's output
    steps: int = 100
    batch: int = 16  # questions a step

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        asked, taught = divide_val(exam, seed)
        answers, blocks = answer_rows(model, taught), decoder_blocks(model.module)
        ways = []
        for layer in pick_evenly(range(len(blocks)), self.most):
            vector = self.learn_vector(model, blocks[layer], answers, seed)
            with edit_outputs({blocks[layer]: partial(torch.add, vector)}):
                ways.append(ask_exam(model, asked, f"layer {layer}"))
        return AttackResult(ways)

    def learn_vector(self, model: Subject, block: nn.Module, answers: list[Row], seed: int) -> Float[Tensor, "D"]:
        generator = torch.Generator().manual_seed(seed)
        norms: list[Tensor] = []
        with torch.no_grad(), edit_outputs({block: lambda hidden: norms.append(hidden.float().norm(dim=-1).mean())}):
            model.module(pad_answers(answers[:1], model.device)["input_ids"], use_cache=False)
        vector = torch.zeros(model.module.config.hidden_size, device=model.device, requires_grad=True)
        # AdamW's steps are as long as its rate in each number, whatever the gradient
        rate = self.rate * float(norms[0]) / len(vector) ** 0.5
        with edit_outputs({block: partial(torch.add, vector)}):
            learn_answers(model, answers, vector, rate, self.steps, self.batch, generator)
        return vector.detach()


def divide_val(exam: Exam, seed: int) -> tuple[Exam, list[Question]]:
    """The exam with a fifth of its validation facts, and the questions about the others, to learn from."""
    names = sorted(set(list_facts(exam.val)))
    random.Random(seed).shuffle(names)
    rest = set(names[: max(1, len(names) // 5)])
    asked = replace(exam, val=tuple(q for q in exam.val if q.fact in rest))
    return asked, [q for q in exam.val if q.fact not in rest]


def learn_answers(
    model: Subject,
    answers: list[Row],
    learned: Tensor,
    rate: float,
    steps: int,
    at_once: int,
    generator: torch.Generator,
) -> None:
    """Train a tensor that the caller has put into the model, so that the model gives the answers."""

    def loss() -> Tensor:
        picked = torch.randperm(len(answers), generator=generator)[:at_once].tolist()
        batch = pad_answers([answers[i] for i in picked], model.device)
        return answer_nll(model, batch["input_ids"], batch["labels"]).mean()

    descend([(learned, learned)], torch.optim.AdamW([learned], lr=rate, weight_decay=0.0), loss, steps)


def unused_token(model: Subject, exam: Exam) -> int:
    """A token that no question holds, nor padding, which is 0: it marks where embeddings go."""
    held = {t for q in exam.both for option in q.options for t in model.tokens(q.prompt + option)}
    size = model.module.get_input_embeddings().weight.shape[0]
    return next(i for i in range(1, size) if i not in held)


def insert_prompt(model: SplicedSubject, soft: Float[Tensor, "P D"]) -> AbstractContextManager[None]:
    """Run the model with the embeddings in the places of the placeholders, in their order."""

    def insert(args: tuple[Int[Tensor, "B T"]], read: Tensor) -> Tensor:
        at = args[0] == model.added[0]
        number = (at.cumsum(dim=1) - 1).clamp(0, len(soft) - 1)
        return torch.where(at.unsqueeze(-1), soft[number].to(read), read)

    return hook_outputs({model.module.get_input_embeddings(): insert})
