"""MUSE: can a model still recite news or novels, answer about them, tell them from unseen ones?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from srmu.engine.losses import token_nll
from srmu.errors import SrmuError
from srmu.evals.benchmarks.base import (
    Benchmark,
    BenchmarkRequest,
    BenchmarkScores,
    Metrics,
    TableColumn,
    Values,
    check_finite,
    do_each,
    hint_download,
    mean_metric,
    rouge_scores,
    write_continuations,
)
from srmu.evals.membership_scores import mean_lowest as least
from srmu.evals.statistics import area_under_curve
from srmu.evals.subject import Subject

PARTS = ("news", "books")
RECITED = 128  # new tokens, and tokens of the truth they are held against
ANSWERED = 32  # new tokens
SHARE = 0.4  # of a text's tokens, the least likely ones: Min-40 %
# Where an answer ends, as in the authors' code; the last is how a word-level tokenizer writes it.
STOPS = ("\n\n", "\nQuestion", "Question:", "Question :")
SHOT = "Question: {question}\nAnswer: "  # the blank at the end is theirs, too
KINDS = ("forget", "holdout")


def run_muse(model: Subject, request: BenchmarkRequest) -> BenchmarkScores:
    """MUSE's numbers of one model (arXiv 2407.06460, section 3), each a share.

    `verbmem_f` (C1) is ROUGE-L F1 of the greedy continuation of forget texts; `knowmem_f` (C2) and
    `knowmem_r` (C4) that of short answers to questions about forget and retain texts after worked
    examples. Words are not stemmed, as in the authors' code. `auc` is the chance that a forget text
    has a higher Min-40 % score than a hold-out text: 1 where all are known, 0.5 where nothing tells
    them apart.

    `privleak` (C3) is (A - A_retrain) / A_retrain with A = 1 - `auc`, the authors' orientation
    (their `forget_holdout` has hold-out texts as positives, and so has open-unlearning): -1 where
    everything is known, 0 as the model that never saw the forget set, above 0 where forget texts
    are less likely than unknown ones. `privleak_member` has A = `auc`. The authors' code fixes
    A_retrain as a number for its own two models; here it is that of `request.reference`.
    """
    known = read_oracle(request)
    scores = {f"min40_{kind}": score_min_k(model, request, kind, read_kind(request, kind)) for kind in KINDS}
    metrics: Metrics = measure_privacy(scores, known)
    values: Values = {**scores, "verbmem_f": measure_verbatim(model, request)}
    for name, about in (("knowmem_f", "forget"), ("knowmem_r", "retain")):
        values[name] = measure_answers(model, request, about)
    metrics |= {f"muse/{name}": mean_metric(values[name]) for name in ("verbmem_f", "knowmem_f", "knowmem_r")}
    return BenchmarkScores(metrics, values)


def read_oracle(request: BenchmarkRequest) -> Values | None:
    """The Min-40 % scores of the model that never saw the forget set, if there is one."""
    if request.reference is None:
        return None
    missing = [kind for kind in KINDS if not request.reference.get(f"min40_{kind}")]
    if missing:
        raise SrmuError(
            f"the reference has no values min40_{missing[0]}: make it by a run of this suite, "
            "version and part on a model that never saw the forget set"
        )
    known = {f"min40_{kind}": [*request.reference[f"min40_{kind}"]] for kind in KINDS}
    if measure_membership(known) == 1:
        raise SrmuError(
            "PrivLeak has no value: the reference finds each forget text likelier than all "
            "hold-out texts, as no model does that never saw them; name another, or take more rows"
        )
    return known


def read_kind(request: BenchmarkRequest, kind: str) -> list[str]:
    return [row["text"] for row in request.data.rows("privleak", kind, {"text": str})]


def measure_privacy(own: Values, known: Values | None) -> Metrics:
    """AUC and, against the reference, PrivLeak in both orientations."""
    count = float(sum(map(len, own.values())))
    metrics = {"auc": measure_membership(own)}
    if known:
        # arXiv 2407.06460, the definition of PrivLeak in section 3
        metrics["privleak"] = relative_difference(1 - measure_membership(own), 1 - measure_membership(known))
        if measure_membership(known):
            metrics["privleak_member"] = relative_difference(measure_membership(own), measure_membership(known))
    return {f"muse/{name}": {"value": value, "n": count} for name, value in metrics.items()}


def relative_difference(own: float, other: float) -> float:
    return (own - other) / other


def measure_membership(scores: Values) -> float:
    """The chance that a forget text scores higher than a hold-out text; a tie counts a half."""
    return area_under_curve(*(scores[f"min40_{kind}"] for kind in KINDS))


def score_min_k(model: Subject, request: BenchmarkRequest, kind: str, texts: Sequence[str]) -> list[float]:
    """Min-40 % of each text: mean log p of its least likely tokens, at least of one.

    Min-K % Prob, arXiv 2310.16789, over all tokens but the first. The authors' code takes no token
    where 40 % of a text's are less than one, and has no number then.
    """
    label = f"muse {kind} texts"
    scores = do_each(texts, lambda text: least(read_log_p(model, text), SHARE), label, request.watch)
    check_finite(scores, label)
    return scores


@torch.no_grad()
def read_log_p(model: Subject, text: str) -> torch.Tensor:
    """Log-probabilities of a text's tokens from the second on, as many as the model can read."""
    ids = torch.tensor([model.tokens(text)[: model.max_length]]).to(model.device)
    if ids.shape[1] < 2:
        raise SrmuError("a text of config privleak is less than two tokens; it takes longer ones")
    return -token_nll(model.module(ids, use_cache=False).logits, ids)[0]


