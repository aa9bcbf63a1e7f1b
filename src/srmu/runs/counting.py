"""FLOPs and activation bytes of a step, counted on tensors without memory; this machine's speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from srmu.engine.activation_cache import Activations
from srmu.engine.loading import cut_config
from srmu.engine.losses import Mean, mean_nll, token_mse
from srmu.engine.model import Batch, EditableModel, Site
from srmu.engine.topic import Topic
from srmu.engine.train import Terms, TrainOptions, fit_model
from srmu.errors import SrmuError, first_line

Shape = tuple[int, int]  # rows and tokens of a batch
PROBE_STEPS = 5
PROBE_TOKENS = 256  # of each batch, at the most
PROBE_VOCABULARY = 8192  # at the most: a head of 128,000 tokens takes gigabytes
EVERYTHING = 1 << 62  # bytes


def count_flops(action: Callable[[], object]) -> int:
    """FLOPs of what an action computes, by torch's own counter."""
    experts = {torch.ops.aten._grouped_mm: grouped_flops}
    with FlopCounterMode(display=False, custom_mapping=experts) as counter:
        action()
    return counter.get_total_flops()


def grouped_flops(first: Sequence[int], other: Sequence[int], *_: Any, **__: Any) -> int:
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


def site_output(model: EditableModel, batch: Batch, site: Site | None) -> Tensor:
    """Activations at the site, or logits where there is none."""
    return model.hidden(batch, site) if site is not None else model.logits(batch)


def count_frozen_pass(model: EditableModel, batch: Batch, site: Site | None) -> tuple[int, int]:
    """FLOPs of the original model's pass: of the fixed layers, and of those above them."""
    with model.using({}):
        model.activations = Activations(EVERYTHING)
        whole, above = (count_flops(lambda: site_output(model, batch, site)) for _ in range(2))
    return whole - above, above


def step_losses(model: EditableModel, batches: Sequence[Batch], site: Site | None) -> Tensor:
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


def count_step(model: EditableModel, batches: Sequence[Batch], site: Site | None) -> tuple[int, int]:
    """FLOPs of a step whose fixed layers are cached, and the bytes it leaves for its gradient.

    The bytes are those that autograd saves, beside the model's own tensors, and two copies of the
    last output in float32: its gradient, and that of the loss before it.
    """
    model.activations = Activations(EVERYTHING)
    with model.using({}):
        outputs = [site_output(model, batch, site) for batch in batches]
    own = {id_of(tensor) for tensor in (*model.module.parameters(), *model.module.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no other takes its number

    def keep(tensor: Tensor) -> Tensor:
        if id_of(tensor) not in own:
            saved[id_of(tensor)] = tensor.untyped_storage()
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


def id_of(tensor: Tensor) -> int:
    """The number of the storage behind a tensor."""
    return tensor.untyped_storage()._cdata


def measure_speed(settings: Any, dtype: torch.dtype, device: str, site: Site | None, shapes: Sequence[Shape]) -> float:
    """FLOPs a second that steps of one real layer reach here, the training loop included.

    The layer has the model's own width and kind, and the run's batch size. Where it cannot be built
    alone, a product of matrices is timed instead.
    """
    short = cut_config(settings, 1)
    if short is None:
        return measure_product(settings.get_text_config().hidden_size, dtype, device)
    short.vocab_size = min(short.vocab_size, PROBE_VOCABULARY)
    short.pad_token_id = None
    module = AutoModelForCausalLM.from_config(short, dtype=dtype).to(device)
    model = EditableModel(module, ["0.mlp_down" if site else "*"], 1 if site else None)
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
