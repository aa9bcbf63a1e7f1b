"""On a GPU: the engine and the paper's grid on the 7B shape, a real model attacked, two devices.

    python benchmarks/gpu.py [--testbed FOLDER]

FOLDER is one that `srmu testbed` made of a real model; without it that part is left out. Without a GPU it says so.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

HERE = Path(__file__).parent
FAILED: list[str] = []
LARGE = ("--device", "cuda", "--shape", "7b", "--dtype", "bfloat16", "--tokens", "512")


def run_step(title: str, *words: str) -> None:
    """Run a command, and print what it prints under a title with its seconds."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, check=False)
    state = "" if done.returncode == 0 else f", failed with {done.returncode}"
    FAILED.extend([title] * (done.returncode != 0))
    print(f"\n## {title} ({time.monotonic() - started:.0f} s{state})\n\n{done.stdout}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device is here: nothing was measured")
        return
    print(f"# {torch.cuda.get_device_name()}, {torch.cuda.device_count()} of them, torch {torch.__version__}")
    run_step("A step, rung by rung", str(HERE / "engine.py"), *LARGE)
    grid = ("--steps", "150", "--references", "1", "--commands", "1")
    run_step("The paper's grid: 18 trials of 150 steps", str(HERE / "sweep.py"), *LARGE, *grid)
    if torch.cuda.device_count() > 1:
        tests = str(HERE.parent / "tests" / "engine" / "test_distributed.py")
        run_step("Two processes equal one", "-m", "pytest", "-q", tests)
    if options.testbed is None:
        print("no --testbed: evaluation and attacks of a real model were left out")
        return
    with TemporaryDirectory() as scratch:
        config = (str(options.testbed / "high.yaml"), "device=cuda", f"runs_dir={scratch}")
        run_step("A real model: 100 steps", "-m", "srmu", "unlearn", *config)
        for run in map(str, Path(scratch).iterdir()):
            run_step("Its evaluation", "-m", "srmu", "eval", run, "--device", "cuda")
            run_step("The smoke attacks on it", "-m", "srmu", "attack", run, "--device", "cuda")


if __name__ == "__main__":
    main()
    sys.exit(f"failed: {', '.join(FAILED)}" if FAILED else 0)