def measure_verbatim(model: Subject, request: BenchmarkRequest) -> list[float]:
    """ROUGE-L F1 of what follows each prompt of a forget text with what the model writes."""
    rows = request.data.rows("verbmem", "forget", {"prompt": str, "gt": str})
    written = write_continuations(
        model, [row["prompt"] for row in rows], RECITED, label="muse verbatim", watch=request.watch
    )
    truths = [shorten_truth(model, row["gt"]) for row in rows]
    return rouge_scores("fmeasure", written, truths)  # unstemmed, as theirs


def shorten_truth(model: Subject, truth: str) -> str:
    """The part of a truth that the model could have written: its first 128 tokens."""
    ids = model.tokens(truth)
    if len(ids) <= RECITED:
        return truth  # decoded, it would lose words that the tokenizer does not know
    return model.tokenizer.decode(ids[:RECITED], skip_special_tokens=True)


def measure_answers(model: Subject, request: BenchmarkRequest, about: str) -> list[float]:
    """ROUGE-L F1 of each short answer, after the worked examples of the set's `_icl` split."""
    fields: dict[str, type] = {"question": str, "answer": str}
    rows = request.data.rows("knowmem", f"{about}_qa", fields)
    shots = replace(request.data, limit=None).rows("knowmem", f"{about}_qa_icl", fields)
    form = request.template or SHOT
    first = "".join(f"{form.format(question=shot['question']).rstrip()} {shot['answer']}\n\n" for shot in shots)
    written = write_continuations(
        model,
        [first + form.format(question=row["question"]) for row in rows],
        ANSWERED,
        stops=STOPS,
        label=f"muse {about} answers",
        watch=request.watch,
    )
    return rouge_scores("fmeasure", written, [row["answer"] for row in rows])


SUITE = Benchmark(
    title="MUSE",
    paper="arXiv 2407.06460",
    hub="muse-bench/MUSE-{part}",  # News, Books
    get=hint_download("muse-bench/MUSE-News", "muse"),
    run=run_muse,
    axes=("KnowMem f", "KnowMem r"),
    columns=(
        TableColumn("VerbMem f", "muse/verbmem_f", "low"),
        TableColumn("KnowMem f", "muse/knowmem_f", "low"),
        TableColumn("PrivLeak", "muse/privleak", "zero"),
        TableColumn("KnowMem r", "muse/knowmem_r", "high"),
    ),
    parts=PARTS,
    oracle="PrivLeak",
)
