"""The world of authors so small that its model and oracle are trained in seconds."""

import os
import tempfile
from functools import cache
from pathlib import Path

from filelock import FileLock

from srmu.testbed.build import build_testbed
from srmu.testbed.train import Recipe
from srmu.testbed.world import Size

PEOPLE_TINY = Recipe(
    size=Size(hazard_compounds=8, other_compounds=8, entities=8, values=8, general_values=8),
    width=64,
    layers=2,
    heads=2,
    mlp=128,
    steps=300,
    batch=16,
    tokens=96,
    learning_rate=6e-3,
    warmup=20,
    threads=1,
    corpus_documents=40,
    corpus_tokens=48,
    autocast=False,
)


@cache
def people_folder() -> Path:
    """The tiny testbed with its oracle, as `srmu organism --world people --oracle` writes it.

    Workers of one test run share it: the first that asks trains.
    """
    name = os.environ.get("PYTEST_XDIST_TESTRUNUID") or tempfile.mkdtemp()
    folder = Path(tempfile.gettempdir()) / f"people-{Path(name).name}"
    folder.mkdir(exist_ok=True)
    before = os.environ.get("SRMU_CACHE")
    os.environ["SRMU_CACHE"] = str(folder / "cache")
    try:
        with FileLock(folder / "lock"):
            if not (folder / "out").exists():
                build_testbed(folder / "out", oracle=True, world="people", recipe=PEOPLE_TINY)
    finally:
        os.environ.pop("SRMU_CACHE")
        if before is not None:
            os.environ["SRMU_CACHE"] = before
    return folder / "out"
