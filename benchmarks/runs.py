"""A whole run on random weights of a real shape: what was planned, and what was measured.

    python benchmarks/runs.py --shape 7b --dtype bfloat16 --tokens 64 --steps 4 --shards 8

Writes the checkpoint one shard at a time, plans, empties the system's cache of its files, runs SRMU
in a process of its own, counts what was read, exports with links, verifies, and deletes it all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from shapes import parse_arguments, watched, write_checkpoint, write_texts

from srmu.engine import weights
from srmu.runs import estimate
from srmu.runs import run as runs
from srmu.runs.config import Config, make_config

LAYER = 7


def config_for(folder: Path, arguments: argparse.Namespace) -> Config:
    given = {
        "method.layer": LAYER,
        "method.coeff": 6.5,
        "topics.topic.max_length": arguments.tokens,
        "train.max_steps": arguments.steps,
        "runs_dir": folder / "runs",
    }
    overrides = [f"{key}={value}" for key, value in given.items()]
    forget, retain = folder / "forget.jsonl", folder / "retain.jsonl"
    return make_config(str(folder / "model"), forget, retain, "srmu", overrides)


def child(folder: Path, arguments: argparse.Namespace) -> None:
    """The plan, or the run itself with its memory and time, in a process that has done nothing."""
    if arguments.plan:
        plan = runs.plan_run(config_for(folder, arguments))
        topics = runs.load_topics(plan.config, runs.load_tokenizer(plan.base))
        print(json.dumps(estimate.estimate_run(plan, topics)))
        return
    start = time.perf_counter()
    with watched() as memory:
        done = runs.unlearn_config(config_for(folder, arguments))
    wall = time.perf_counter() - start
    from_disk = int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])
    answer = {"private": memory.private, "resident": memory.resident, "read": from_disk, "wall": wall}
    print(json.dumps(answer | {"seconds": done.record["seconds"], "run": str(done.folder)}))


def verify(base: Path, out: Path, changed: set[str]) -> None:
    """Only the changed tensors differ between the two checkpoints."""
    for path in sorted(set(weights.list_shards(base).values())):
        if (out / path.name).samefile(path):
            continue
        with safe_open(path, "pt") as old, safe_open(out / path.name, "pt") as new:
            names = list(old.keys())
            differ = {n for n in names if not torch.equal(old.get_tensor(n), new.get_tensor(n))}
        assert differ == changed & set(names), differ ^ (changed & set(names))


def measure(arguments: argparse.Namespace) -> None:
    with TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        os.environ["SRMU_CACHE"] = str(folder / "cache")
        base = write_checkpoint(folder / "model", arguments.shape, getattr(torch, arguments.dtype), arguments.shards)
        for number, role in enumerate(("forget", "retain")):
            write_texts(folder / f"{role}.jsonl", 4 * arguments.batches, arguments.tokens, number)
        command = [sys.executable, __file__, "--child", str(folder)]
        for name in ("shape", "dtype", "tokens", "steps", "batches"):
            command += [f"--{name}", str(getattr(arguments, name))]

        def answer(*more: str) -> dict[str, Any]:
            done = subprocess.run([*command, *more], check=True, capture_output=True, text=True)
            return json.loads(done.stdout.splitlines()[-1])

        planned = answer("--plan")
        files = sorted(set(weights.list_shards(base).values()))
        before = {path: path.stat().st_mtime_ns for path in files}
        rows = []
        for temperature in ("cold", "warm"):  # the files on disk only, then in the system's cache
            for path in files if temperature == "cold" else ():  # make the system forget what it holds of them
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            got = answer()
            if temperature == "cold":
                cold = got
                weights_of = runs.Run.open(got["run"])
                delta = (weights_of.folder / runs.DELTA).stat().st_size
                start = time.perf_counter()
                out = weights_of.export(folder / "out", link=True)
                exported = time.perf_counter() - start
                verify(base, out, set(weights_of.delta))
                exported_files = {path: base / path.name for path in out.rglob("*") if path.is_file()}
                shared = [new for new, old in exported_files.items() if old.exists() and new.samefile(old)]
                own = sum(path.stat().st_size for path in exported_files if path not in shared)
                for path in weights_of.folder.iterdir():
                    path.unlink()
                subprocess.run(["rm", "-rf", str(folder / "cache")], check=True)
            rows.append(got)
        total = sum(path.stat().st_size for path in files)
        assert before == {path: path.stat().st_mtime_ns for path in files}
        warm = rows[-1]
        size = f"4 x {arguments.tokens} + 4 x {arguments.tokens} tokens, {arguments.steps} steps"
        size += f" on {arguments.batches} + {arguments.batches} batches, {arguments.shards} shards"
        print(f"{arguments.shape}, {arguments.dtype}, {size}, {total / 1e9:.2f} GB\n")
        print("| | planned | measured | planned / measured |")
        print("|---|---|---|---|")
        for name, a, b in (
            ("private memory, GB", planned["memory_private"] / 1e9, warm["private"] / 1e9),
            ("with mapped files, GB", planned["memory_peak"] / 1e9, warm["resident"] / 1e9),
            ("seconds of training (files in memory)", planned["seconds"], warm["seconds"]),
        ):
            print(f"| {name} | {a:.3g} | {b:.3g} | {a / b:.2f} |")
        print()
        print(f"{planned['bytes_read'] / 1e9:.2f} GB are to be loaded; read from the disk, with all", end=" ")
        print(f"that the record has digests of: {cold['read'] / 1e9:.2f} GB; run with files on disk", end=" ")
        print(
            f"only: {cold['wall']:.0f} s\ndelta {delta / 1e9:.3f} GB, {delta / total:.1%} of the checkpoint;", end=" "
        )
        print(f"export wrote {own / 1e9:.2f} GB, {own / total:.1%}, in {exported:.0f} s; verified:", end=" ")
        print(f"{len(weights_of.record['changed'])} tensors differ and no other, the source is as it was\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--child", type=Path)
    parser.add_argument("--plan", action="store_true")
    arguments = parse_arguments(parser, "pico", 64, 6)
    child(arguments.child, arguments) if arguments.child else measure(arguments)


if __name__ == "__main__":
    main()
