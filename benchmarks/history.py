"""Whole commands of this commit beside those of an earlier one, on the same testbed, each in its own cache.

    python benchmarks/history.py COMMIT TESTBED [--limit 60]

TESTBED is a folder that `srmu testbed` made. Of the smoke attacks the seconds of each are told, on the run, on the
original and on its other control together.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]


def run_command(tree: Path, home: Path, *words: str) -> tuple[float, float]:
    """Run `srmu` as a commit has it: seconds, and the most memory in GB that it held."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "SRMU_CACHE": str(home / "cache")}
    started = time.monotonic()
    with (home / "log").open("a") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "srmu", *words], cwd=home, env=environment, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"srmu {' '.join(words)} failed in {tree}:\n{(home / 'log').read_text()[-1000:]}")
    return time.monotonic() - started, usage.ru_maxrss / 1e6


def time_commit(tree: Path, home: Path, testbed: Path, limit: int) -> dict[str, Any]:
    """Seconds, and GB of memory, by what was done."""
    home.mkdir()
    given = (str(testbed / "high.yaml"), "train.max_steps=20", f"runs_dir={home / 'runs'}")
    found: dict[str, Any] = {}
    for _ in range(2):  # the first reads files that the system has not read yet
        found["info methods"] = run_command(tree, home, "info", "methods")
        found["unlearn --dry-run"] = run_command(tree, home, "unlearn", *given, "--dry-run")
    found["unlearn, 20 steps"] = run_command(tree, home, "unlearn", *given)
    (folder,) = (home / "runs").iterdir()
    found["eval"] = run_command(tree, home, "eval", str(folder))
    found["attack"] = run_command(tree, home, "attack", str(folder), "--limit", str(limit))
    attacks = json.loads((folder / "results.json").read_text())["attacks"]["attacks"]
    found |= {f"attack: {name}": (one["seconds"], None) for name, one in attacks.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--limit", type=int, default=60, help="questions of each task and half, for the attacks")
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        other = Path(scratch) / "tree"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(other), options.commit], cwd=ROOT, check=True)
        try:
            places = {"before": other, "after": ROOT}
            found = {
                when: time_commit(tree, Path(scratch) / when, options.testbed.resolve(), options.limit)
                for when, tree in places.items()
            }
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=ROOT, check=True)
    print(f"`before` is commit {options.commit}; {options.limit} questions of each task and half under attack\n")
    print("| | s, before | s, after | times faster | GB, before | GB, after |\n|---|---|---|---|---|---|")
    for name, (seconds, memory) in found["after"].items():
        earlier, held = found["before"].get(name, (None, None))
        cells = [f"{earlier:.1f}" if earlier else "", f"{seconds:.1f}", f"{earlier / seconds:.1f}" if earlier else ""]
        cells += [f"{one:.1f}" if one else "" for one in (held, memory)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
