"""RWKU: whether a famous person is forgotten, and neighbours and all else are not."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml
from jinja2 import Template

from srmu.errors import SrmuError, suggest_word
from srmu.evals.benchmarks.base import (
    Benchmark,
    BenchmarkRequest,
    BenchmarkScores,
    Metrics,
    Row,
    TableColumn,
    Values,
    check_finite,
    do_each,
    log_likelihoods,
    mean_metric,
    prompt_of,
    rouge_scores,
    write_continuations,
)
from srmu.evals.membership_scores import membership_scores
from srmu.evals.subject import Subject

ANSWERED = 30  # new tokens
WRITTEN = 256  # new tokens, of reasons and of free text
LETTERS = "ABCD"
LEVELS = {"forget": (1, 2, 3), "neighbor": (1, 2)}
MEMBERSHIP = ("loss", "zlib", "mink", "minkpp")  # as attacks.membership.scores orders them
WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # of the entropies of pairs and of triples of words
WORDS = re.compile(r"\w+|[^\w\s]")
CONCLUSION = re.compile(r"[tT]he answer is (.*?)\.")

# The authors' prompts: eval_forget.py, eval_mmlu.py, eval_bbh.py, eval_triviaqa.py, presets.py.
BLANK = "Please complete the blank in the following question.\n"
BRIEF = "Please briefly answer the following question.\n"
EXAM = "The following are multiple choice questions (with answers) about {}.\n\n"
FOLLOW = "Please following the previous examples and answer the given question.\n"
REASON = (
    "Following previous examples, answer the following questions and end with 'so the answer is'"
)
# The authors put five other pairs here.
TRIVIA = """
Q: Which planet is closest to the sun?
A: Mercury
Q: In which year did the first person walk on the moon?
A: 1969
Q: What is the longest river of Africa?
A: Nile
Q: Which instrument has 88 keys?
A: Piano
Q: Who painted the ceiling of the Sistine Chapel?
A: Michelangelo
Please briefly answer the following question:
"""


def run_rwku(model: Subject, asked: BenchmarkRequest) -> BenchmarkScores:
    """RWKU's numbers (arXiv 2406.10890, section 4) on one person (`asked.part`), or on all.

    `forget/level1` (blanks), `level2` (questions), `level3` (attacks, also by type) and
    `neighbor/level1`, `level2` are ROUGE-L recall of greedy answers of 30 tokens up to the first
    new line; `all` is the mean over their probes. Words are as they stand between blanks and full
    stops, as in the authors' package rouge (which counts a word that repeats once); so an answer in
    any script counts. They put NOANSWER for an empty answer; here it stays empty. Both score 0;
    `empty` is the share of such.

    `mia_forget/*` and `mia_retain/*` are means over texts with the sign of a loss: the higher, the
    less a text looks known. `loss` is nats a token, `zlib` that by the bytes of the compressed
    text, `mink` and `minkpp` the negatives of Min-K % and Min-K++, 20 % of the tokens. The authors'
    code gives them with the other sign (its "loss" is a log-likelihood) and calls Min-K++ mink20.
    Of a text the first 512 tokens count.

    `general` (MMLU) is accuracy of the likeliest letter after worked examples; `reason` (BBH)
    exact match of what follows "the answer is"; `truthfulness` TruthfulQA's MC1; `factuality`
    (TriviaQA) F1 of words; `fluency` the mean of 2/3 of the entropy of word pairs and 4/3 of that
    of triples, in bits. An answer of `reason` that is a text is one answer: the authors' code holds
    the prediction against each of its characters.

    Prompts are the authors', in the chat template if there is one; `asked.template` stands for all
    of them and takes the bare question.
    """
    metrics: Metrics = {}
    values: Values = {}
    for about, levels in LEVELS.items():
        found = measure_probes(model, asked, about, levels)
        values |= {f"{about}/level{level}": found[f"level{level}"] for level in levels}
        metrics |= {f"rwku/{about}/{name}": mean_metric(numbers) for name, numbers in found.items()}
    for about in ("mia_forget", "mia_retain"):
        found = membership_values(model, asked, about)
        values |= {f"{about}/{name}": numbers for name, numbers in found.items()}
    for name, measure in UTILITY.items():
        values[name] = measure(model, asked)
    metrics |= {
        f"rwku/{name}": mean_metric(numbers)
        for name, numbers in values.items()
        if f"rwku/{name}" not in metrics
    }
    return BenchmarkScores(metrics, values)


def read_rows(
    asked: BenchmarkRequest,
    config: str,
    fields: Mapping[str, type],
    shapes: Mapping[str, tuple[Callable[[Row], bool], str]] | None = None,
) -> list[Row]:
    """The rows of a set that are about the person asked for, or about all.

    `shapes` are of fields that have parts of their own: what says whether a row's is right, and
    what is expected.
    """
    place = f"{asked.data.folder or asked.data.hub}, config {config}, split test"
    whole = replace(asked.data, limit=None)  # the limit is on rows about the person
    rows = whole.rows(config, "test", {**fields, **({"subject": str} if asked.part else {})})
    for number, row in enumerate(rows, 1):
        for name, (good, expected) in (shapes or {}).items():
            if not good(row):
                raise SrmuError(f"{place}, row {number}: field {name!r} is not {expected}")
    if asked.part:
        people = dict.fromkeys(row["subject"] for row in rows)
        if asked.part not in people:
            raise SrmuError(
                f"{place}: nothing about {asked.part!r}{suggest_word(asked.part, people)}"
            )
        rows = [row for row in rows if row["subject"] == asked.part]
    return rows[: asked.data.limit]


def pose_question(
    model: Subject, asked: BenchmarkRequest, question: str, content: str, start: str = ""
) -> str:
    """A prompt: the template with the question, or the authors' text and how an answer starts."""
    if asked.template:
        return prompt_of(model, question, asked.template)
    text = prompt_of(model, content, "" if model.tokenizer.chat_template else "{question}")
    return text + (" " if start and not text[-1:].isspace() else "") + start


