"""The benchmarks of the paper, each with its authors' metrics, on any model."""

from __future__ import annotations

from srmu.errors import UserError, suggest
from srmu.evals.benchmarks import muse, rwku, tofu, whp, wmdp
from srmu.evals.benchmarks.base import Suite

SUITES: dict[str, Suite] = {
    "tofu": tofu.SUITE,
    "muse": muse.SUITE,
    "rwku": rwku.SUITE,
    "whp": whp.SUITE,
    "wmdp": wmdp.SUITE,
}


def find(name: str) -> tuple[Suite, str]:
    """A suite and its part from `tofu` or `tofu/forget05`; the usual part where none is named."""
    first, _, part = name.partition("/")
    if first not in SUITES:
        raise UserError(f"--suite {name}: there is no such suite{suggest(first, SUITES)}")
    suite = SUITES[first]
    if suite.parts and part and part not in suite.parts:
        raise UserError(f"--suite {name}: {first} has no part {part!r}{suggest(part, suite.parts)}")
    return suite, part or next(iter(suite.parts), "")
