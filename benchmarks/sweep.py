"""A sweep of 18 trials against 18 runs of the plain restatement of the public loop.

    python benchmarks/sweep.py [--shape small] [--tokens 64] [--steps 6]

Both in this process, loading included. srmu's trials are whole `unlearn` runs with their folders,
importance maps and deltas; the reference trains and writes nothing, and measures no map.
"""

import argparse
import os
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from engine import BATCH, LAYER, reference
from shapes import SHAPES, write_checkpoint, write_texts

from srmu import run as runs
from srmu.config import make_config
from srmu.console import quiet

GRID = {
    "method.coeff": (5, 10, 20),
    "method.alpha": (300, 600, 1200),
    "method.importance": ("ratio", "difference"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scratch", default=None, help="folder for the checkpoint")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    with TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        os.environ["SRMU_CACHE"] = str(folder / "cache")
        dtype = getattr(torch, arguments.dtype)
        model = write_checkpoint(folder / "model", arguments.shape, dtype)
        for number, role in enumerate(("forget", "retain")):
            path = folder / f"{role}.jsonl"
            write_texts(path, BATCH * arguments.steps, arguments.tokens, number)
        ours, theirs = [], []
        for values in product(*GRID.values()):
            overrides = [f"{key}={value}" for key, value in zip(GRID, values, strict=True)]
            config = make_config(
                str(model),
                folder / "forget.jsonl",
                folder / "retain.jsonl",
                overrides=[
                    *overrides,
                    f"method.layer={LAYER}",
                    f"train.max_steps={arguments.steps}",
                    f"runs_dir={folder / 'runs'}",
                    f"device={arguments.device}",
                ],
            )
            start = time.perf_counter()
            runs.unlearn(config)
            ours.append(time.perf_counter() - start)
            topic = runs.load_topics(config, runs.load_tokenizer(model))[0]
            pairs = [
                tuple({k: v.to(arguments.device) for k, v in batch.items()} for batch in pair)
                for pair in zip(topic.forget, topic.retain, strict=True)
            ]
            start = time.perf_counter()
            reference(model, dtype, arguments.device, pairs, "reference")
            theirs.append(time.perf_counter() - start)
    print(
        f"{arguments.shape}, {arguments.dtype}, {arguments.device}: {len(ours)} trials of "
        f"{arguments.steps} steps of {BATCH} x {arguments.tokens} + {BATCH} x {arguments.tokens} "
        f"tokens: reference {sum(theirs):.0f} s, srmu {sum(ours):.1f} s "
        f"({sum(theirs) / sum(ours):.1f} times faster); first trial {theirs[0] / ours[0]:.1f}, "
        f"later ones {sum(theirs[1:]) / sum(ours[1:]):.1f} times"
    )


if __name__ == "__main__":
    main()
