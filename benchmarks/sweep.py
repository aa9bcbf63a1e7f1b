"""A sweep of 18 trials against 18 runs: of the plain public loop, and of srmu's own commands.

    python benchmarks/sweep.py [--shape small] [--tokens 64] [--steps 10] [--device cpu]
    python benchmarks/sweep.py --device cuda --shape 7b --dtype bfloat16 --tokens 512 --steps 150 \
        --references 1

All in this process. "runs" are whole `unlearn` runs, with loading, folders, importance maps and
deltas; "grid" are the same trials on a model that is loaded once. A reference run loads its two
models and trains; it measures no map and writes nothing. With `--references N` only N of them are
run, and their mean stands for all 18.

Then, from the command line: one `srmu sweep` of the same grid against 18 times `srmu unlearn` and
`srmu eval`, on 40 questions, each side with an empty cache folder of its own, which its later runs
share. With `--commands N` only N of the 18 pairs are run; 0 leaves this part out.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from shapes import parse_arguments, write_checkpoint, write_task, write_texts

from engine import BATCH, LAYER, reference
from srmu.engine.activation_cache import open_activations
from srmu.engine.model import EditableModel
from srmu.engine.topic import Topic
from srmu.runs import run as runs
from srmu.runs.config import Config, make_config

GRID = {"method.coeff": (5, 10, 20), "method.alpha": (300, 600, 1200), "method.importance": ("ratio", "difference")}
QUESTIONS = 40


def trial(folder: Path, config: Config, topic: Topic, model: EditableModel | None) -> EditableModel:
    """One trial on a model that earlier trials have used, put back to its original weights."""
    method = config.method
    if model is None:
        model = EditableModel.load(folder, depth=method.depth, trainable=method.trainable, device=config.device)
        model.activations = open_activations("memory", {}, model.device)
    for name, tensor in model.original.items():
        model.trained[name].data.copy_(tensor)
    method.apply(model, [topic], config.train, lambda step, values: None)
    return model


def write_sweep(folder: Path, steps: int, device: str) -> Path:
    """A task, a run config and a sweep file, beside the model and the texts in `folder`."""
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = [
        {"question": f"w{i} w{i + 1}", "options": [f"w{i + j}" for j in range(4)], "answer": i % 4}
        for i in range(QUESTIONS)
    ]
    write_task(tasks, rows)
    config = {
        "model": "model",
        "device": device,
        "method": {"name": "srmu", "layer": LAYER},
        "topics": {"topic": {"forget": "forget.jsonl", "retain": "retain.jsonl"}},
        "train": {"max_steps": steps},
        "eval": ["quiz"],
        "tasks_dir": "tasks",
        "runs_dir": "runs-one-by-one",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    sweep = {
        "config": "run.yaml",
        "search": {key: [*values] for key, values in GRID.items()},
        "objectives": {"quiz/acc": "minimize"},
        "out": "sweep",
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return folder / "sweep.yaml"


def timed(cache: Path, *arguments: str) -> tuple[float, dict[str, Any]]:
    """Seconds of a command in a process of its own, and what it printed."""
    command = [sys.executable, "-m", "srmu", *arguments, "--json"]
    environment = os.environ | {"SRMU_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - start, json.loads(done.stdout)


def commands(folder: Path, steps: int, device: str, count: int) -> None:
    """One `srmu sweep` against `srmu unlearn` and `srmu eval` for each of its trials."""
    path = write_sweep(folder, steps, device)
    whole, found = timed(folder / "cache-sweep", "sweep", str(path))
    states = [one["state"] for one in found["trials"]]
    if states != ["complete"] * 18:
        sys.exit(f"the sweep's trials are {states}")
    single = []
    for one in found["trials"][:count]:
        given = [f"{key}={value}" for key, value in one["params"].items()]
        config = str(folder / "run.yaml")
        seconds, run = timed(folder / "cache-runs", "unlearn", config, *given)
        more, scores = timed(folder / "cache-runs", "eval", run["run"])
        if scores["after"]["quiz/acc"]["value"] != one["values"]["quiz/acc"]:
            sys.exit(f"trial {one['number']} and its run score differently")
        single.append(seconds + more)
    total = 18 * sum(single) / count
    print(f"commands, with {QUESTIONS} questions; {count} of 18 pairs were run\n")
    print("| | s, 18 trials | times faster |")
    print("|---|---|---|")
    print(f"| srmu unlearn + srmu eval, 18 times | {total:.1f} | 1.0 |")
    print(f"| srmu sweep | {whole:.1f} | {total / whole:.1f} |\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--references", type=int, default=18)
    parser.add_argument("--commands", type=int, default=18, choices=range(19), metavar="N")
    arguments = parse_arguments(parser, "small", 64, 10)
    with TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        os.environ["SRMU_CACHE"] = str(folder / "cache")
        dtype = getattr(torch, arguments.dtype)
        model = write_checkpoint(folder / "model", arguments.shape, dtype)
        texts = [folder / "forget.jsonl", folder / "retain.jsonl"]
        for number, path in enumerate(texts):
            write_texts(path, BATCH * arguments.steps, arguments.tokens, number)
        ours, theirs, grid = [], [], []
        model_once: EditableModel | None = None
        for number, values in enumerate(product(*GRID.values())):
            overrides = [f"{key}={value}" for key, value in zip(GRID, values, strict=True)]
            overrides += [f"method.layer={LAYER}", f"train.max_steps={arguments.steps}"]
            overrides += [f"runs_dir={folder / 'runs'}", f"device={arguments.device}"]
            config = make_config(str(model), *texts, overrides=overrides)
            start = time.perf_counter()
            runs.unlearn_config(config)
            ours.append(time.perf_counter() - start)
            topic = runs.load_topics(config, runs.load_tokenizer(model))[0]
            start = time.perf_counter()
            model_once = trial(model, runs.plan_run(config).config, topic, model_once)
            grid.append(time.perf_counter() - start)
            if number >= arguments.references:
                continue
            pairs = [
                tuple({k: v.to(arguments.device) for k, v in batch.items()} for batch in pair)
                for pair in zip(topic.forget, topic.retain, strict=True)
            ]
            start = time.perf_counter()
            reference(model, dtype, arguments.device, pairs, "reference")
            theirs.append(time.perf_counter() - start)
        reference_seconds = 18 * sum(theirs) / len(theirs)
        size = f"{arguments.steps} steps of {BATCH} x {arguments.tokens} + {BATCH} x {arguments.tokens} tokens"
        print(f"{arguments.shape}, {arguments.dtype}, {arguments.device}: {len(ours)} trials of {size};", end=" ")
        print(f"{len(theirs)} of 18 reference runs were run\n")
        print("| | s, 18 trials | times faster | s, first trial | s, a later one |")
        print("|---|---|---|---|---|")
        for name, times in (("reference", theirs), ("srmu, runs", ours), ("srmu, grid", grid)):
            total = reference_seconds if times is theirs else sum(times)
            later = sum(times[1:]) / max(1, len(times) - 1)
            faster = reference_seconds / total
            print(f"| {name} | {total:.1f} | {faster:.1f} | {times[0]:.2f} | {later:.2f} |")
        print()
        if arguments.commands:
            commands(folder, arguments.steps, arguments.device, arguments.commands)


if __name__ == "__main__":
    main()
