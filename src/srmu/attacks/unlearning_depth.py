"""E17: how deep unlearning went, by putting the model's residual into the original."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from srmu.attacks.base import Attack, AttackResult, Exam, Texts
from srmu.attacks.layers import ResidualEdit, answer_nll, answer_rows, batch_answers, edit_residual, read_outputs
from srmu.engine.hooks import decoder_blocks
from srmu.engine.losses import is_predicted
from srmu.evals.statistics import LEAST, bootstrap_estimate
from srmu.evals.subject import NotApplicable, Subject, list_facts


@dataclass(frozen=True, kw_only=True)
class UnlearningDepth(Attack):
    """Unlearning depth score (arXiv 2605.24614): 0 all there, 1 as if it had never been learned.

    The residual after block l, at the positions that predict the right answer, is taken from
    another model into the original; D_l is what the answer then loses in log-probability, a mean
    over its tokens. D1 is with the oracle's residual, D2 with the unlearned model's. As the rest
    of the prompt stays the original's, D is small below the layers that fetch the answer. An
    oracle trained apart from the original speaks another basis; D1 is then large everywhere.
    """

    id = "E17"
    name = "unlearning_depth"
    tier = "standard"

    batch: int = 16  # questions read at once
    threshold: float = 0.05  # nats a token: a layer where the original knows more than the oracle

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        if model.oracle is None:
            raise NotApplicable("no oracle: it needs a model that was trained without the facts")
        layers = len(decoder_blocks(model.module))
        asked = answer_rows(model, [(q.prompt, q.answer) for q in exam.test])
        drops = torch.zeros(2, layers, len(asked))
        for chosen, ids, labels in batch_answers(asked, self.batch, model.device):
            at = torch.nn.functional.pad(is_predicted(labels), (0, 1))
            sources = [read_outputs(source, ids, at) for source in (model.oracle, model)]
            with torch.no_grad(), model.as_original():
                intact = answer_nll(model, ids, labels)
                for stage, source in enumerate(sources):
                    for layer, values in enumerate(source):
                        with edit_residual(model, {layer: patch_output(values, at)}):
                            drop = answer_nll(model, ids, labels) - intact
                        drops[stage, layer, chosen] = drop.cpu()
        scores = depth_scores(*drops, threshold=self.threshold)
        kept = scores.isfinite().nonzero()[:, 0].tolist()
        names = [list_facts(exam.test)[i] for i in kept]
        if (count := len(set(names))) < LEAST:
            reason = f"the original knows {count} facts better than the oracle; it needs {LEAST}"
            raise NotApplicable(reason)
        depth = bootstrap_estimate([scores[kept].numpy()], [names], seed=seed)
        return AttackResult(metrics={"depth": depth}, budget={"patched": 2 * layers})


def patch_output(values: Float[Tensor, "N D"], at: Bool[Tensor, "B T"]) -> ResidualEdit:
    """An edit that puts these values at the marked tokens."""

    def edit(h: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        h = h.clone()
        h[at] = values.to(h)
        return h

    return edit


def depth_scores(first: Float[Tensor, "L N"], second: Float[Tensor, "L N"], *, threshold: float) -> Float[Tensor, " N"]:
    """Depth by question; NaN where no layer of the original knows more than the oracle's."""
    # section 3.3: sum_l D1 clip(D2 / D1, 0, 1) / sum_l D1, over layers where D1 > threshold
    known = first > threshold
    share = (second / first).clamp(0, 1)
    return (first * share).where(known, 0).sum(0) / first.where(known, 0).sum(0)
