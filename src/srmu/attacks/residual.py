"""E4, E5, E6 and E17: what the residual between the blocks of a model holds."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srmu.attacks.base import Attack, AttackResult, Exam, Texts, choose_setting
from srmu.engine.fine_tune import Row
from srmu.engine.generate import join_responses
from srmu.engine.losses import is_counted, is_predicted, text_nlls
from srmu.engine.sites import decoder_blocks, edit_outputs
from srmu.engine.topic import Batch, move_batch
from srmu.evals.statistics import LEAST, Array, bootstrap_estimate
from srmu.evals.subject import (
    NotApplicable,
    Question,
    Subject,
    list_facts,
    mark_answers,
    mark_layers,
    mark_right,
    pick_evenly,
)

BATCH = 32  # texts read at once

ResidualEdit = Callable[[Tensor], Tensor | None]  # of a block's output (B, T, D)
Edits = dict[int, ResidualEdit]  # by block


def edit_residual(model: Subject, edits: Mapping[int, ResidualEdit]) -> AbstractContextManager[None]:
    """Run the model with the outputs of some blocks, by number, put through a function each."""
    blocks = decoder_blocks(model.module)
    return edit_outputs({blocks[layer]: edit for layer, edit in edits.items()})


def mark_edited(model: Subject, edits: Edits, asked: Sequence[Question]) -> Sequence[float]:
    with edit_residual(model, edits):
        return mark_answers(model, asked)


@torch.no_grad()
def read_outputs(model: Subject, ids: Int[Tensor, "B T"], at: Bool[Tensor, "B T"]) -> list[Float[Tensor, "N D"]]:
    """What each block puts out at N marked tokens, row after row, in the model's own dtype."""
    if model.fixed:
        raise NotApplicable(model.fixed)
    outputs: list[Tensor] = []

    def keep(value: Tensor) -> None:
        if value.ndim != 3 or value.shape[:2] != ids.shape:
            raise NotApplicable("blocks of this model pass on more than one residual a token")
        outputs.append(value[at])

    with edit_residual(model, dict.fromkeys(range(len(decoder_blocks(model.module))), keep)):
        model.module(ids, use_cache=False, logits_to_keep=1)
    return outputs


def answer_rows(model: Subject, questions: Sequence[Question]) -> list[Row]:
    """The tokens of prompts and their answers; of a prompt that is too long, the end."""
    split = [model.split(q.prompt, q.answer) for q in questions]
    return [(before[-(model.max_length - len(after)) :], after) for before, after in split]


def pad_answers(rows: Sequence[Row], device: torch.device) -> Batch:
    return move_batch(join_responses(*zip(*rows, strict=True)), device)


def batch_answers(rows: Sequence[Row], size: int, device: torch.device) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Numbers of at most `size` rows of like length, their tokens and labels (B, T)."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = pad_answers([rows[i] for i in chosen], device)
        yield chosen, batch["input_ids"], batch["labels"]


