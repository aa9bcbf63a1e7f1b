"""Reading and changing what the parts of a model read and put out, while a block of code runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from srmu.engine.loading import find_layers

Edit = Callable[[Tensor], Tensor | None]  # of one tensor; None leaves it as it is


def decoder_blocks(module: PreTrainedModel) -> nn.ModuleList:
    return getattr(*find_layers(module))


@contextmanager
def swap_blocks(place: tuple[nn.Module, str], blocks: nn.ModuleList) -> Iterator[None]:
    """Run a model with other decoder blocks in the place that `find_layers` names."""
    whole = getattr(*place)
    setattr(*place, blocks)
    try:
        yield
    finally:
        setattr(*place, whole)


def cut_blocks(module: PreTrainedModel, depth: int) -> AbstractContextManager[None]:
    """Run the model with its first `depth` decoder blocks only, under its own norm and head."""
    return swap_blocks(find_layers(module), decoder_blocks(module)[:depth])


@contextmanager
def hook_outputs(hooks: Mapping[nn.Module, Callable[[Any, Any], Any]]) -> Iterator[None]:
    """Call a function with what each module read and what it put out, which its result replaces unless it is None."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.enter_context(module.register_forward_hook(lambda _, *read, hook=hook: hook(*read)))
        yield


def edit_outputs(edits: Mapping[nn.Module, Edit]) -> AbstractContextManager[None]:
    """Put each module's output, the first of them where it is a tuple, through a function."""

    def hook(edit: Edit, args: Any, output: Any) -> Any:
        value, *others = output if isinstance(output, tuple) else (output,)
        new = edit(value)
        if new is None:
            return None
        return (new.to(value.dtype), *others) if isinstance(output, tuple) else new.to(value.dtype)

    return hook_outputs({module: partial(hook, edit) for module, edit in edits.items()})


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

    with module.register_forward_pre_hook(hook, with_kwargs=True):
        yield
