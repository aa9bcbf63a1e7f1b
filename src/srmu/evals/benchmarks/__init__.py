"""The benchmarks of the paper, each with its authors' metrics, on any model."""

from srmu.errors import SrmuError, suggest_word
from srmu.evals.benchmarks import muse, rwku, tofu, whp, wmdp
from srmu.evals.benchmarks.base import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    "tofu": tofu.SUITE,
    "muse": muse.SUITE,
    "rwku": rwku.SUITE,
    "whp": whp.SUITE,
    "wmdp": wmdp.SUITE,
}


def find_benchmark(name: str) -> tuple[Benchmark, str]:
    """A suite and its part from `tofu` or `tofu/forget05`; the usual part where none is named."""
    first, _, part = name.partition("/")
    if first not in BENCHMARKS:
        raise SrmuError(f"--tasks {name}: there is no such suite{suggest_word(first, BENCHMARKS)}")
    suite = BENCHMARKS[first]
    if suite.parts and part and part not in suite.parts:
        raise SrmuError(f"--tasks {name}: {first} has no part {part!r}{suggest_word(part, suite.parts)}")
    return suite, part or next(iter(suite.parts), "")
