"""Reading and changing what the parts of a model read and put out, while a block of code runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from srmu.engine.loading import find_layers

Edit = Callable[[Tensor], Tensor | None]  # of one tensor; None leaves it as it is


def decoder_blocks(module: PreTrainedModel) -> nn.ModuleList:
    owner, attribute = find_layers(module)
    return getattr(owner, attribute)


@contextmanager
def cut_blocks(module: PreTrainedModel, depth: int) -> Iterator[None]:
    """Run the model with its first `depth` decoder blocks only, under its own norm and head."""
    owner, attribute = find_layers(module)
    whole = getattr(owner, attribute)
    setattr(owner, attribute, whole[:depth])
    try:
        yield
    finally:
        setattr(owner, attribute, whole)


@contextmanager
def hook_outputs(hooks: Mapping[nn.Module, Callable[[Any, Any], Any]]) -> Iterator[None]:
    """Call a function with what each module read (a tuple) and what it put out.

    What the function returns takes the output's place, unless it is None.
    """
    with ExitStack() as stack:
        for module, hook in hooks.items():
            handle = module.register_forward_hook(lambda _, *read, hook=hook: hook(*read))
            stack.callback(handle.remove)
        yield


def edit_outputs(edits: Mapping[nn.Module, Edit]) -> AbstractContextManager[None]:
    """Put each module's output, the first of them where it is a tuple, through a function."""
    return hook_outputs({module: partial(_edit_output, edit) for module, edit in edits.items()})


def _edit_output(edit: Edit, args: Any, output: Any) -> Any:
    value = output[0] if isinstance(output, tuple) else output
    new = edit(value)
    if new is None:
        return None
    new = new.to(value.dtype)
    return (new, *output[1:]) if isinstance(output, tuple) else new


@contextmanager
def edit_input(module: nn.Module, edit: Edit) -> Iterator[None]:
    """Put what a module reads, its first argument, through a function."""

    def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
        value = args[0] if args else kwargs["hidden_states"]
        new = edit(value)
        if new is None:
            return None
        new = new.to(value.dtype)
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
