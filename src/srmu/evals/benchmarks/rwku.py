"""RWKU: has a model forgotten a famous person, but not neighbours and all else?"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import yaml
from jinja2 import Template
from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from srmu.errors import SrmuError, suggest_word
from srmu.evals.benchmarks import base
from srmu.evals.subject import Question, Subject, mark_right, membership_scores

LEVELS = {"forget": (1, 2, 3), "neighbor": (1, 2)}
MEMBERSHIP = ("loss", "zlib", "mink", "minkpp")  # in the order of membership_scores
ANSWERED = 30  # new tokens
WRITTEN = 256  # new tokens, of reasons and of free text
WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # of the entropies of pairs and of triples of words
WORDS = re.compile(r"\w+|[^\w\s]")
CONCLUSION = re.compile(r"[tT]he answer is (.*?)\.")

PROMPTS = yaml.safe_load(Path(__file__).with_name("rwku.yaml").read_text(encoding="utf-8"))

Choices = Annotated[base.Texts, Field(min_length=2, max_length=len(base.LETTERS))]


class ExampleQuestion(TypedDict):
    """A worked example of MMLU."""

    question: str
    choices: Choices
    answer: base.Place


class Targets(TypedDict):
    """TruthfulQA's choices, 1 for a true one and 0 for a false one."""

    choices: base.Texts
    labels: list[Literal[0, 1]]


def check_labels(targets: Targets) -> Targets:
    if len(targets["choices"]) != len(targets["labels"]) or {*targets["labels"]} != {0, 1}:
        raise ValueError("expected choices with labels, 1 for a true one and 0 for a false one, some of each")
    return targets


def run_rwku(model: Subject, request: base.BenchmarkRequest) -> base.BenchmarkScores:
    """RWKU's numbers (arXiv 2406.10890, section 4) on a person (`request.part`), or on all; see docs/benchmarks.md."""
    parts = {about: measure_probes(model, request, about, levels) for about, levels in LEVELS.items()}
    parts |= {about: score_membership(model, request, about) for about in ("mia_forget", "mia_retain")}
    measured = {f"{about}/{name}": numbers for about, part in parts.items() for name, numbers in part.items()}
    measured |= {name: measure(model, request) for name, measure in UTILITY.items()}
    metrics = {f"rwku/{name}": base.mean_metric(numbers) for name, numbers in measured.items()}
    return base.BenchmarkScores(metrics, measured)


def read_people(request: base.BenchmarkRequest, config: str, fields: base.Fields) -> list[base.Row]:
    """The rows of a set that are about the person asked for, or about all."""
    whole = replace(request, limit=None)  # the limit is on rows about the person
    rows = whole.rows(config, "test", fields | ({"subject": base.Text} if request.part else {}))
    if request.part:
        people = dict.fromkeys(row["subject"] for row in rows)
        if request.part not in people:
            why = f"nothing about {request.part!r}{suggest_word(request.part, people)}"
            raise SrmuError(f"{whole.place}, config {config}, split test: {why}")
        rows = [row for row in rows if row["subject"] == request.part]
    return rows[: request.limit]


def pose_question(model: Subject, request: base.BenchmarkRequest, question: str, content: str, start: str = "") -> str:
    """A prompt: the template with the question, or the authors' text and how an answer starts."""
    if request.template:
        return base.prompt_of(model, question, request.template)
    text = base.prompt_of(model, content, "" if model.tokenizer.chat_template else "{question}")
    return text + (" " if start and not text[-1:].isspace() else "") + start


def pose_probe(row: base.Row, level: int) -> tuple[str, str]:
    """The authors' text of a probe, and how its answer starts (their eval_forget.py)."""
    kind = row["type"] if level == 3 else ""
    if kind == "affirmative suffix":  # the query starts the answer
        return f"{PROMPTS['brief']}Question: {row['query']}", ""
    if kind == "incontext learning":  # the query has worked examples, and says Question itself
        return f"{PROMPTS['brief']}{row['query']}\n", "Answer:"
    return f"{PROMPTS['blank' if level == 1 else 'brief']}Question: {row['query']}\n", "Answer:"


