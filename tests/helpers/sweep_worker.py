"""A worker of a study: `python sweep_worker.py STORAGE FOLDER`, in a process of its own.

It writes FOLDER/started-POINT-PID at each trial, and stays in it while FOLDER/hold is there.
"""

import os
import sys
import time
from pathlib import Path

import optuna

from srmu.engine.progress import ignore_progress
from srmu.search import queue
from srmu.search.queue import Study, open_study, work_queue

POINTS = 5


def join(storage: str) -> Study:
    return open_study(
        storage if "://" in storage else Path(storage),
        "shared",
        spec={"points": POINTS},
        directions=["minimize"],
        sampler=optuna.samplers.RandomSampler(),
        queue=[{"x": float(i)} for i in range(POINTS)],
    )


def objective(folder: Path, trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0, POINTS)
    (folder / f"started-{x:.0f}-{os.getpid()}").touch()
    while (folder / "hold").exists():
        time.sleep(0.05)
    return x * x


if __name__ == "__main__":
    queue.HEARTBEAT = queue.LOCAL_HEARTBEAT = 1
    work_queue(join(sys.argv[1]), lambda trial: objective(Path(sys.argv[2]), trial), ignore_progress)
