"""Counting what a step does, and timing what this machine can do.

The model is built without memory behind its tensors, and the very code that will run is run on it
under a meter: so the numbers hold for any architecture.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, LlamaConfig

from srmu.engine.activation_cache import Activations
from srmu.engine.losses import mean_nll, token_mse
from srmu.engine.model import Batch, EditableModel, Site
from srmu.engine.topic import Topic
from srmu.engine.train import TrainOptions, fit_model
from srmu.errors import SrmuError, first_line
from srmu.methods import RMU
from srmu.runs.config import Config

PROBE_SECONDS = 2.0
EVERYTHING = 1 << 62  # bytes
FAR = 32 << 20  # bytes of an operation's tensors that no processor's cache holds
FRESH = 24 << 20  # bytes from which on the C library asks the system (model.return_freed_blocks)


class Meter(TorchDispatchMode):
    """Counts the operations that run in its block: FLOPs, bytes moved by the others, memory."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.near = self.far = self.fresh = self.operations = 0
        self.held = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        packet = func._overloadpacket
        aliases = [value.alias_info for value in func._schema.returns]
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet is torch.ops.aten._grouped_mm:  # experts; torch has no count for it
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        elif not any(alias is not None and not alias.is_write for alias in aliases):  # no view
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            moved = sum(x.numel() * x.element_size() for x in tensors)
            if moved > FAR:
                self.far += moved
            else:
                self.near += moved
        if not any(aliases):
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.fresh += size if size >= FRESH else 0
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.held -= size


@dataclass
class Work:
    """FLOPs, bytes moved and operations of a piece of work, and seconds from a machine's speeds.

    Bytes are `near` where an operation's tensors fit into the processor's cache, else `far`; those
    of a large new tensor are `fresh`, too: the system has to find the memory.
    """

    flops: float = 0
    near: float = 0
    far: float = 0
    fresh: float = 0
    operations: float = 0

    def __add__(self, other: Work) -> Work:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Work(*(a + b for a, b in pairs))

    def __mul__(self, times: float) -> Work:
        return Work(*(value * times for value in vars(self).values()))

    def seconds(self, speeds: Work) -> float:
        pairs = zip(vars(self).values(), vars(speeds).values(), strict=True)
        return sum(amount / speed for amount, speed in pairs)


def blank_batch(shape: tuple[int, int], device: torch.device, whole: bool = True) -> Batch:
    """A batch of zeros. A `whole` mask, over pairs of tokens, is taken as it is by most models."""
    rows, tokens = shape
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
    size = (rows, 1, tokens, tokens) if whole else (rows, tokens)
    mask = torch.ones(size, dtype=torch.bool if whole else torch.long, device=device)
    return Batch(input_ids=ids, attention_mask=mask, labels=ids)


def takes_whole_masks(model: EditableModel, site: Site | None) -> bool:
    """Whether a model without memory runs on a mask over pairs of tokens, or on a plain one."""
    for whole in (True, False):
        model.activations = Activations()
        try:
            with model.using({}):
                site_output(model, blank_batch((2, 3), model.device, whole), site)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
            reason = error
        else:
            return whole
    raise SrmuError(
        f"{type(model.module).__name__} cannot be counted without its weights "
        f"({first_line(reason)}); the run itself may work"
    )


def site_output(model: EditableModel, batch: Batch, site: Site | None) -> Tensor:
    return model.hidden(batch, site) if site is not None else model.logits(batch)


def frozen_pass(model: EditableModel, batch: Batch, site: Site | None) -> tuple[Work, Work]:
    """The work of the original model's pass: of the fixed layers, and of those above them."""
    with model.using({}):
        model.activations = Activations(EVERYTHING)
        whole, above = (
            work_of(run_metered(lambda: site_output(model, batch, site))) for _ in range(2)
        )
    return whole + above * -1, above


