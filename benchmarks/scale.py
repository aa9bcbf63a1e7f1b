"""What fits where: the dry run on the dimensions of published models, and planned against measured.

    python benchmarks/scale.py                    the table of docs/scale.md
    python benchmarks/scale.py --measure small    runs of few steps, in one process and in two; of a
                                                  shape of shapes.py, or of a folder with high.yaml

Measured is what no file lies behind, of each process, beyond what it held when the run began.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from shapes import SHAPES, watched, write_checkpoint, write_texts

from srmu.cli import main as cli
from srmu.engine.progress import silence_libraries
from srmu.runs import estimate, training
from srmu.runs import plan as plans
from srmu.runs.config import load_config
from srmu.runs.estimate import plan_dry_run

ROOT = Path(__file__).parents[1]
MODELS = ("llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "qwen3-30b-a3b")
METHODS = {"srmu": ["method.name=srmu"], "npo": ["method.name=npo"]}
LORA = 8
# processes, sharded, LoRA; LoRA and `--shard` do not go together
LAUNCHES = {
    "srmu": [(1, False, 0), (2, False, 0), (2, True, 0)],
    "npo": [(1, False, 0), (2, False, 0), (2, True, 0), (1, False, LORA), (2, False, LORA)],
}
STEPS = 3


def table(names: Sequence[str]) -> None:
    """The dry run of each model and method, a row each."""
    print(
        "| model | method | layers | numbers held | trained | GB, 1 device | GB of 8, `--shard` "
        "| GB of 64, `--shard` | TFLOP a step, 1 device | TFLOP of 8, `--shard` |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for name in names:
        for method, options in METHODS.items():
            folder = ROOT / "configs" / "models" / name
            config = load_config(ROOT / "configs" / "scale.yaml", [*options, f"model={folder}"])
            _, found, _ = plan_dry_run(config)
            for lora in sorted({row["lora"] for row in found["ranks"]}):
                print(line(name, method, lora, found), flush=True)


def line(name: str, method: str, lora: int, found: Mapping[str, Any]) -> str:
    rows: dict[tuple[int, bool], Mapping[str, Any]] = {}
    for row in found["ranks"]:  # the first of several is the one that keeps activations
        if row["lora"] == lora:
            rows.setdefault((row["processes"], row["sharded"]), row)
    one, parts = rows[1, False], [rows.get((count, True)) for count in (8, 64)]
    cells = [
        name,
        method + (f", LoRA {lora}" if lora else ""),
        f"{found['layers_loaded']} of {found['layers']}",
        f"{found['dimensions']['held'] / 1e9:.2f}e9",
        "adapters" if lora else f"{found['trained_parameters'] / 1e9:.3f}e9",
        f"{one['memory_per_rank'] / 1e9:.1f}",
        *(f"{part['memory_per_rank'] / 1e9:.1f}" if part else "-" for part in parts),
        f"{one['flops_per_rank_per_step'] / 1e12:.3g}",
        f"{parts[0]['flops_per_rank_per_step'] / 1e12:.3g}" if parts[0] else "-",
    ]
    return "| " + " | ".join(cells) + " |"


def measure(what: str, methods: Sequence[str]) -> None:
    """Runs of few steps in processes of their own, beside what the plan says of each."""
    with TemporaryDirectory() as scratch:
        place = Path(scratch)
        testbed = Path(what) / "high.yaml"
        source = testbed if testbed.exists() else written(place, what)
        print(f"{what}, {STEPS} steps; MB of each process\n")
        print("| method | processes | planned | measured | planned / measured |")
        print("|---|---|---|---|---|")
        for method in methods:
            for launch in LAUNCHES[method]:
                print(measured(place, source, method, launch), flush=True)


def written(place: Path, shape: str) -> Path:
    """The config of a run on a model of random weights and on random texts."""
    write_checkpoint(place / "model", shape, torch.bfloat16)
    sources = {role: str(write_texts(place / f"{role}.jsonl", 16, 128, i))
               for i, role in enumerate(("forget", "retain"))}  # fmt: skip
    tree = {"model": str(place / "model"), "topics": {"all": sources | {"max_length": 128}}}
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    return place / "config.yaml"


def measured(place: Path, source: Path, method: str, launch: tuple[int, bool, int]) -> str:
    processes, sharded, lora = launch
    out = place / f"{method}-{processes}-{sharded}-{lora}"
    out.mkdir()
    options = [*METHODS[method], f"train.max_steps={STEPS}", "device=cpu", f"runs_dir={out}/runs"]
    options += ["train.checkpoint_seconds=.inf", "train.learning_rate=1e-3"]
    options += [f"method.lora_rank={lora}"] if lora else []
    plan = plans.plan_run(load_config(source, options))
    rows = estimate.estimate_launches(plan, plans.load_topics(plan.config, plans.load_tokenizer(plan.base)))
    row = next(r for r in rows if (r["processes"], r["sharded"], r["lora"]) == (processes, sharded, lora))
    # Weights that are mapped from the file are not private.
    planned = row["memory_per_rank"] - (0 if sharded else row["parts"]["weights"])
    words = ["--watch", str(out), "unlearn", str(source), *options, *["--shard"][:sharded]]
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"SRMU_CACHE": str(out / "cache"), "OMP_NUM_THREADS": "1"}
    subprocess.run([*start, __file__, *words], env=environment, check=True, capture_output=True)
    peaks = [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]
    taken = [peak["private"] - peak["before"] for peak in peaks]
    label = method + (f", LoRA {lora}" if lora else "")
    return (
        f"| {label} | {processes}{', --shard' if sharded else ''} | {planned / 1e6:.0f} | "
        f"{', '.join(f'{n / 1e6:.0f}' for n in taken)} | {planned / max(taken):.2f} |"
    )


def watch(out: Path, arguments: list[str]) -> None:
    """The command line in this process, whose memory is looked at."""
    sys.argv = ["srmu", *arguments]
    fresh = training.reset_peak_memory
    with watched() as memory:

        def noted(device: str) -> int:
            found = fresh(device)
            memory.private = 0
            memory.look()
            memory.before = memory.private  # type: ignore[attr-defined]
            return found

        training.reset_peak_memory = noted
        try:
            cli.main()
        finally:
            found = {"before": memory.before, "private": memory.private}  # type: ignore[attr-defined]
            (out / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


def main() -> None:
    silence_libraries()
    if sys.argv[1:2] == ["--watch"]:
        watch(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", help=f"{', '.join(SHAPES)}, or a testbed's folder")
    parser.add_argument("--methods", default=",".join(METHODS), help="which to measure, a,b")
    parser.add_argument("models", nargs="*", default=MODELS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.methods.split(","))
    else:
        table(given.models)


if __name__ == "__main__":
    main()
