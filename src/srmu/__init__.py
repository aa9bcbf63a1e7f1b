"""srmu: make a language model unlearn chosen knowledge, and measure how well it did."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from srmu.config import Config, load_config, make_config
    from srmu.errors import Diverged, UserError
    from srmu.evals import evaluate
    from srmu.methods import METHODS
    from srmu.run import Run, unlearn
    from srmu.scoring import score

# Where each public name lives; imported on first use, so that `srmu --help` need not load torch.
_HOME = {
    "Config": "config",
    "Diverged": "errors",
    "METHODS": "methods",
    "Run": "run",
    "UserError": "errors",
    "evaluate": "evals",
    "load_config": "config",
    "make_config": "config",
    "score": "scoring",
    "unlearn": "run",
}

__all__ = [
    "METHODS",
    "Config",
    "Diverged",
    "Run",
    "UserError",
    "evaluate",
    "load_config",
    "make_config",
    "score",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'srmu' has no attribute {name!r}")
    return getattr(import_module(f"srmu.{_HOME[name]}"), name)
