"""Open what a command names: a model, or a run with the model that it changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from srmu.engine import weights
from srmu.engine.loading import load_module, read_config
from srmu.runs.plan import find_device, load_tokenizer
from srmu.runs.run import Run, find_run


@dataclass(frozen=True)
class OpenedModel:
    """A model, or a run with its model; weights are read when they are first asked for."""

    base: Path  # the model's folder
    run: Run | None = None
    device: str = "auto"

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base)

    @cached_property
    def module(self) -> PreTrainedModel:
        """The model as it was before the run, ready to answer."""
        return load_module(self.base).eval().to(find_device(self.device))

    @contextmanager
    def after(self) -> Iterator[PreTrainedModel]:
        """The model as the run leaves it; unchanged where there is no run.

        The changed tensors stay in the module: ask the original first.
        """
        if self.run is None:
            yield self.module
            return
        write = partial(weights.apply_delta, self.module, self.base, self.run.delta)
        with self.run.config.method.at_inference(self.module, write):
            yield self.module


def open_target(target: str | Path | Run, device: str = "auto") -> OpenedModel:
    """A model folder, a hub id, a run or a run's folder.

    SrmuError for a folder that is neither, and for a run that is unfinished or damaged.
    """
    run = target if isinstance(target, Run) else find_run(target)
    base = run.base if run else weights.locate_model(str(target))
    read_config(base)
    weights.list_shards(base)
    return OpenedModel(base, run, device)
