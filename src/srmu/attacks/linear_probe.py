"""E5: what a linear classifier reads in the residual, after training on other facts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from srmu.attacks.base import Attack, AttackResult, Exam, Setting, Texts
from srmu.attacks.layers import batch_answers, read_outputs
from srmu.engine.hooks import decoder_blocks
from srmu.engine.losses import is_counted
from srmu.evals.statistics import bootstrap_estimate
from srmu.evals.subject import Question, Subject, list_facts, mark_right

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Attack):
    """Logistic regression, right or wrong option, on the residual of the last prompt token.

    Classes would be answers, and most answers belong to a fact or two; so a class is what the
    option's tokens are to the unembedding, z, and the probe a bilinear form h W z. Answers of
    the validation half come from probes trained on its other folds, those of the test half from
    probes trained on the validation half and the test half's other folds. Folds share no fact,
    and nothing of the test half chooses the layer.

    Metric: selectivity (arXiv 1909.03368) of the layer that is best on the validation half, its
    accuracy less that of probes trained on and tested against labels shuffled within questions.
    """

    id = "E5"
    name = "linear_probe"
    tier = "standard"

    folds: int = 5
    shuffles: int = 5
    width: int = 32  # principal components of the residual, and of what the options are
    strength: float = 0.01  # inverse of the penalty on the weights

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        questions = (*exam.val, *exam.test)
        h, z = last_residuals(model, questions), embed_options(model, questions, self.width)
        ways = [
            Setting(f"layer {layer}", *self.fit_probe(x, z, exam.val, exam.test, seed)) for layer, x in enumerate(h)
        ]
        best = max(range(len(ways)), key=lambda layer: sum(ways[layer].val))
        rng = np.random.default_rng(seed)
        control = []
        for _ in range(self.shuffles):
            val, test = (
                [replace(q, gold=int(rng.integers(len(q.options)))) for q in half] for half in (exam.val, exam.test)
            )
            control.append(self.fit_probe(h[best], z, val, test, seed)[1])
        table = np.column_stack([ways[best].test, np.mean(control, axis=0)])
        selectivity = bootstrap_estimate(
            [table], [list_facts(exam.test)], lambda means: means[..., 0] - means[..., 1], seed=seed
        )
        budget = {"layers": len(ways), "folds": self.folds, "shuffles": self.shuffles, "components": self.width}
        return AttackResult(tuple(ways), {"selectivity": selectivity}, budget)

    def fit_probe(
        self,
        h: Float[Array, "Q D"],
        z: Sequence[Float[Array, "O K"]],
        val: Sequence[Question],
        test: Sequence[Question],
        seed: int,
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The right answers (0/1) on both halves; `h` and `z` hold their questions, `val` first."""
        from sklearn.decomposition import PCA
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GroupKFold

        questions = [*val, *test]
        right = np.zeros(len(questions))
        for start, half in ((0, val), (len(val), test)):
            folds = GroupKFold(self.folds, shuffle=True, random_state=seed)
            for others, asked in folds.split(half, groups=list_facts(half)):
                trained, asked = [*range(start), *(start + others)], start + asked
                width = min(self.width, len(trained), h.shape[1])
                pca = PCA(width, whiten=True, random_state=seed).fit(h[trained])
                x = [option_features(row, z[i]) for i, row in enumerate(pca.transform(h))]
                labels = [o == questions[i].gold for i in trained for o in range(len(z[i]))]
                probe = LogisticRegression(C=self.strength, max_iter=200)
                probe.fit(np.concatenate([x[i] for i in trained]), labels)
                scores = [probe.decision_function(x[i]).tolist() for i in asked]
                right[asked] = mark_right(scores, [questions[i] for i in asked])
        return tuple(right[: len(val)].tolist()), tuple(right[len(val) :].tolist())


def last_residuals(model: Subject, questions: Sequence[Question], batch: int = 64) -> list[Float[Array, "Q D"]]:
    """By layer: what the block puts out at the last token of each prompt."""
    prompts = [model.tokens(q.prompt)[-model.max_length :] for q in questions]
    ends = [(tokens[:-1], tokens[-1:]) for tokens in prompts]
    parts: list[list[Array]] = [[] for _ in decoder_blocks(model.module)]
    order: list[int] = []
    for chosen, ids, labels in batch_answers(ends, batch, model.device):
        order += chosen
        for layer, values in zip(parts, read_outputs(model, ids, is_counted(labels)), strict=True):
            layer.append(values.float().cpu().numpy())
    back = np.argsort(order)
    return [np.concatenate(layer)[back] for layer in parts]


def embed_options(model: Subject, questions: Sequence[Question], width: int) -> list[Float[Array, "O K"]]:
    """Of each question: its options, each the mean of its tokens' rows of the unembedding.

    In `width` principal components at most.
    """
    from sklearn.decomposition import PCA

    head: Tensor = model.module.get_output_embeddings().weight.detach()
    means = [
        head[model.split(q.prompt, option)[1]].float().mean(dim=0).cpu().numpy()
        for q in questions
        for option in q.options
    ]
    z = PCA(min(width, *np.shape(means)), random_state=0).fit_transform(np.array(means))
    return np.split(z / z.std(), np.cumsum([len(q.options) for q in questions])[:-1])


def option_features(h: Float[Array, " K"], z: Float[Array, "O K"]) -> Float[Array, "O KK"]:
    """The features of a question's options, less their mean: only differences can choose one."""
    x = (h[:, None] * z[:, None, :]).reshape(len(z), -1)
    return x - x.mean(axis=0)