def probe_text(row: Row, level: int) -> tuple[str, str]:
    """The authors' text of a probe, and how its answer starts (their eval_forget.py)."""
    kind = row["type"] if level == 3 else ""
    if kind == "affirmative suffix":  # the query starts the answer
        return f"{BRIEF}Question: {row['query']}", ""
    if kind == "incontext learning":  # the query has worked examples, and says Question itself
        return f"{BRIEF}{row['query']}\n", "Answer:"
    return f"{BLANK if level == 1 else BRIEF}Question: {row['query']}\n", "Answer:"


def measure_probes(
    model: Subject, asked: BenchmarkRequest, about: str, levels: Sequence[int]
) -> Values:
    """ROUGE-L recall of each probe by level, of all, and by attack; 1 for each empty answer."""
    fields: dict[str, type] = {"query": str, "answer": str}
    asked_for = [
        (level, row)
        for level in levels
        for row in read_rows(
            asked, f"{about}_level{level}", fields | ({"type": str} if level == 3 else {})
        )
    ]
    said = write_continuations(
        model,
        [
            pose_question(model, asked, row["query"], *probe_text(row, level))
            for level, row in asked_for
        ],
        ANSWERED,
        stops=("\n",),
        label=f"rwku {about} answers",
        watch=asked.watch,
    )
    recalled = rouge_recall(said, [row["answer"] for _, row in asked_for])
    found: Values = {"all": recalled, "empty": [float(not answer) for answer in said]}
    for (level, row), score in zip(asked_for, recalled, strict=True):
        found.setdefault(f"level{level}", []).append(score)
        if level == 3:
            kind = re.sub(r"\W+", "_", row["type"].lower())
            found.setdefault(f"level3/{kind}", []).append(score)
    return found


def rouge_recall(answers: Sequence[str], truths: Sequence[str]) -> list[float]:
    """ROUGE-L recall, words as they stand: rouge-score's own would drop all but Latin letters."""
    split = SimpleNamespace(tokenize=lambda text: text.replace(".", " ").split())
    return rouge_scores("recall", answers, truths, tokenizer=split)


def membership_values(model: Subject, asked: BenchmarkRequest, about: str) -> Values:
    """Each of MEMBERSHIP of each text, with the sign of a loss."""
    texts = [row["text"] for row in read_rows(asked, about, {"text": str})]
    parts = [texts[start : start + 64] for start in range(0, len(texts), 64)]
    label = f"rwku {about.replace('_', ' ')}"
    found = do_each(parts, lambda part: -membership_scores(model, part), label, asked.watch)
    table = np.concatenate(found)
    if not len(table):
        raise SrmuError(f"{label}: no text has two tokens; it takes longer ones")
    check_finite(table.flat, label)
    return dict(zip(MEMBERSHIP, table.T.tolist(), strict=True))