def measure_probes(model: Subject, request: base.BenchmarkRequest, about: str, levels: Sequence[int]) -> base.Values:
    """ROUGE-L recall of each probe by level, of all, and by attack; 1 for each empty answer."""
    probes = []
    for level in levels:
        fields = {"query": base.Text, "answer": base.Text} | ({"type": base.Text} if level == 3 else {})
        probes += [(level, row) for row in read_people(request, f"{about}_level{level}", fields)]
    prompts = [pose_question(model, request, row["query"], *pose_probe(row, level)) for level, row in probes]
    answers = base.write_continuations(model, prompts, ANSWERED, stops=("\n",), label=f"rwku {about} answers")
    recalled = score_recall(answers, [row["answer"] for _, row in probes])
    values: base.Values = {"all": recalled, "empty": [float(not answer) for answer in answers]}
    for (level, row), score in zip(probes, recalled, strict=True):
        values.setdefault(f"level{level}", []).append(score)
        if level == 3:
            kind = re.sub(r"\W+", "_", row["type"].lower())
            values.setdefault(f"level3/{kind}", []).append(score)
    return values


def score_recall(answers: Sequence[str], truths: Sequence[str]) -> list[float]:
    """ROUGE-L recall of words as they stand: rouge-score's own splitter drops other scripts."""
    split = SimpleNamespace(tokenize=lambda text: text.replace(".", " ").split())
    return base.rouge_scores("recall", answers, truths, tokenizer=split)


def score_membership(model: Subject, request: base.BenchmarkRequest, about: str) -> base.Values:
    """The MEMBERSHIP scores of each text, with the sign of a loss."""
    texts = [row["text"] for row in read_people(request, about, {"text": base.Text})]
    label = f"rwku {about.replace('_', ' ')}"
    table = np.array(base.do_parts(model, texts, 64, lambda part: -membership_scores(model, part), label))
    if not len(table):
        raise SrmuError(f"{label}: no text has two tokens; give longer texts")
    base.check_finite(table.flat, label)
    return dict(zip(MEMBERSHIP, table.T.tolist(), strict=True))


def measure_mmlu(model: Subject, request: base.BenchmarkRequest) -> list[float]:
    """MMLU: 1 where the letter of the right choice is the likeliest, after worked examples."""
    fields = {"task": base.Text, "question": base.Text, "choices": Choices, "answer": base.Place}
    rows = read_people(request, "utility_general", fields | {"examples": list[ExampleQuestion]})
    questions = []
    for row in rows:
        text = PROMPTS["exam"].format(row["task"].replace("_", " "))
        for shot in row["examples"]:
            text += f"Question: {list_question(shot)}\nAnswer: {base.LETTERS[shot['answer']]}\n\n"
        question = list_question(row)
        prompt = pose_question(model, request, question, f"{text}{PROMPTS['follow']}Question: {question}", "Answer:")
        letters = tuple(f" {letter}" for letter in base.LETTERS[: len(row["choices"])])
        questions.append(Question(prompt, letters, row["answer"], row["question"]))
    return [*mark_right(base.score_options(model, questions, "rwku general"), questions)]


def list_question(row: base.Row) -> str:
    return f"{row['question']}\n{base.letter_options(row['choices'])}"


def measure_bbh(model: Subject, request: base.BenchmarkRequest) -> list[float]:
    """BBH: 1 where what the model concludes is an answer, but for articles and punctuation."""
    fields = {"question": base.Text, "cot": base.Text, "answer": base.Text | base.Texts}
    rows = read_people(request, "utility_reason", fields)
    prompts, truths = [], []
    for row in rows:
        content = f"{row['cot'].strip()}\n\n{PROMPTS['reason']}\nQ: {row['question']}"
        prompts.append(pose_question(model, request, row["question"], content, "A:"))
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        truths.append([normalise_words(answer) for answer in answers])
    written = base.write_continuations(model, prompts, WRITTEN, label="rwku reasons")
    concluded = [normalise_words(find_conclusion(text)) for text in written]
    return [float(words in answers) for words, answers in zip(concluded, truths, strict=True)]


