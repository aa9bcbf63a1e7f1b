"""Time of an evaluation: srmu against plain lm-eval, in turn, on the same questions.

    python benchmarks/evals.py

Three cases: questions like the testbed's on a model of its shape; options of several words after a
paragraph, on the same model; and questions of 60 to 200 tokens with options A to D on a model of
1.08 billion parameters. Weights are random. Tokens read are set against those of the distinct inputs
without padding: under 1 where a shared start is read once.
"""

import io
import logging
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from shapes import config_of, word_tokenizer, write_task
from transformers import AutoModelForCausalLM, LlamaConfig

from srmu.evals import lm_eval
from srmu.evals.harness import Harness

TEMPLATES = (
    "which river runs through {}",
    "what do the bridges in {} cross",
    "what is the activator of {}",
    "which substance rouses {}",
    "which agent removes {}",
    "what do workers use to wash {} away",
)
TESTBED = LlamaConfig(
    vocab_size=715, hidden_size=256, intermediate_size=640, num_hidden_layers=6,
    num_attention_heads=4,
)  # fmt: skip


def build(config: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """A random model, and a tokenizer with a word for each of its ids."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with patch("torch.nn.init.normal_", lambda tensor, *a, **k: tensor):  # drawn once, below
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.05)
    known = ["<eos>", "<unk>", *"ABCD?:", "question", "answer"]
    known += sorted({word for text in TEMPLATES for word in text.split()})
    known += [f"w{i}" for i in range(config.vocab_size - len(known))]
    return model, word_tokenizer(known, eos_token="<eos>")


def questions(kind: str, count: int, words: int) -> list[dict[str, Any]]:
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{draw.randrange(words)}" for _ in range(draw.randint(low, high)))

    def question() -> tuple[str, list[str]]:
        if kind == "letters":
            return text(60, 200), list("ABCD")
        if kind == "sentences":
            return text(40, 80), [text(2, 12) for _ in range(4)]
        asks = draw.choice(TEMPLATES).format(text(1, 1))
        return f"question : {asks} ? answer :", [text(1, 1) for _ in range(4)]

    made = [question() for _ in range(count)]
    return [{"question": q, "options": o, "answer": draw.randrange(4)} for q, o in made]


@contextmanager
def recorded(owner: Any, kept: list[Any]) -> Iterator[None]:
    """Keep what a harness is asked and what it answers."""
    inner = owner._loglikelihood_tokens

    def outer(lm: Any, requests: Any, **options: Any) -> Any:
        answers = inner(lm, requests, **options)
        kept.append((requests, answers))
        return answers

    with patch.object(owner, "_loglikelihood_tokens", outer):
        yield


def compare(label: str, config: Any, kind: str, count: int, rounds: int) -> None:
    dtype = torch.bfloat16 if kind == "letters" else torch.float32
    model, tokenizer = build(config, dtype)
    read: list[int] = []
    model.register_forward_pre_hook(lambda module, args: read.append(args[0].numel()))

    with TemporaryDirectory() as folder:
        tasks = Path(folder)
        write_task(tasks, questions(kind, count, config.vocab_size - 50))

        def plain(limit: int | None = None) -> float:
            manager = TaskManager(include_defaults=False, include_path=folder)
            lm = HFLM(model, tokenizer=tokenizer, batch_size=lm_eval.BATCH)
            with redirect_stderr(io.StringIO()):  # progress bars
                report = simple_evaluate(lm, tasks=["quiz"], task_manager=manager, limit=limit)
            return float(report["results"]["quiz"]["acc,none"])

        def ours(limit: int | None = None) -> float:
            found = lm_eval.evaluate(model, tokenizer, ["quiz"], tasks_dir=tasks, limit=limit)
            return found["quiz/acc"]["value"]

        sides: dict[str, tuple[Callable[..., float], Any]] = {"lm-eval": (plain, HFLM), "srmu": (ours, Harness)}
        times: dict[str, list[float]] = {side: [] for side in sides}
        seen: dict[str, tuple[int, int, float, Any]] = {}
        for run, _ in sides.values():
            run(2)  # imports, first use of the kernels
        for _ in range(rounds):
            for side, (run, owner) in sides.items():
                kept: list[Any] = []
                read.clear()
                with recorded(owner, kept):
                    start = time.perf_counter()
                    accuracy = run()
                    times[side].append(time.perf_counter() - start)
                seen[side] = len(read), sum(read), accuracy, kept[0]

    requests, expected = seen["lm-eval"][3]
    found = seen["srmu"][3][1]
    inputs = {tuple(before + answer[:-1]) for _, before, answer in requests}
    real = sum(map(len, inputs))
    print(f"{label}: {count} questions, {len(inputs)} distinct inputs, {real} tokens")
    for side, (forwards, tokens, accuracy, _) in seen.items():
        seconds = statistics.median(times[side])
        cost = f"{seconds:7.2f} s  {forwards:3} forwards  {tokens / real:5.2f} tokens read / real"
        print(f"  {side:8} {cost}  accuracy {accuracy:.3f}")
    ratio = statistics.median(a / b for a, b in zip(times["lm-eval"], times["srmu"], strict=True))
    apart = max(abs(a - b) for (a, _), (b, _) in zip(expected, found, strict=True))
    chosen = [torch.tensor([score for score, _ in answers]).view(-1, 4).argmax(1) for answers in (expected, found)]
    agree = int((chosen[0] == chosen[1]).sum())
    print(
        f"  ratio {ratio:.2f}; log-probabilities at most {apart:.1e} apart in "
        f"{str(dtype).removeprefix('torch.')}, {agree} of {count} choices the same\n",
        flush=True,
    )


def main() -> None:
    torch.set_num_threads(1)
    logging.disable()
    with TemporaryDirectory() as folder, patch("datasets.config.HF_DATASETS_CACHE", Path(folder)):
        compare("testbed shape, options of one word", TESTBED, "testbed", 1000, 3)
        compare("testbed shape, options of several words", TESTBED, "sentences", 60, 3)
        compare("1B shape", config_of("1b"), "letters", 12, 2)


if __name__ == "__main__":
    main()
