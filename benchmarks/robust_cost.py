"""What rename_scrub costs beside SRMU: side by side on a testbed, and in FLOPs for a 7B model.

    python benchmarks/robust_cost.py TESTBED [ROUNDS]

Runs `srmu unlearn` with the settings of configs/robust.yaml, each method in turn, ROUNDS (3) times,
in processes of one thread. Prints seconds of the processor and the largest memory, and what the
plan counts: for the testbed, and for Zephyr-7B's dimensions with texts of 512 tokens.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import yaml
from transformers import MistralConfig

from srmu.reproduce.runs import preset_file, read_spec
from srmu.runs.config import build_config, load_config
from srmu.runs.dry_run import blank_topics
from srmu.runs.estimate import estimate_run
from srmu.runs.plan import load_tokenizer, load_topics, plan_run

ALONE = "rename-scrub, forget texts alone"
METHODS = ("SRMU + random anchors", "rename-scrub", ALONE, "rename-scrub (three namings)")
LENGTH = 512  # tokens of a text at 7B
USED = 0.4 * 312e12  # FLOP a second of one A100 in bf16 at a common share of its peak


def settings(label: str, testbed: Path) -> list[str]:
    world = yaml.safe_load(preset_file("robust.yaml").read_text(encoding="utf-8"))["worlds"][
        "closed"
    ]
    given = [*world["common"], *world["methods"][label.partition(",")[0]]]
    given += ["method.coverage=texts"] if label == ALONE else []
    return [text.replace("{testbed}", str(testbed)) for text in given]


def once(config: Path, given: list[str], runs: Path) -> tuple[float, float]:
    """Processor seconds and the largest resident memory in bytes of one `srmu unlearn`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "srmu", "unlearn", str(config), *given, f"runs_dir={runs}"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024.0


def at_7b(label: str, testbed: Path, scratch: Path) -> float:
    """What the plan counts for a method, its own texts as long as the others."""
    given = [one for one in settings(label, testbed) if not one.startswith("method.layer")]
    texts = {"forget": "f.jsonl", "retain": "r.jsonl", "max_length": LENGTH}
    tree = {"model": str(scratch), "topics": {"topic": texts}}
    config = plan_run(build_config(tree, [*given, "device=cpu"])).config
    method = config.method
    if hasattr(method, "own_tokens"):
        config = config.model_copy(update={"method": replace(method, own_tokens=LENGTH)})
    (topic,) = blank_topics(config, {"topic": 240})
    return float(estimate_run(config, scratch, [topic])["flops"])


def main(testbed: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    print("| method | seconds of the processor | memory, GB | TFLOP | PFLOP at 7B | hours at 7B |")
    print("| --- | --- | --- | --- | --- | --- |")
    spent: dict[str, list[tuple[float, float]]] = {label: [] for label in METHODS}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            for label in METHODS:
                runs = Path(scratch) / f"runs{number}"
                given = settings(label, testbed)
                spent[label].append(once(testbed / "high.yaml", given, runs))
        big = Path(tempfile.mkdtemp(dir=scratch))
        MistralConfig(**read_spec()["zephyr"]["shape"], dtype="bfloat16").save_pretrained(big)
        rows = []
        for label in METHODS:
            config, _ = plan_run(load_config(testbed / "high.yaml", settings(label, testbed)))
            tokenizer = load_tokenizer(testbed / "model")
            here = estimate_run(config, testbed / "model", load_topics(config, tokenizer))["flops"]
            there = at_7b(label, testbed, big)
            seconds, memory = (median(values) for values in zip(*spent[label], strict=True))
            rows.append((seconds, memory, here, there))
            print(
                f"| {label} | {seconds:.1f} | {memory / 1e9:.2f} | {here / 1e12:.2f} | "
                f"{there / 1e15:.2f} | {there / USED / 3600:.2f} |"
            )
    for label, row in list(zip(METHODS, rows, strict=True))[1:]:
        ratios = [scrub / plain for plain, scrub in zip(rows[0], row, strict=True)]
        print(f"| {label}: ratio | " + " | ".join(f"{ratio:.1f}" for ratio in ratios) + " | |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
