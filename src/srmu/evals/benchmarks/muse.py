"""MUSE: can a model still recite news or novels, answer about them, tell them from unseen ones?"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from srmu.engine.losses import token_nll
from srmu.errors import SrmuError
from srmu.evals.benchmarks import base
from srmu.evals.statistics import area_under_curve
from srmu.evals.subject import Subject, mean_lowest

RECITED = 128  # new tokens, and tokens of the truth they are held against
ANSWERED = 32  # new tokens
SHARE = 0.4  # of a text's tokens, the least likely ones: Min-40 %
# Where an answer ends, as in the authors' code; the last is how a word-level tokenizer writes it.
STOPS = ("\n\n", "\nQuestion", "Question:", "Question :")
SHOT = "Question: {question}\nAnswer: "  # the blank at the end is theirs, too
KINDS = ("min40_forget", "min40_holdout")


def run_muse(model: Subject, request: base.BenchmarkRequest) -> base.BenchmarkScores:
    """MUSE's numbers of one model (arXiv 2407.06460, section 3), each a share; docs/benchmarks.md defines them."""
    if request.reference and measure_membership(request.reference) == 1:
        raise SrmuError("PrivLeak has no value: this oracle tells all forget from hold-out texts; name another oracle")
    values: base.Values = {}
    for kind in KINDS:
        rows = request.rows("privleak", kind.removeprefix("min40_"), {"text": base.Text})
        values[kind] = score_min_k(model, kind, [row["text"] for row in rows])
    metrics = measure_privacy(values, request.reference)
    values["verbmem_f"] = measure_verbatim(model, request)
    values["knowmem_f"] = measure_answers(model, request, "forget")
    values["knowmem_r"] = measure_answers(model, request, "retain")
    metrics |= {f"muse/{name}": base.mean_metric(values[name]) for name in ("verbmem_f", "knowmem_f", "knowmem_r")}
    return base.BenchmarkScores(metrics, values)


def measure_privacy(own: base.Values, known: base.Values | None) -> base.Metrics:
    """AUC and, against a model that never saw the forget set, PrivLeak."""
    auc = measure_membership(own)
    metrics = {"auc": auc}
    if known:
        other = measure_membership(known)
        # arXiv 2407.06460, the definition of PrivLeak in section 3
        metrics["privleak"] = ((1 - auc) - (1 - other)) / (1 - other)
    count = float(sum(map(len, own.values())))
    return {f"muse/{name}": {"value": value, "n": count} for name, value in metrics.items()}


def measure_membership(scores: base.Values) -> float:
    """The chance that a forget text scores higher than a hold-out text; a tie counts a half."""
    return area_under_curve(*(scores[kind] for kind in KINDS))


def score_min_k(model: Subject, kind: str, texts: Sequence[str]) -> list[float]:
    """Min-K % Prob (arXiv 2310.16789) of each text: mean log p of its 40 % least likely tokens, at least of one."""
    label = f"muse {kind.removeprefix('min40_')} texts"
    scores = base.do_parts(model, texts, 1, lambda part: [mean_lowest(read_log_p(model, part[0]), SHARE)], label)
    base.check_finite(scores, label)
    return scores


@torch.no_grad()
def read_log_p(model: Subject, text: str) -> torch.Tensor:
    """Log-probabilities of a text's tokens from the second on, as many as the model can read."""
    ids = torch.tensor([model.tokens(text)[: model.max_length]]).to(model.device)
    if ids.shape[1] < 2:
        raise SrmuError("a text of config privleak has fewer than two tokens; give longer texts")
    return -token_nll(model.module(ids, use_cache=False).logits, ids)[0]


def measure_verbatim(model: Subject, request: base.BenchmarkRequest) -> list[float]:
    """ROUGE-L F1 of what follows each prompt of a forget text with what the model writes."""
    rows = request.rows("verbmem", "forget", {"prompt": base.Text, "gt": base.Text})
    written = base.write_continuations(model, [row["prompt"] for row in rows], RECITED, label="muse verbatim")
    return base.rouge_scores("fmeasure", written, [shorten_truth(model, row["gt"]) for row in rows])


def shorten_truth(model: Subject, truth: str) -> str:
    """The part of a truth that the model could have written."""
    ids = model.tokens(truth)
    if len(ids) <= RECITED:
        return truth  # decoded, it would lose words that the tokenizer does not know
    return model.tokenizer.decode(ids[:RECITED], skip_special_tokens=True)


def measure_answers(model: Subject, request: base.BenchmarkRequest, about: str) -> list[float]:
    """ROUGE-L F1 of each short answer, after the worked examples of the set's `_icl` split."""
    fields = {"question": base.Text, "answer": base.Text}
    rows = request.rows("knowmem", f"{about}_qa", fields)
    shots = replace(request, limit=None).rows("knowmem", f"{about}_qa_icl", fields)
    form = request.template or SHOT
    first = "".join(f"{form.format(question=shot['question']).rstrip()} {shot['answer']}\n\n" for shot in shots)
    prompts = [first + form.format(question=row["question"]) for row in rows]
    written = base.write_continuations(model, prompts, ANSWERED, stops=STOPS, label=f"muse {about} answers")
    return base.rouge_scores("fmeasure", written, [row["answer"] for row in rows])