def measure_mmlu(model: Subject, asked: BenchmarkRequest) -> list[float]:
    """MMLU: 1 where the letter of the right choice is the likeliest, after worked examples."""
    fields = {"task": str, "question": str, "choices": list, "answer": int}
    shapes = {
        "answer": (is_mmlu_row, "the place of one of 2 to 4 choices, from 0"),
        "examples": (is_bbh_row, "a list of questions with choices and answer"),
    }
    rows = read_rows(asked, "utility_general", fields, shapes)
    pairs = []
    for row in rows:
        shots = "".join(
            f"Question: {letter_options(shot)}\nAnswer: {LETTERS[shot['answer']]}\n\n"
            for shot in row["examples"]
        )
        text = EXAM.format(row["task"].replace("_", " ")) + shots + FOLLOW
        question = letter_options(row)
        prompt = pose_question(model, asked, question, f"{text}Question: {question}", "Answer:")
        pairs += [
            (prompt, f" {letter}") for letter, _ in zip(LETTERS, row["choices"], strict=False)
        ]
    read_off = iter(log_likelihoods(model, pairs, label="rwku general", watch=asked.watch))
    found = []
    for row in rows:
        logs = [logp for logp, _ in islice(read_off, len(row["choices"]))]
        found.append(float(int(np.argmax(logs)) == row["answer"]))
    return found


def letter_options(row: Row) -> str:
    listed = zip(LETTERS, row["choices"], strict=False)
    return "\n".join([row["question"], *(f"{letter}. {choice}" for letter, choice in listed)])


def is_mmlu_row(row: Any) -> bool:
    """Whether this is a question with choices and the place of the right one."""
    if not isinstance(row, Mapping) or not isinstance(row.get("question"), str):
        return False
    choices, answer = row.get("choices"), row.get("answer")
    return (
        isinstance(choices, list)
        and 2 <= len(choices) <= len(LETTERS)
        and type(answer) is int
        and 0 <= answer < len(choices)
    )


def is_bbh_row(row: Row) -> bool:
    examples = row.get("examples")
    return isinstance(examples, list) and all(map(is_mmlu_row, examples))


def measure_bbh(model: Subject, asked: BenchmarkRequest) -> list[float]:
    """BBH: 1 where what the model concludes is an answer, but for articles and punctuation."""
    fields: dict[str, type] = {"question": str, "cot": str}
    shapes = {"answer": (is_truthfulqa_row, "a text or a list of texts")}
    rows = read_rows(asked, "utility_reason", fields, shapes)
    prompts = [
        pose_question(
            model,
            asked,
            row["question"],
            f"{row['cot'].strip()}\n\n{REASON}\nQ: {row['question']}",
            "A:",
        )
        for row in rows
    ]
    said = write_continuations(model, prompts, WRITTEN, label="rwku reasons", watch=asked.watch)
    return [
        float(
            any(
                answer_words(find_conclusion(text)) == answer_words(truth)
                for truth in as_list(row["answer"])
            )
        )
        for text, row in zip(said, rows, strict=True)
    ]


def is_truthfulqa_row(row: Row) -> bool:
    value = row.get("answer")
    return bool(value) and all(isinstance(text, str) and text.strip() for text in as_list(value))


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def find_conclusion(text: str) -> str:
    """What follows "the answer is" up to the next full stop, else the whole text."""
    found = CONCLUSION.search(text)
    return (found[1] if found else text).strip() or "NOANSWER"


