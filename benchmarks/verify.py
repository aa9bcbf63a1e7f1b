"""What it takes to verify a large export: seconds, bytes a second and memory.

    python benchmarks/verify.py [--gigabytes 14] [--shards 8] [--scratch .]

Writes a sparse checkpoint of that size (zeros that take no room on disk), a record of an export of
it with three changed tensors, and runs `srmu verify` on it in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from srmu.engine import weights
from srmu.runs import record as audit

ROWS = 4096


def sparse(path: Path, names: list[str], rows: int) -> None:
    """A safetensors file of zeros without blocks on disk."""
    size = 2 * ROWS * rows
    entries = {
        name: {"dtype": "BF16", "shape": [rows, ROWS], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    head = json.dumps(entries).encode()
    head = head.ljust(-(-len(head) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + size * len(names))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=14.0)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--scratch", default=None)
    arguments = parser.parse_args()
    with TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch) / "export"
        folder.mkdir()
        tensors = 36  # of each shard
        rows = round(arguments.gigabytes * 1e9 / (arguments.shards * tensors * 2 * ROWS))
        index = {}
        for shard in range(arguments.shards):
            name = f"model-{shard}.safetensors"
            inside = [f"model.layers.{shard}.{i}.weight" for i in range(tensors)]
            sparse(folder / name, inside, rows)
            index |= dict.fromkeys(inside, name)
        (folder / weights.INDEX).write_text(json.dumps({"weight_map": index}))
        (folder / "config.json").write_text("{}")
        files = {name: audit.digest_file(folder / name) for name in weights.list_carried(folder)}
        total = sum(file["bytes"] for file in files.values())
        empty = {"documents": 0, "too_short": 0, "bad_rows": 0, "tokens": 0, "digest": ""}
        zeros = files["model-0.safetensors"]["tensors"]
        change = {
            name: {
                "shape": [rows, ROWS], "dtype": "bfloat16", "before": "", "after": digest,
                "relative_norm": 0.0, "share_changed": 0.0,
            }
            for name, digest in [*zeros.items()][:3]
        }  # fmt: skip
        record = {
            "schema_version": audit.SCHEMA, "id": "bench", "tool": audit.describe_tool(),
            "started": "", "finished": "", "purpose": {}, "method": "srmu", "paper": "",
            "model": "bench", "data": {"t": {"forget": empty, "retain": empty}}, "overlap": {},
            "base": {
                "id": "bench", "revision": None, "licence": None, "dtype": "bfloat16",
                "tokenizer": "", "files": files,
            },
            "topics": {}, "seconds": 0, "steps": 0, "resumed_at": 0, "checkpoint_failed": "",
            "stop_reason": "", "diverged": False, "weights": "fp32", "flops": None,
            "memory": {"before": 0, "peak": 0}, "activations": {}, "changed": [*change],
            "change": {"tensors": change, "others": len(index) - 3, "others_identical": True},
            "environment": audit.describe_environment(), "limits": [], "files": {},
            "reproduction": {"command": "", "config": {}, "expected": {}},
        }  # fmt: skip
        (folder / weights.EXPORTED).write_text(json.dumps(audit.seal_record(record)))
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "srmu", "verify", str(folder)], check=True)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print()
    print("| GB | s | GB a second | peak resident memory, MB |")
    print("|---|---|---|---|")
    print(f"| {total / 1e9:.1f} | {seconds:.1f} | {total / 1e9 / seconds:.2f} | {peak / 1e6:.0f} |")


if __name__ == "__main__":
    main()
