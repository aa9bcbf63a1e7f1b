"""Many runs at once, in as many processes as there are processors."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, TypeVar

from srmu.engine.progress import Watch, ignore_progress

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


class RunJob(NamedTuple):
    """A config file with overrides, and the tasks to score instead of the config's own."""

    config: Path
    overrides: tuple[str, ...]
    tasks: tuple[str, ...] = ()


def run_all(
    jobs: Sequence[Job], watch: Watch = ignore_progress, *, function: Callable[[Job], Outcome]
) -> list[Outcome]:
    """Do the jobs in as many processes as there are processors; what came of each, in order."""
    # on Linux, those that this process may use
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with (
        ProcessPoolExecutor(min(cpus, len(jobs)), multiprocessing.get_context("spawn")) as pool,
        watch("unlearning and measuring", len(jobs)) as tick,
    ):
        futures = [pool.submit(function, job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                tick("")
        finally:
            pool.shutdown(cancel_futures=True)
        return [future.result() for future in futures]
