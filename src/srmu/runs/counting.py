"""What a step computes, counted on tensors without memory, and what each process holds; speed and memory here."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any
from unittest.mock import patch

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from srmu.engine.activation_cache import Activations
from srmu.engine.loading import cut_config
from srmu.engine.losses import Mean, mean_nll, token_mse
from srmu.engine.model import Batch, EditableModel, Site
from srmu.engine.text_part import choose_class
from srmu.engine.topic import Topic
from srmu.engine.train import Terms, TrainOptions, fit_model
from srmu.errors import SrmuError, first_line

Shape = tuple[int, int]  # rows and tokens of a batch
PROBE_STEPS = 5
PROBE_TOKENS = 256  # of each batch, at the most
PROBE_VOCABULARY = 8192  # at the most: a head of 128,000 tokens takes gigabytes
EVERYTHING = 1 << 62  # bytes
DEVICES = (24, 48, 80, 141)  # GB of the common GPUs
PROCESSES = (1, 2, 4, 8)
MORE = (16, 64)  # where a part of 8 is more than `LARGE` holds
LARGE = 80e9
STANDING = ("originals", "last_good", "masters", "moments")  # held from the first step to the last
KEPT_PIECES = 4  # on the CPU: what stays with a process of pieces it gathered and freed, measured
KEPT_ACTIVATIONS = 1.35  # on the CPU: heap of the C library over the activations in it, measured


def count_flops(action: Callable[[], object]) -> int:
    """FLOPs of what an action computes, by torch's own counter."""
    experts = {getattr(torch.ops.aten, "_grouped_mm", None): grouped_flops}  # unknown to torch 2.6
    with FlopCounterMode(display=False, custom_mapping=experts) as counter:
        action()
    return counter.get_total_flops()


def grouped_flops(first: tuple[int, ...], other: tuple[int, ...], *_: Any, **__: Any) -> int:
    """FLOPs of the products of experts, which torch's counter leaves out."""
    return 2 * prod(first) * other[-1]


def blank_batch(shape: Shape, device: torch.device, whole: bool = True) -> Batch:
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


# before 5.4, transformers asks for the autocast of tensors without memory, which torch does not know
@patch.object(torch, "is_autocast_enabled", lambda *_: False)
def site_output(model: EditableModel, batch: Batch, site: Site | None) -> Tensor:
    """Activations at the site, or logits where there is none."""
    return model.hidden(batch, site) if site is not None else model.logits(batch)


def count_frozen_pass(model: EditableModel, batch: Batch, site: Site | None) -> tuple[int, int]:
    """FLOPs of the original model's pass: of the fixed layers, and of those above them."""
    with model.using({}):
        model.activations = Activations(EVERYTHING)
        whole, above = (count_flops(lambda: site_output(model, batch, site)) for _ in range(2))
    return whole - above, above


def step_losses(model: EditableModel, batches: list[Batch], site: Site | None) -> Tensor:
    """The losses of a step: of activations to a target, or of next tokens."""
    losses = []
    for batch in batches:
        output = site_output(model, batch, site)
        if site is None:
            losses.append(mean_nll(output, batch["labels"]))
            continue
        mask = torch.ones(output.shape[:2], dtype=torch.bool, device=output.device)
        losses.append(token_mse(output, output.new_zeros(output.shape[-1]), mask))
    return torch.stack([loss.value for loss in losses]).sum()


def count_step(model: EditableModel, batches: list[Batch], site: Site | None) -> tuple[int, int]:
    """FLOPs of a step whose fixed layers are cached, and the bytes it leaves for its gradient.

    The bytes are those that autograd saves, beside the model's own tensors, and two copies of the
    last output in float32: its gradient, and that of the loss before it.
    """
    model.activations = Activations(EVERYTHING)
    with model.using({}):
        outputs = [site_output(model, batch, site) for batch in batches]
    tensors = (*model.module.parameters(), *model.module.buffers())
    own = {tensor.untyped_storage()._cdata for tensor in tensors}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no other takes its number

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    def step() -> None:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = step_losses(model, batches, site)
        loss.backward()

    flops = count_flops(step)
    for value in model.trained.values():
        value.grad = None
    ends = 2 * 4 * max(output.numel() for output in outputs)
    return flops, sum(storage.nbytes() for storage in saved.values()) + ends


