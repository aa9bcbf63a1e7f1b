"""TOFU: has a model forgotten some made-up authors, but not others and real ones?"""

from collections.abc import Sequence
from math import log10
from warnings import catch_warnings

import numpy as np

from srmu.evals.benchmarks import base
from srmu.evals.subject import Subject

MOST = 300  # rows of each set: `ds_size` of the authors' config/eval_everything.yaml
NEW_TOKENS = 200  # theirs counts the question's tokens too (max_length: 200)
BOUND = 700.0  # of |log R|: exp of more is no float

# Each set's name in the metrics, and its config in the data.
SETS = {
    "forget": "{part}_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
MADE_UP = ("forget", "retain")  # these have the answer in other words
UTILITY = ("retain", "real_authors", "world_facts")
FIELDS: base.Fields = {"question": base.Text, "answer": base.Text, "perturbed_answer": base.Texts}


def run_tofu(model: Subject, request: base.BenchmarkRequest) -> base.BenchmarkScores:
    """TOFU's numbers (arXiv 2401.06121, section 2.2), each a share, as in the authors' code; see docs/benchmarks.md."""
    from scipy.stats import hmean

    rows = {}
    for name, config in SETS.items():
        fields = FIELDS | ({"paraphrased_answer": base.Text} if name in MADE_UP else {})
        rows[name] = request.rows(config.format(part=request.part or "forget10"), "train", fields)[:MOST]
    sets = {name: measure_set(model, request, name, some) for name, some in rows.items()}
    values = {"truth_ratio": sets["forget"]["truth_ratio"]}
    for name, numbers in sets.items():
        ratios = numbers["truth_ratio"]
        numbers["truth_ratio"] = [min(r, 1 / r) if name == "forget" else max(0.0, 1 - r) for r in ratios]
    metrics = {f"tofu/{name}/{key}": base.mean_metric(each) for name in sets for key, each in sets[name].items()}
    keys = ("probability", "rouge", "truth_ratio")
    nine = [metrics[f"tofu/{name}/{key}"]["value"] for name in UTILITY for key in keys]
    metrics["tofu/model_utility"] = {"value": float(hmean(nine)), "n": float(sum(len(rows[name]) for name in UTILITY))}
    if request.reference:
        metrics |= measure_forget_quality(values["truth_ratio"], request.reference["truth_ratio"])
    return base.BenchmarkScores(metrics, values)


def measure_set(model: Subject, request: base.BenchmarkRequest, name: str, rows: Sequence[base.Row]) -> base.Values:
    """Of each question of a set: probability and ROUGE of its answer, and R, wrong answers averaged geometrically."""
    right = "paraphrased_answer" if name in MADE_UP else "answer"
    options = []
    for row in rows:
        prompt = base.prompt_of(model, row["question"], request.template)
        texts = [row["answer"], row[right], *row["perturbed_answer"]]
        options.append((split_space(prompt, "")[0], [split_space(prompt, text)[1] for text in texts]))
    values: base.Values = {"probability": [], "truth_ratio": []}
    for each in base.option_likelihoods(model, options, f"tofu {name} likelihoods"):
        # arXiv 2401.06121, P(a | q) = p(a | q) ** (1 / |a|), here its logarithm
        answer, truth, *wrong = (logp / tokens for logp, tokens in each)
        total = 0.0 if name in MADE_UP else float(np.logaddexp.reduce([answer, *wrong]))
        values["probability"].append(float(np.exp(answer - total)))
        values["truth_ratio"].append(float(np.exp(np.clip(float(np.mean(wrong)) - truth, -BOUND, BOUND))))
    written = base.write_continuations(model, [start for start, _ in options], NEW_TOKENS, label=f"tofu {name} answers")
    values["rouge"] = base.rouge_scores("recall", written, [row["answer"] for row in rows], use_stemmer=True)
    return values


def split_space(prompt: str, answer: str) -> tuple[str, str]:
    """A prompt and what follows it, the blank between them, added where there is none, in front of the answer."""
    start = prompt.rstrip(" ")
    return start, (prompt[len(start) :] or ("" if start[-1:].isspace() else " ")) + answer


def measure_forget_quality(own: Sequence[float], other: Sequence[float]) -> base.Metrics:
    """p, log10 p and D of a Kolmogorov-Smirnov test of two models' truth ratios."""
    from scipy.stats import ks_2samp

    with catch_warnings(action="ignore"):  # of many questions the exact p is out of reach
        test = ks_2samp(own, other)
    p, count = float(test.pvalue), float(len(own))
    parts = {"": p, "_log10": log10(max(p, 1e-300)), "_ks": float(test.statistic)}
    return {f"tofu/forget_quality{part}": {"value": value, "n": count} for part, value in parts.items()}
