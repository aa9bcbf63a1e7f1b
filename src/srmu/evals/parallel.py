"""Many runs at once, in as many processes as there are processors."""

from __future__ import annotations

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


def count_cpus() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_all(
    jobs: Sequence[Job], watch: Watch = ignore_progress, *, function: Callable[[Job], Outcome]
) -> list[Outcome]:
    """Do the jobs in as many processes as there are processors; what came of each, in order."""
    workers = min(count_cpus(), len(jobs))
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
        watch("unlearning and measuring", len(jobs)) as tick,
    ):
        futures = [pool.submit(function, job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                tick("")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]