def measure_speed(settings: Any, dtype: torch.dtype, device: str, site: Site | None, shapes: list[Shape]) -> float:
    """FLOPs a second that steps of one real layer reach here, the training loop included.

    The layer has the model's own width and kind, and the run's batch size. Where it cannot be built
    alone, a product of matrices is timed instead.
    """
    short = cut_config(settings, 1)
    if short is None:
        return measure_product(settings.get_text_config().hidden_size, dtype, device)
    short.vocab_size = min(short.vocab_size, PROBE_VOCABULARY)
    short.pad_token_id = None
    module = choose_class(short).from_config(short, dtype=dtype).to(device)
    model = EditableModel(module, ["0.mlp_down" if site else "*"], 1 if site else None)
    model.check_causal()
    place = Site(0) if site else None
    batches = [
        blank_batch((rows, max(2, min(tokens, PROBE_TOKENS // rows))), model.device, False) for rows, tokens in shapes
    ]
    times: list[float] = []

    def loss(forget: Batch, retain: Batch, step: int) -> Terms:
        loss = step_losses(model, batches, place)
        return Terms({"forget": Mean(loss, torch.ones((), dtype=torch.long, device=loss.device))}, {})

    topic = Topic("probe", batches, batches, vocabulary=torch.arange(short.vocab_size))
    options = TrainOptions(learning_rate=1e-6, max_steps=PROBE_STEPS, retain_spike=None)
    fit_model(model, [(topic, loss)], options, lambda *_: times.append(time.perf_counter()))
    flops, _ = count_step(model, batches, place)
    seconds = sorted(after - before for before, after in pairwise(times))
    return flops / seconds[len(seconds) // 2]


def measure_product(width: int, dtype: torch.dtype, device: str) -> float:
    """FLOPs a second of a product of matrices of this width."""
    first = torch.randn(PROBE_TOKENS, width, device=device).to(dtype)
    other = torch.randn(4 * width, width, device=device).to(dtype)
    waits = "(first @ other.T)[0, 0].item()"  # for the device
    timer = Timer(waits, globals={"first": first, "other": other}, num_threads=torch.get_num_threads())
    return 2 * PROBE_TOKENS * 4 * width * width / timer.timeit(PROBE_STEPS).mean


@dataclass(frozen=True)
class TensorSizes:
    """How many numbers a model has, by the pieces in which `--shard` cuts it."""

    layers: tuple[int, ...]
    ends: tuple[int, ...]  # embeddings and head, where they are apart: cut as the layers are
    rest: int  # the last norm, tied ends: whole in each process

    def part(self, processes: int) -> int:
        return -(-(sum(self.layers) + sum(self.ends)) // processes) + self.rest


@dataclass(frozen=True)
class StepVariant:
    """A way to hold a model and to make a step, measured on a whole batch in one process."""

    size: TensorSizes  # of the model
    trained: TensorSizes  # with adapters: what they stand beside
    itemsize: int  # bytes of a number
    mixed: bool  # float32 masters of smaller numbers are trained
    gpu: bool
    lora: int = 0  # the rank of adapters; 0: the tensors themselves are trained
    adapters: int = 0  # numbers of theirs
    activations: int = 0  # bytes that a pass leaves for its gradient
    flops: int = 0
    caching: bool = False
    cache: int = 0  # bytes of activations kept from step to step
    sharded: bool = False
    offloaded: tuple[int, ...] = ()  # numbers of the layers left on the disk, which come one by one


def held_bytes(way: StepVariant, processes: int, share: float) -> dict[str, int]:
    """Bytes that each of `processes` holds, by purpose, where each reads `share` of a batch."""
    size, itemsize, gpu = way.size, way.itemsize, way.gpu
    cut = processes if way.sharded else 1
    beside = way.trained.part(cut)
    # adapters are float32 themselves
    trained, each = (way.adapters, 4) if way.lora else (beside, itemsize)
    mixed = way.mixed and not way.lora
    exact = 4 if mixed else each
    # While a piece runs it is there whole, beside what arrives of it; then its gradient is, and is
    # summed in float32.
    gathered, largest = 0, max(*way.trained.layers, *way.trained.ends, 0)
    if way.sharded:
        gathered = itemsize * (2 * max(*size.layers, *size.ends) + largest) + 4 * largest
        if not gpu:  # gloo sums in a copy of its own
            gathered += 4 * largest + KEPT_PIECES * itemsize * max(*size.layers, *size.ends)
    activations = way.activations * share * (1 if gpu else KEPT_ACTIVATIONS)
    backward = gathered + max(activations, trained * each)
    # On a GPU AdamW works on all tensors at once, and makes one more copy of them. On the CPU it
    # takes one by one, and the C library keeps what a pass has freed: gradients come beside it.
    update = exact * (2 * trained if gpu else trained + (0 if way.lora else largest // cut))
    step = max(backward, update) if gpu else backward + update
    there = size.part(cut) - sum(way.offloaded) + max(way.offloaded, default=0)
    return {
        "weights": there * itemsize,
        "originals": beside * itemsize,
        "last_good": trained * each,
        "masters": trained * 4 if mixed else 0,
        "moments": 2 * trained * exact,
        "step": round(step),
        "cache": round(way.cache * share),
    }


def plan_launches(ways: list[StepVariant], rows: int, spreads: bool) -> list[dict[str, Any]]:
    """What each process holds and computes: by their number, for each way to make a step.

    A batch has `rows` texts; without `spreads` the method runs in one process only.
    """
    launches: list[dict[str, Any]] = []
    for processes in (*PROCESSES, *MORE) if spreads else (1,):
        last = [row["memory_per_rank"] for row in launches if row["processes"] == PROCESSES[-1]]
        if processes in MORE and min(last) <= LARGE:
            break
        share = -(-rows // processes) / rows
        for way in ways:
            if way.sharded if processes == 1 else way.offloaded:
                continue
            parts = held_bytes(way, processes, share)
            memory = sum(parts.values())
            launches.append(
                {
                    "processes": processes,
                    "sharded": way.sharded,
                    "caching": way.caching,
                    "lora": way.lora,
                    "offloaded": bool(way.offloaded),
                    "memory_per_rank": memory,
                    "device_gb": next((n for n in DEVICES if memory <= n * 1e9), None),
                    "flops_per_rank_per_step": round(way.flops * share),
                    "parts": parts,
                }
            )
    return launches


def private_bytes() -> int:
    """The memory of this process that no file lies behind."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)
