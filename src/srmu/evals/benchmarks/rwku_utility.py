"""What RWKU asks about all else: MMLU, BBH, TruthfulQA, TriviaQA, and free texts."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Template

from srmu.errors import SrmuError, suggest_word
from srmu.evals.benchmarks.base import (
    LETTERS,
    BenchmarkRequest,
    Fields,
    Row,
    Shape,
    letter_options,
    option_likelihoods,
    prompt_of,
    write_continuations,
)
from srmu.evals.subject import Subject

ANSWERED = 30  # new tokens
WRITTEN = 256  # new tokens, of reasons and of free text
WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # of the entropies of pairs and of triples of words
WORDS = re.compile(r"\w+|[^\w\s]")
CONCLUSION = re.compile(r"[tT]he answer is (.*?)\.")

# The authors' prompts: eval_mmlu.py, eval_bbh.py, eval_triviaqa.py, presets.py.
EXAM = "The following are multiple choice questions (with answers) about {}.\n\n"
FOLLOW = "Please following the previous examples and answer the given question.\n"
REASON = "Following previous examples, answer the following questions and end with 'so the answer is'"
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


def read_rows(request: BenchmarkRequest, config: str, fields: Fields) -> list[Row]:
    """The rows of a set that are about the person asked for, or about all."""
    whole = replace(request.data, limit=None)  # the limit is on rows about the person
    rows = whole.rows(config, "test", {**fields, **({"subject": str} if request.part else {})})
    if request.part:
        people = dict.fromkeys(row["subject"] for row in rows)
        if request.part not in people:
            raise SrmuError(
                f"{request.data.folder or request.data.hub}, config {config}, split test: nothing "
                f"about {request.part!r}{suggest_word(request.part, people)}"
            )
        rows = [row for row in rows if row["subject"] == request.part]
    return rows[: request.data.limit]


def pose_question(model: Subject, request: BenchmarkRequest, question: str, content: str, start: str = "") -> str:
    """A prompt: the template with the question, or the authors' text and how an answer starts."""
    if request.template:
        return prompt_of(model, question, request.template)
    text = prompt_of(model, content, "" if model.tokenizer.chat_template else "{question}")
    return text + (" " if start and not text[-1:].isspace() else "") + start


def has_right_choice(row: Any) -> bool:
    """Whether this is a question with choices and the place of the right one."""
    if not isinstance(row, Mapping) or not isinstance(row.get("question"), str):
        return False
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        return False
    return type(answer) is int and answer in range(len(choices))


def has_examples(row: Row) -> bool:
    return isinstance(row["examples"], list) and all(map(has_right_choice, row["examples"]))


def has_accepted_answers(row: Row) -> bool:
    answers = as_list(row["answer"])
    return bool(answers) and all(isinstance(text, str) and text.strip() for text in answers)


def has_labelled_choices(row: Row) -> bool:
    targets = row["mc1_targets"] if isinstance(row["mc1_targets"], Mapping) else {}
    choices, labels = targets.get("choices"), targets.get("labels")
    return (
        isinstance(choices, list)
        and isinstance(labels, list)
        and all(isinstance(text, str) and text.strip() for text in choices)
        and len(choices) == len(labels)
        and {*labels} == {0, 1}
    )


MMLU: Fields = {
    "task": str,
    "question": str,
    "choices": list,
    "answer": Shape(has_right_choice, "the place of one of 2 to 4 choices, from 0"),
    "examples": Shape(has_examples, "a list of questions with choices and answer"),
}
BBH: Fields = {"question": str, "cot": str, "answer": Shape(has_accepted_answers, "a text or a list of texts")}
TRUTHFULQA: Fields = {
    "question": str,
    "mc1_targets": Shape(
        has_labelled_choices, "choices with labels, 1 for a true one and 0 for a false one, some of each"
    ),
}


def measure_mmlu(model: Subject, request: BenchmarkRequest) -> list[float]:
    """MMLU: 1 where the letter of the right choice is the likeliest, after worked examples."""
    rows = read_rows(request, "utility_general", MMLU)
    questions = []
    for row in rows:
        text = EXAM.format(row["task"].replace("_", " "))
        for shot in row["examples"]:
            text += f"Question: {list_question(shot)}\nAnswer: {LETTERS[shot['answer']]}\n\n"
        question = list_question(row)
        content = f"{text}{FOLLOW}Question: {question}"
        prompt = pose_question(model, request, question, content, "Answer:")
        questions.append((prompt, [f" {letter}" for letter in LETTERS[: len(row["choices"])]]))
    read = option_likelihoods(model, questions, label="rwku general", watch=request.watch)
    return [
        float(int(np.argmax([logp for logp, _ in options])) == row["answer"])
        for options, row in zip(read, rows, strict=True)
    ]


