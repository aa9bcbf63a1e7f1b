"""The benchmarks of the paper, each with its authors' metrics, on any model."""

from pathlib import Path

import yaml

from srmu.errors import SrmuError, suggest_word
from srmu.evals.benchmarks import muse, rwku, tofu, whp, wmdp
from srmu.evals.benchmarks.base import Benchmark, TableColumn

RUNS = {"tofu": tofu.run_tofu, "muse": muse.run_muse, "rwku": rwku.run_rwku, "whp": whp.run_whp, "wmdp": wmdp.run_wmdp}


def read_suites() -> dict[str, Benchmark]:
    """The benchmarks by name, as suites.yaml describes them."""
    suites = yaml.safe_load(Path(__file__).with_name("suites.yaml").read_text(encoding="utf-8"))
    for name, entry in suites.items():
        columns = entry["columns"].items()
        entry["columns"] = [TableColumn(title, f"{name}/{metric}", *rest) for title, (metric, *rest) in columns]
    return {name: Benchmark(run=RUNS[name], **entry) for name, entry in suites.items()}


BENCHMARKS = read_suites()


def find_benchmark(name: str) -> tuple[Benchmark, str]:
    """A suite and its part from `tofu` or `tofu/forget05`; the usual part where none is named."""
    first, _, part = name.partition("/")
    if first not in BENCHMARKS:
        raise SrmuError(f"--tasks {name}: there is no such suite{suggest_word(first, BENCHMARKS)}")
    suite = BENCHMARKS[first]
    if suite.parts and part and part not in suite.parts:
        raise SrmuError(f"--tasks {name}: {first} has no part {part!r}{suggest_word(part, suite.parts)}")
    return suite, part or next(iter(suite.parts), "")