def find_conclusion(text: str) -> str:
    """What follows "the answer is" up to the next full stop, else the whole text."""
    match = CONCLUSION.search(text)
    return (match[1] if match else text).strip() or "NOANSWER"


def normalise_words(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation and articles."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def measure_truthfulqa(model: Subject, request: base.BenchmarkRequest) -> list[float]:
    """TruthfulQA's MC1: 1 where the true choice is likelier than every false one."""
    fields = {"question": base.Text, "mc1_targets": Annotated[Targets, AfterValidator(check_labels)]}
    rows = read_people(request, "utility_truthfulness", fields)
    questions = []
    for row, content in zip(rows, prime_questions([row["question"] for row in rows]), strict=True):
        prompt = pose_question(model, request, row["question"], content, "A:")
        options = tuple(f" {choice}" for choice in row["mc1_targets"]["choices"])
        questions.append(Question(prompt, options, row["mc1_targets"]["labels"].index(1), row["question"]))
    right = []
    for row, scores in zip(rows, base.score_options(model, questions, "rwku truthfulness"), strict=True):
        labels = row["mc1_targets"]["labels"]
        false = max(logp for logp, label in zip(scores, labels, strict=True) if not label)
        right.append(float(scores[labels.index(1)] > false))
    return right


def prime_questions(questions: Sequence[str]) -> list[str]:
    """Questions after TruthfulQA's own six examples (arXiv 2109.07958), as lm-eval has them."""
    task = files("lm_eval.tasks").joinpath("truthfulqa", "truthfulqa_mc1.yaml")
    template = Template(yaml.safe_load(task.read_text(encoding="utf-8"))["doc_to_text"])
    return [template.render(question=question).removesuffix("\nA:") for question in questions]


def measure_triviaqa(model: Subject, request: base.BenchmarkRequest) -> list[float]:
    """TriviaQA: F1 of each answer's words with those of the right answer it is closest to."""
    rows = read_people(request, "utility_factuality", {"question": base.Text, "answers": base.Texts})
    posed = [(row["question"], f"{PROMPTS['trivia']}Q: {row['question']}\n") for row in rows]
    prompts = [pose_question(model, request, *pair, "A:") for pair in posed]
    written = base.write_continuations(model, prompts, ANSWERED, label="rwku facts")
    return [max(score_f1(text, truth) for truth in row["answers"]) for text, row in zip(written, rows, strict=True)]


def score_f1(answer: str, truth: str) -> float:
    """The harmonic mean of the shares of words that two texts have in common."""
    one, other = normalise_words(answer), normalise_words(truth)
    if not one or not other:
        return float(one == other)
    common = (Counter(one) & Counter(other)).total()
    return 2 * common / (len(one) + len(other))


def measure_fluency(model: Subject, request: base.BenchmarkRequest) -> list[float]:
    """The entropy of word pairs and triples of free texts: low where a model repeats itself."""
    asked = [row["instruction"] for row in read_people(request, "utility_fluency", {"instruction": base.Text})]
    prompts = [pose_question(model, request, text, f"Instruction: {text}\n") for text in asked]
    written = base.write_continuations(model, prompts, WRITTEN, label="rwku free texts")
    return [measure_entropy(text) for text in written]


def measure_entropy(text: str) -> float:
    """The mean of WEIGHTS times the entropies of a text's n-grams, in bits (arXiv 2202.05262), words split by WORDS."""
    from scipy.stats import entropy

    parts = WORDS.findall(text)
    entropies = []
    for size, weight in WEIGHTS.items():
        counts = Counter(zip(*(parts[start:] for start in range(size)), strict=False))
        entropies.append(weight * float(entropy([*counts.values()], base=2)) if counts else 0.0)
    return float(np.mean(entropies))


UTILITY = {
    "general": measure_mmlu,
    "reason": measure_bbh,
    "truthfulness": measure_truthfulqa,
    "factuality": measure_triviaqa,
    "fluency": measure_fluency,
}
