"""srmu: make a language model unlearn chosen knowledge, and measure how well it did."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from srmu.errors import DivergedError, SrmuError
    from srmu.evals.lm_eval import evaluate
    from srmu.evals.score import score_model
    from srmu.methods import METHODS
    from srmu.runs.config import Config, load_config, make_config
    from srmu.runs.run import Run, unlearn

# Where each public name lives; imported on first use, so that `srmu --help` need not load torch.
_HOME = {
    "Config": "runs.config",
    "DivergedError": "errors",
    "METHODS": "methods",
    "Run": "runs.run",
    "SrmuError": "errors",
    "evaluate": "evals.lm_eval",
    "load_config": "runs.config",
    "make_config": "runs.config",
    "score_model": "evals.score",
    "unlearn": "runs.run",
}

__all__ = [
    "METHODS",
    "Config",
    "DivergedError",
    "Run",
    "SrmuError",
    "evaluate",
    "load_config",
    "make_config",
    "score_model",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'srmu' has no attribute {name!r}")
    return getattr(import_module(f"srmu.{_HOME[name]}"), name)