def answer_words(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation and articles."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def measure_truthfulqa(model: Subject, asked: BenchmarkRequest) -> list[float]:
    """TruthfulQA's MC1: 1 where the true choice is likelier than every false one."""
    wanted = "choices with labels, 1 for a true one and 0 for a false one, some of each"
    shapes = {"mc1_targets": (is_triviaqa_row, wanted)}
    rows = read_rows(asked, "utility_truthfulness", {"question": str}, shapes)
    pairs = [
        (
            pose_question(model, asked, row["question"], prime_question(row["question"]), "A:"),
            f" {c}",
        )
        for row in rows
        for c in row["mc1_targets"]["choices"]
    ]
    read_off = iter(log_likelihoods(model, pairs, label="rwku truthfulness", watch=asked.watch))
    found = []
    for row in rows:
        labels = row["mc1_targets"]["labels"]
        logs = [logp for logp, _ in islice(read_off, len(labels))]
        false = max(log for log, label in zip(logs, labels, strict=True) if not label)
        found.append(float(logs[labels.index(1)] > false))
    return found


def prime_question(question: str) -> str:
    """A question after TruthfulQA's own six examples (arXiv 2109.07958), as lm-eval has them."""
    return alpaca_template().render(question=question).removesuffix("\nA:")


@cache
def alpaca_template() -> Template:
    place = Path(str(files("lm_eval.tasks").joinpath("truthfulqa", "truthfulqa_mc1.yaml")))
    return Template(yaml.safe_load(place.read_text(encoding="utf-8"))["doc_to_text"])


def is_triviaqa_row(row: Row) -> bool:
    value = row.get("mc1_targets")
    if not isinstance(value, Mapping):
        return False
    choices, labels = value.get("choices"), value.get("labels")
    return (
        isinstance(choices, list)
        and isinstance(labels, list)
        and all(isinstance(text, str) and text.strip() for text in choices)
        and len(choices) == len(labels)
        and {*labels} == {0, 1}
    )


def measure_triviaqa(model: Subject, asked: BenchmarkRequest) -> list[float]:
    """TriviaQA: F1 of each answer's words with those of the right answer it is closest to."""
    rows = read_rows(asked, "utility_factuality", {"question": str, "answers": list})
    prompts = [
        pose_question(model, asked, row["question"], f"{TRIVIA}Q: {row['question']}\n", "A:")
        for row in rows
    ]
    said = write_continuations(model, prompts, ANSWERED, label="rwku facts", watch=asked.watch)
    return [
        max(word_f1(text, truth) for truth in row["answers"])
        for text, row in zip(said, rows, strict=True)
    ]


def word_f1(answer: str, truth: str) -> float:
    """The harmonic mean of the shares of words that two texts have in common."""
    one, other = answer_words(answer), answer_words(truth)
    if not one or not other:
        return float(one == other)
    common = (Counter(one) & Counter(other)).total()
    return 2 * common / (len(one) + len(other))


def measure_fluency(model: Subject, asked: BenchmarkRequest) -> list[float]:
    """The entropy of word pairs and triples of free texts: low where a model repeats itself."""
    rows = read_rows(asked, "utility_fluency", {"instruction": str})
    prompts = [
        pose_question(model, asked, row["instruction"], f"Instruction: {row['instruction']}\n")
        for row in rows
    ]
    return [
        ngram_entropy(text)
        for text in write_continuations(
            model, prompts, WRITTEN, label="rwku free texts", watch=asked.watch
        )
    ]


def ngram_entropy(text: str) -> float:
    """The mean of WEIGHTS times the entropies of a text's n-grams, in bits (arXiv 2202.05262).

    Words are split by WORDS; the authors split with NLTK, which fetches data for it.
    """
    from scipy.stats import entropy as bits

    parts = WORDS.findall(text)
    found = []
    for size, weight in WEIGHTS.items():
        counts = Counter(zip(*(parts[start:] for start in range(size)), strict=False))
        found.append(weight * float(bits([*counts.values()], base=2)) if counts else 0.0)
    return float(np.mean(found))


UTILITY: dict[str, Callable[[Subject, BenchmarkRequest], list[float]]] = {
    "general": measure_mmlu,
    "reason": measure_bbh,
    "truthfulness": measure_truthfulqa,
    "factuality": measure_triviaqa,
    "fluency": measure_fluency,
}

SUITE = Benchmark(
    title="RWKU",
    paper="arXiv 2406.10890",
    hub="jinzhuoran/RWKU",
    get="with a hub in reach, `hf download jinzhuoran/RWKU --repo-type dataset "
    "--local-dir rwku`, "
    "then give --data rwku",
    run=run_rwku,
    axes=("All f", "All n"),
    columns=(
        TableColumn("FB f", "rwku/forget/level1", "low"),
        TableColumn("QA f", "rwku/forget/level2", "low"),
        TableColumn("AA f", "rwku/forget/level3", "low"),
        TableColumn("All f", "rwku/forget/all", "low"),
        TableColumn("FB n", "rwku/neighbor/level1", "high"),
        TableColumn("QA n", "rwku/neighbor/level2", "high"),
        TableColumn("All n", "rwku/neighbor/all", "high"),
        TableColumn("FM", "rwku/mia_forget/loss", "high"),
        TableColumn("RM", "rwku/mia_retain/loss", "low"),
        TableColumn("Gen", "rwku/general", "high"),
        TableColumn("Rea", "rwku/reason", "high"),
        TableColumn("Tru", "rwku/truthfulness", "high"),
        TableColumn("Fac", "rwku/factuality", "high"),
        TableColumn("Flu", "rwku/fluency", "high"),
    ),
)