def make_stepper(
    model: EditableModel, batches: Sequence[Batch], site: Site | None, kind: str
) -> Callable[[], None]:
    """A function that does a step, where the fixed layers' activations are there."""
    model.activations = Activations(EVERYTHING)
    with model.using({}):
        for batch in batches:
            site_output(model, batch, site)
    values = list(model.trained.values())
    own = [kind == "bf16" or value.dtype == torch.float32 for value in values]
    masters = [
        value if is_own else torch.nn.Parameter(value.detach().float())
        for value, is_own in zip(values, own, strict=True)
    ]
    optimiser = torch.optim.AdamW(masters)

    def step() -> None:
        losses = []
        for batch in batches:
            hidden = site_output(model, batch, site)
            if site is None:
                losses.append(mean_nll(hidden, batch["labels"]).value)
                continue
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            losses.append(token_mse(hidden, hidden.new_zeros(hidden.shape[-1]), mask).value)
        torch.stack(losses).sum().backward()
        del losses, hidden
        for master, value in zip(masters, values, strict=True):
            if master is not value and value.grad is not None:
                master.grad, value.grad = value.grad.float(), None
        optimiser.step()
        optimiser.zero_grad()

    step()  # makes the optimiser's moments, which are counted apart
    return step


def standing_bytes(config: Config, trained: int, size: int, mapped: bool) -> dict[str, int]:
    """Bytes held from the first step to the last, for `trained` numbers of `size` bytes each.

    Originals that are mapped from the checkpoint take none; a strengthened teacher is one copy.
    """
    masters = 4 * trained if size == 2 and config.train.weights == "fp32" else 0
    copies = (2 if mapped else 3) + hasattr(config.method, "teacher_steps")
    return {
        "trained_copies": copies * trained * size,
        "masters": masters,
        "optimiser": 2 * trained * (4 if masters or size == 4 else size),
    }


def free_bytes(device: str) -> int:
    """Memory of the device that nothing holds."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def run_metered(action: Callable[[], object]) -> Meter:
    with Meter() as meter:
        action()
    return meter


def work_of(meter: Meter) -> Work:
    return Work(meter.flops, meter.near, meter.far, meter.fresh, meter.operations)


def probe_machine(
    dtype: torch.dtype, device: str, shapes: Sequence[tuple[int, int]], width: int
) -> Work:
    """This machine's FLOPs, bytes and small operations a second, in about two seconds.

    The last is measured in steps of a narrow model on batches of the run's own shapes: it holds
    what Python, the loop and attention over few features take beside the large products.
    """
    rows = max(16, min(prod(shapes[0]), 4096))
    a = torch.randn(rows, width, device=device).to(dtype)
    b = torch.randn(4 * width, width, device=device).to(dtype)
    small = torch.randn(FAR // 128, device=device)
    large = torch.randn(FAR // 2, device=device)
    flops = 2 * rows * width * 4 * width / time_action(lambda: a @ b.T, 0.4)
    near = 12 * small.numel() / time_action(lambda: small * small, 0.1)
    place = torch.empty_like(large)
    far = 12 * large.numel() / time_action(lambda: torch.mul(large, large, out=place), 0.2)
    fresh = 4 * large.numel() / time_action(lambda: torch.zeros_like(large).fill_(1), 0.1)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1,
        vocab_size=16,
    )  # fmt: skip
    tiny = AutoModelForCausalLM.from_config(config).to(device)
    rmu = RMU(layer=1, window=2, coeff=1.0)
    model = EditableModel(tiny, rmu.trainable, rmu.depth)
    both = [blank_batch((rows, min(n, 128)), model.device, False) for rows, n in shapes]
    forget, retain = both[0], both[-1]
    operations = run_metered(make_stepper(model, [forget, retain], rmu.site, "fp32")).operations
    state = rmu.setup(model, topic := Topic("probe", [forget], [retain]))
    loss, options = partial(rmu.loss, model, state), rmu.training(TrainOptions(max_steps=1))

    def step() -> None:
        fit_model(model, [(topic, loss)], options, lambda step, values: None)

    return Work(flops, near, far, fresh, operations / time_action(step, 0.3))


def time_action(action: Any, share: float) -> float:
    """Median seconds of an action, repeated for a share of the probe's time."""
    times: list[float] = []
    end = time.perf_counter() + share * PROBE_SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        if isinstance(out := action(), Tensor):
            out.reshape(-1)[0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