def list_question(row: Row) -> str:
    return f"{row['question']}\n{letter_options(row['choices'])}"


def measure_bbh(model: Subject, request: BenchmarkRequest) -> list[float]:
    """BBH: 1 where what the model concludes is an answer, but for articles and punctuation."""
    rows = read_rows(request, "utility_reason", BBH)
    contents = [f"{row['cot'].strip()}\n\n{REASON}\nQ: {row['question']}" for row in rows]
    prompts = [
        pose_question(model, request, row["question"], content, "A:")
        for row, content in zip(rows, contents, strict=True)
    ]
    written = write_continuations(model, prompts, WRITTEN, label="rwku reasons", watch=request.watch)
    return [
        float(normalise_words(find_conclusion(text)) in map(normalise_words, as_list(row["answer"])))
        for text, row in zip(written, rows, strict=True)
    ]


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def find_conclusion(text: str) -> str:
    """What follows "the answer is" up to the next full stop, else the whole text."""
    match = CONCLUSION.search(text)
    return (match[1] if match else text).strip() or "NOANSWER"


def normalise_words(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation and articles."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def measure_truthfulqa(model: Subject, request: BenchmarkRequest) -> list[float]:
    """TruthfulQA's MC1: 1 where the true choice is likelier than every false one."""
    rows = read_rows(request, "utility_truthfulness", TRUTHFULQA)
    questions = []
    for row in rows:
        prompt = pose_question(model, request, row["question"], prime_question(row["question"]), "A:")
        questions.append((prompt, [f" {choice}" for choice in row["mc1_targets"]["choices"]]))
    read = option_likelihoods(model, questions, label="rwku truthfulness", watch=request.watch)
    right = []
    for row, options in zip(rows, read, strict=True):
        labels, logs = row["mc1_targets"]["labels"], [logp for logp, _ in options]
        false = max(log for log, label in zip(logs, labels, strict=True) if not label)
        right.append(float(logs[labels.index(1)] > false))
    return right


def prime_question(question: str) -> str:
    """A question after TruthfulQA's own six examples (arXiv 2109.07958), as lm-eval has them."""
    return truthfulqa_template().render(question=question).removesuffix("\nA:")


@cache
def truthfulqa_template() -> Template:
    place = Path(str(files("lm_eval.tasks").joinpath("truthfulqa", "truthfulqa_mc1.yaml")))
    return Template(yaml.safe_load(place.read_text(encoding="utf-8"))["doc_to_text"])


def measure_triviaqa(model: Subject, request: BenchmarkRequest) -> list[float]:
    """TriviaQA: F1 of each answer's words with those of the right answer it is closest to."""
    rows = read_rows(request, "utility_factuality", {"question": str, "answers": list})
    prompts = [pose_question(model, request, row["question"], f"{TRIVIA}Q: {row['question']}\n", "A:") for row in rows]
    written = write_continuations(model, prompts, ANSWERED, label="rwku facts", watch=request.watch)
    return [max(score_f1(text, truth) for truth in row["answers"]) for text, row in zip(written, rows, strict=True)]


def score_f1(answer: str, truth: str) -> float:
    """The harmonic mean of the shares of words that two texts have in common."""
    one, other = normalise_words(answer), normalise_words(truth)
    if not one or not other:
        return float(one == other)
    common = (Counter(one) & Counter(other)).total()
    return 2 * common / (len(one) + len(other))


def measure_fluency(model: Subject, request: BenchmarkRequest) -> list[float]:
    """The entropy of word pairs and triples of free texts: low where a model repeats itself."""
    rows = read_rows(request, "utility_fluency", {"instruction": str})
    prompts = [
        pose_question(model, request, row["instruction"], f"Instruction: {row['instruction']}\n") for row in rows
    ]
    written = write_continuations(model, prompts, WRITTEN, label="rwku free texts", watch=request.watch)
    return [measure_entropy(text) for text in written]


def measure_entropy(text: str) -> float:
    """The mean of WEIGHTS times the entropies of a text's n-grams, in bits (arXiv 2202.05262).

    Words are split by WORDS; the authors split with NLTK, which fetches data for it.
    """
    from scipy.stats import entropy as bits

    parts = WORDS.findall(text)
    entropies = []
    for size, weight in WEIGHTS.items():
        counts = Counter(zip(*(parts[start:] for start in range(size)), strict=False))
        entropies.append(weight * float(bits([*counts.values()], base=2)) if counts else 0.0)
    return float(np.mean(entropies))


UTILITY: dict[str, Callable[[Subject, BenchmarkRequest], list[float]]] = {
    "general": measure_mmlu,
    "reason": measure_bbh,
    "truthfulness": measure_truthfulqa,
    "factuality": measure_triviaqa,
    "fluency": measure_fluency,
}