def answer_nll(model: Subject, ids: Int[Tensor, "B T"], labels: Int[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Nats that a token of each row's answer costs, on average."""
    # only columns from the first answer on meet the vocabulary
    width = ids.shape[1] - int(is_predicted(labels).any(dim=0).nonzero()[0])
    logits = model.module(ids, use_cache=False, logits_to_keep=width).logits
    return text_nlls(logits[:, -width:], labels[:, -width:])


class LogitLens(Attack, id="E4", name="logit_lens", tier="smoke", by_tier={"smoke": {"most": 12}}):
    """Final norm and unembedding on what each block puts out (nostalgebraist, 2020): the model cut above the block."""

    most: int | None = None  # layers read, evenly spaced, the last among them; None: each

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        layers = pick_evenly(range(len(decoder_blocks(model.module))), self.most)
        layers = [layer for layer in layers if exam.only in ("", f"layer {layer}")]
        marks = mark_layers(model, exam.both, layers)
        return AttackResult([exam.split_right(f"layer {layer}", right) for layer, right in marks])


class LinearProbe(Attack, id="E5", name="linear_probe", tier="standard"):
    """Logistic regression, right or wrong option, on the residual of the last prompt token.

    An option is what its tokens are to the unembedding, z, and the probe a bilinear form h W z. Probes are trained on
    the other folds of a half, those of the test half on the validation half, too. Folds share no fact. Metric:
    selectivity (arXiv 1909.03368) of the layer that is best on the validation half, its accuracy less that of probes
    trained on and tested against labels shuffled within questions.
    """

    folds: int = 5
    shuffles: int = 5
    width: int = 32  # principal components of the residual, and of what the options are
    strength: float = 0.01  # inverse of the penalty on the weights

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        h, z = last_residuals(model, exam.both), embed_options(model, exam.both, self.width)
        count = len(exam.val)
        right = [self.fit_probe(x, z, exam.both, count, seed) for x in h]
        ways = [exam.split_right(f"layer {layer}", marks) for layer, marks in enumerate(right)]
        best = max(range(len(ways)), key=lambda layer: sum(ways[layer].val))
        rng = np.random.default_rng(seed)
        control = []
        for _ in range(self.shuffles):
            shuffled = [replace(q, gold=int(rng.integers(len(q.options)))) for q in exam.both]
            control.append(self.fit_probe(h[best], z, shuffled, count, seed)[count:])
        table = np.column_stack([ways[best].test, np.mean(control, axis=0)])
        facts = list_facts(exam.test)
        selectivity = bootstrap_estimate(table, facts, lambda means: means[..., 0] - means[..., 1], seed=seed)
        return AttackResult(ways, {"selectivity": selectivity})

    def fit_probe(
        self, h: Float[Array, "Q D"], z: list[Float[Array, "O K"]], questions: Sequence[Question], count: int, seed: int
    ) -> list[float]:
        """The right answers (0/1) to all questions; the first `count` are the validation half."""
        from sklearn import decomposition, linear_model, model_selection

        right = np.zeros(len(questions))
        for start, half in ((0, questions[:count]), (count, questions[count:])):
            folds = model_selection.GroupKFold(self.folds, shuffle=True, random_state=seed)
            for others, asked in folds.split(half, groups=list_facts(half)):
                trained, asked = [*range(start), *(start + others)], start + asked
                width = min(self.width, len(trained), h.shape[1])
                pca = decomposition.PCA(width, whiten=True, random_state=seed).fit(h[trained])
                x = [(row[:, None] * z[i][:, None, :]).reshape(len(z[i]), -1) for i, row in enumerate(pca.transform(h))]
                x = [one - one.mean(axis=0) for one in x]  # only differences can choose an option
                labels = [o == questions[i].gold for i in trained for o in range(len(z[i]))]
                probe = linear_model.LogisticRegression(C=self.strength, max_iter=200)
                probe.fit(np.concatenate([x[i] for i in trained]), labels)
                scores = [probe.decision_function(x[i]).tolist() for i in asked]
                right[asked] = mark_right(scores, [questions[i] for i in asked])
        return right.tolist()


def last_residuals(model: Subject, questions: Sequence[Question], batch: int = 64) -> list[Float[Array, "Q D"]]:
    """By layer: what the block puts out at the last token of each prompt."""
    prompts = [model.tokens(q.prompt)[-model.max_length :] for q in questions]
    parts: list[list[Array]] = []
    order: list[int] = []
    for chosen, ids, labels in batch_answers([(row[:-1], row[-1:]) for row in prompts], batch, model.device):
        order += chosen
        parts.append([values.float().cpu().numpy() for values in read_outputs(model, ids, is_counted(labels))])
    return [np.concatenate(layer)[np.argsort(order)] for layer in zip(*parts, strict=True)]


def embed_options(model: Subject, questions: Sequence[Question], width: int) -> list[Float[Array, "O K"]]:
    """Of each question: its options, means of their tokens' rows of the unembedding, K components."""
    from sklearn.decomposition import PCA

    head: Tensor = model.module.get_output_embeddings().weight.detach()
    pairs = [(q.prompt, option) for q in questions for option in q.options]
    means = [head[model.split(*pair)[1]].float().mean(dim=0).cpu().numpy() for pair in pairs]
    z = PCA(min(width, *np.shape(means)), random_state=0).fit_transform(np.array(means))
    return np.split(z / z.std(), np.cumsum([len(q.options) for q in questions])[:-1])


class DirectionAblation(Attack, id="E6", name="direction_ablation", tier="smoke", by_tier={"smoke": {"single": 8}}):
    """Ablation of one direction a block, at one block alone and at all of them at once.

    `displacement` points from the original's residual to the model's, on questions of the validation half that
    unlearning made wrong. `forget minus neutral` needs no original. A text's first token (a sink) is left out.
    """

    texts: int = 64  # of each set
    tokens: int = 128  # of each text
    single: int | None = None  # layers ablated alone, evenly spaced; None: each

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        kinds: dict[str, Edits] = {}
        skipped = {}
        try:
            kinds["displacement"] = find_displacement_edits(model, exam)
        except NotApplicable as reason:
            skipped = {"displacement": str(reason)}
        kinds["forget minus neutral"] = self.find_difference_edits(model, texts, seed)
        settings = {}
        for kind, edits in kinds.items():
            ablated = {f"layer {layer}": {layer: edits[layer]} for layer in pick_evenly([*edits], self.single)}
            for where, chosen in (ablated | {"all layers": edits}).items():
                settings[f"{kind}, {where}"] = partial(mark_edited, model, chosen)
        return AttackResult(choose_setting(exam, settings), budget={"skipped": skipped})

    def find_difference_edits(self, model: Subject, texts: Texts, seed: int) -> Edits:
        """h - ((h - m).d) d, d the unit mean(forget) - mean(neutral) and m the latter: 0 may be far from any token."""
        rng = random.Random(seed)
        means = []
        for pool in (texts.forget, texts.neutral):
            drawn = rng.sample(pool, min(self.texts, len(pool)))
            rows = [(ids[:1], ids[1 : self.tokens]) for ids in map(model.tokens, drawn)]
            total: Any = sum(
                torch.stack([h.float().sum(dim=0) for h in read_outputs(model, ids, is_counted(labels))])
                for _, ids, labels in batch_answers(rows, BATCH, model.device)
            )
            means.append(total / sum(len(tokens) for _, tokens in rows))
        pairs = enumerate(zip(*means, strict=True))
        return {layer: make_ablation(forget - neutral, neutral) for layer, (forget, neutral) in pairs}


def find_displacement_edits(model: Subject, exam: Exam) -> Edits:
    """h - (h.d) d, d the unit mean of h_unlearned - h_original over a layer's ordinary tokens."""
    with model.as_original():
        before = mark_answers(model, exam.val)
    after = mark_answers(model, exam.val)
    lost = [q.prompt for q, b, a in zip(exam.val, before, after, strict=True) if b > a]
    if not lost:
        raise NotApplicable("unlearning made no question of the validation half wrong")
    rows = [(ids[:1], ids[1 : model.max_length]) for ids in map(model.tokens, lost)]
    norms = [torch.stack([move.norm(dim=-1) for move in moves]) for moves in iterate_displacements(model, rows)]
    # a few tokens, often the first ones, move so far that they alone would make the mean
    limits = [n.mean() + 3 * n.std(correction=0) for n in torch.cat(norms, dim=1)]
    sums: Any = sum(  # read again: all tokens at once would not fit where the model is large
        torch.stack([m[m.norm(dim=-1) <= limit].sum(dim=0) for m, limit in zip(moves, limits, strict=True)])
        for moves in iterate_displacements(model, rows)
    )
    edits = {layer: make_ablation(total) for layer, total in enumerate(sums) if total.norm() > 0}
    if not edits:
        raise NotApplicable("unlearning left what the blocks put out as it was")
    return edits


def iterate_displacements(model: Subject, rows: Sequence[Row]) -> Iterator[list[Float[Tensor, "N D"]]]:
    """By layer, how far the tokens of a batch of texts are from where the original has them."""
    for _, ids, labels in batch_answers(rows, BATCH, model.device):
        now = read_outputs(model, ids, is_counted(labels))
        with model.as_original():
            then = read_outputs(model, ids, is_counted(labels))
        yield [a.float() - b.float() for a, b in zip(now, then, strict=True)]


def make_ablation(direction: Tensor, centre: Tensor | float = 0.0) -> ResidualEdit:
    unit = direction / direction.norm()
    return lambda h: h.float() - ((h.float() - centre) @ unit).unsqueeze(-1) * unit


class UnlearningDepth(Attack, id="E17", name="unlearning_depth", tier="standard"):
    """Unlearning depth score (arXiv 2605.24614): 0 all there, 1 as if it had never been learned.

    The residual after block l, at the positions that predict the right answer, is taken from another model into the
    original; D_l is what a token of the answer then loses in log-probability: D1 with the oracle's, D2 with the
    unlearned model's. An oracle trained apart from the original speaks another basis; D1 is then large everywhere.
    """

    batch: int = 16  # questions read at once
    threshold: float = 0.05  # nats a token: a layer where the original knows more than the oracle

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        if model.oracle is None:
            raise NotApplicable("no oracle: it needs a model that was trained without the facts")
        asked = answer_rows(model, exam.test)
        drops = torch.zeros(2, len(decoder_blocks(model.module)), len(asked))
        for chosen, ids, labels in batch_answers(asked, self.batch, model.device):
            at = torch.nn.functional.pad(is_predicted(labels), (0, 1))
            sources = [read_outputs(source, ids, at) for source in (model.oracle, model)]
            with torch.no_grad(), model.as_original():
                intact = answer_nll(model, ids, labels)
                for stage, source in enumerate(sources):
                    for layer, values in enumerate(source):
                        with edit_residual(model, {layer: patch_output(values, at)}):
                            drops[stage, layer, chosen] = (answer_nll(model, ids, labels) - intact).cpu()
        scores = depth_scores(*drops, threshold=self.threshold)
        kept = scores.isfinite()
        names = [q.fact for q, known in zip(exam.test, kept.tolist(), strict=True) if known]
        if (count := len({*names})) < LEAST:
            raise NotApplicable(f"the original knows {count} facts better than the oracle; it needs {LEAST}")
        depth = bootstrap_estimate(scores[kept].numpy(), names, seed=seed)
        return AttackResult(metrics={"depth": depth})


def patch_output(values: Float[Tensor, "N D"], at: Bool[Tensor, "B T"]) -> ResidualEdit:
    """An edit that puts these values at the marked tokens."""
    return lambda h: h.masked_scatter(at.unsqueeze(-1), values.to(h))


def depth_scores(first: Float[Tensor, "L N"], second: Float[Tensor, "L N"], *, threshold: float) -> Float[Tensor, " N"]:
    """Depth by question; NaN where no layer of the original knows more than the oracle's."""
    # section 3.3: sum_l D1 clip(D2 / D1, 0, 1) / sum_l D1, over layers where D1 > threshold
    known = first > threshold
    share = (second / first).clamp(0, 1)
    return (first * share).where(known, 0).sum(0) / first.where(known, 0).sum(0)
