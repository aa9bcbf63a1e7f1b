"""srmu: make a language model unlearn chosen knowledge, and measure how well it did.

    import srmu

    model, result = srmu.unlearn(model, tokenizer, forget=texts, retain=texts, method=srmu.RMU())
    run = srmu.unlearn(srmu.load_config("config.yaml"))

Unlearn:  `unlearn` changes a model in memory, or makes the `Run` of a `Config`, which `load_config`
          reads from a file and `make_config` makes from a model and texts.
Measure:  `evaluate` asks questions, `attack` tries to bring the knowledge back, `compare` holds runs
          against each other.
Methods:  SRMU, RMU, AdaptiveRMU, NPO, ...: `srmu.METHOD(option=value)`; their fields are their options.
          One's own is a subclass of `Objective`, which has a loss, or of `Edit`, which writes weights
          once; it works on a `Topic` with an `EditableModel`.
Errors:   `SrmuError`, one line that says what to do; `DivergedError`.

`help(srmu.unlearn)` and so on say more.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from srmu.attacks.suite import attack_run as attack
    from srmu.engine.model import EditableModel, Site
    from srmu.engine.topic import Topic
    from srmu.errors import DivergedError, SrmuError
    from srmu.evals.compare import compare_runs as compare
    from srmu.evals.score import score_model as evaluate
    from srmu.methods import (
        CEU,
        DEPN,
        FLAT,
        GA,
        LLMU,
        NPO,
        PDU,
        RKLU,
        RMU,
        RMULAT,
        RNA,
        SCRUB,
        SRMU,
        SSD,
        TAR,
        UNDIAL,
        WGA,
        WHP,
        AdaptiveRMU,
        AltPO,
        Edit,
        GradDiff,
        Iterated,
        Method,
        MultiSite,
        Objective,
        Quark,
        Refusal,
        RenameScrub,
        RepSelect,
        Retrain,
        SatImp,
        SimNPO,
        TaskArithmetic,
        Undo,
    )  # fmt: skip
    from srmu.methods.base import State
    from srmu.runs.config import Config, load_config, make_config
    from srmu.runs.in_memory import unlearn
    from srmu.runs.run import Run

__all__ = [
    "CEU", "DEPN", "FLAT", "GA", "LLMU", "NPO", "PDU", "RKLU", "RMU", "RMULAT", "RNA", "SCRUB", "SRMU", "SSD", "TAR",
    "UNDIAL", "WGA", "WHP", "AdaptiveRMU", "AltPO", "Config", "DivergedError", "Edit", "EditableModel", "GradDiff",
    "Iterated", "Method", "MultiSite", "Objective", "Quark", "Refusal", "RenameScrub", "RepSelect", "Retrain",
    "Run", "SatImp", "SimNPO", "Site", "SrmuError", "State", "TaskArithmetic", "Topic", "Undo", "attack",
    "compare", "evaluate", "load_config", "make_config", "unlearn",
]  # fmt: skip

# Where a public name lives that is no method; imported on first use: `srmu --help` needs no torch.
_HOME = {
    "Config": "runs.config",
    "DivergedError": "errors",
    "EditableModel": "engine.model",
    "Run": "runs.run",
    "Site": "engine.model",
    "SrmuError": "errors",
    "State": "methods.base",
    "Topic": "engine.topic",
    "attack": "attacks.suite:attack_run",
    "compare": "evals.compare:compare_runs",
    "evaluate": "evals.score:score_model",
    "load_config": "runs.config",
    "make_config": "runs.config",
    "unlearn": "runs.in_memory",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'srmu' has no attribute {name!r}")
    module, _, attribute = _HOME.get(name, "methods").partition(":")
    return getattr(import_module(f"srmu.{module}"), attribute or name)


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__version__"]
