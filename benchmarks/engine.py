"""How fast and how small a step is, rung by rung, against a plain restatement of the public loop.

    python benchmarks/engine.py [--shape 1b] [--dtype float32] [--tokens 128] [--device cpu]

All rungs run in this process, one after the other on the same batches, and must end with the same
weights bit for bit. Memory is the peak of a process of its own for each rung. `floor` is what an
exact trial has to compute at least, at the speed of a matrix product measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from shapes import config_of, parse_arguments, watched, write_checkpoint
from transformers import AutoModelForCausalLM

from srmu.engine.activation_cache import Activations, open_activations
from srmu.engine.losses import is_counted, token_mse
from srmu.engine.model import Batch, EditableModel, return_freed_blocks
from srmu.engine.topic import Topic
from srmu.engine.train import TrainOptions, fit_model
from srmu.methods import RMU

LAYER, WINDOW, BATCH, ALPHA, COEFF, RATE = 7, 3, 4, 1200.0, 6.5, 5e-5
RUNGS = ("reference", "+ freeze", "+ depth", "+ share", "cached trial")
FIRST = LAYER - WINDOW + 1


def batches(tokens: int, vocabulary: int, count: int, device: str) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(vocabulary, (BATCH, tokens), generator=generator).to(device)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return made


class Clock:
    """Seconds since the last look, with the device's work done; of CUDA events on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.last = self._now()

    def _now(self) -> Any:
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event

    def __call__(self) -> float:
        before, self.last = self.last, self._now()
        return before.elapsed_time(self.last) / 1000 if self.device == "cuda" else self.last - before


def reference(
    folder: Path, dtype: torch.dtype, device: str, pairs: list[tuple[Batch, Batch]], rung: str
) -> tuple[list[torch.Tensor], list[float]]:
    """The public loop, written anew: two models, full forward passes, AdamW on three matrices.

    In bfloat16 it steps float32 masters, as srmu does, which the public code does not have.
    "+ freeze" lets only those have gradients; "+ depth" also leaves out the layers above.
    """
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval() for _ in range(2)]
    if rung == "+ depth":
        for model in models:
            model.model.layers = model.model.layers[: LAYER + 1]
    updated, frozen = models
    matrices = [updated.model.layers[i].mlp.down_proj.weight for i in range(FIRST, LAYER + 1)]
    if rung != "reference":
        for model in models:
            model.requires_grad_(False)
        for matrix in matrices:
            matrix.requires_grad_(True)
    bf16 = dtype == torch.bfloat16
    masters = [torch.nn.Parameter(m.detach().float()) for m in matrices] if bf16 else matrices
    optimiser = torch.optim.AdamW(masters, lr=RATE, weight_decay=0)
    target = COEFF * direction(updated.config.hidden_size).to(device)
    cache = rung == "reference"

    def layer_output(model: Any, inputs: Batch) -> torch.Tensor:
        caught: list[torch.Tensor] = []
        handle = model.model.layers[LAYER].register_forward_hook(lambda _, args, output: caught.append(output))
        run = model.model if rung == "+ depth" else model
        run(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=cache)
        handle.remove()
        return caught[0]

    clock, times = Clock(device), []
    for forget, retain in pairs:
        with torch.no_grad():
            anchor = layer_output(frozen, retain)
        masks = [is_counted(batch["labels"]) for batch in (forget, retain)]
        loss = token_mse(layer_output(updated, forget), target, masks[0]).value
        loss = loss + (ALPHA * token_mse(layer_output(updated, retain), anchor, masks[1])).value
        loss.backward()
        if bf16:
            for master, matrix in zip(masters, matrices, strict=True):
                master.grad, matrix.grad = matrix.grad.float(), None
        optimiser.step()
        optimiser.zero_grad()  # gradients of other tensors pile up, as in the public code
        if bf16:
            for master, matrix in zip(masters, matrices, strict=True):
                matrix.data.copy_(master)
        times.append(clock())
    return [m.detach() for m in matrices], times


def direction(width: int) -> torch.Tensor:
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(1))
    return drawn / drawn.norm()


def ours(
    folder: Path, dtype: torch.dtype, device: str, pairs: list[tuple[Batch, Batch]], rung: str
) -> tuple[list[torch.Tensor], list[float]]:
    """srmu's loop; "cached trial" finds what an earlier trial left."""
    method = RMU(layer=LAYER, window=WINDOW, coeff=COEFF, alpha=ALPHA)
    name = str(dtype).removeprefix("torch.")
    forgets, retains = (list(part) for part in zip(*pairs, strict=True))
    topic = Topic("benchmark", forgets, retains)

    def trial(kept: Activations) -> tuple[list[torch.Tensor], list[float]]:
        model = EditableModel.load(folder, depth=method.depth, trainable=method.trainable, dtype=name, device=device)
        model.activations = kept
        state = method.setup(model, topic)
        state.tensors["target"] = COEFF * direction(model.module.config.hidden_size).to(device)
        if rung == "+ share":  # the steps must find nothing of the measuring pass
            model.activations = Activations()
        options = TrainOptions(learning_rate=RATE, max_steps=len(pairs), batch_size=BATCH)
        clock, times = Clock(device), []
        fit_model(
            model, [(topic, partial(method.loss, model, state))], options, lambda step, values: times.append(clock())
        )
        return [p.detach() for p in model.trained.values()], times

    if rung == "+ share":
        return trial(Activations())
    os.environ["SRMU_CACHE"] = str(folder.parent / "cache")
    if not (folder.parent / "cache").exists():  # where an earlier trial leaves what it computed
        trial(open_activations("disk", {}, torch.device(device)))
    return trial(open_activations("disk", {}, torch.device(device)))


def one(rung: str, *given: Any) -> tuple[list[torch.Tensor], list[float]]:
    return (ours if rung in RUNGS[3:] else reference)(*given, rung)


def flops(shape: str, tokens: int) -> dict[str, float]:
    """FLOPs of a step of each rung, and the least that an exact trial needs (docs/engine.md)."""
    c = config_of(shape)
    d, f, layers = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    k = c.num_key_value_heads * d // c.num_attention_heads
    a, g, down, head = 4 * d * d + 4 * d * k, 4 * d * f, 2 * d * f, 2 * d * c.vocab_size
    s = 4 * tokens * d  # scores and values of attention, dense
    p = a + s + g + down
    forget = retain = BATCH * tokens
    both = forget + retain
    back = both * (WINDOW * down + (LAYER - FIRST) * (a + g + down + 2 * s))
    return {
        "reference": (forget + 2 * retain) * (layers * p + head)
        + both * (LAYER + 1) * (2 * a + 2 * g + 2 * down + 2 * s),
        "+ freeze": (forget + 2 * retain) * (layers * p + head) + back,
        "+ depth": (forget + 2 * retain) * (LAYER + 1) * p + back,
        "+ share": both * (LAYER + 1) * p + retain * (LAYER - FIRST + 1) * p + back,
        "cached trial": both * (LAYER - FIRST + 1) * p + back,
        "floor": both * (down + (LAYER - FIRST) * p) + back,
    }


def matmul_speed(shape: str, tokens: int, dtype: torch.dtype, device: str) -> float:
    """FLOPs a second of the product that the model does most, in two seconds."""
    c = config_of(shape)
    a = torch.randn(BATCH * tokens, c.hidden_size, device=device).to(dtype)
    b = torch.randn(c.intermediate_size, c.hidden_size, device=device).to(dtype)
    clock, times = Clock(device), []
    while sum(times) < 2:
        a @ b.T
        times.append(clock())
    return 2 * a.numel() * len(b) / sorted(times)[len(times) // 2]


def memory_of(rung: str, arguments: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Peaks of a process that does two steps of a rung."""
    command = [sys.executable, __file__, "--rung", rung, "--folder", str(folder)]
    for name in ("shape", "dtype", "tokens", "device"):
        command += [f"--{name}", str(getattr(arguments, name))]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(answer.splitlines()[-1])


def ladder(arguments: argparse.Namespace) -> None:
    """Print the table: weights after the steps and seconds of the last step, for each rung in turn."""
    dtype = getattr(torch, arguments.dtype)
    return_freed_blocks()  # for all rungs alike
    with TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = write_checkpoint(Path(scratch) / "model", arguments.shape, dtype)
        vocabulary = config_of(arguments.shape).vocab_size
        made = batches(arguments.tokens, vocabulary, 2 * arguments.steps, arguments.device)
        pairs = list(zip(made[::2], made[1::2], strict=True))
        work = flops(arguments.shape, arguments.tokens)
        speeds = [matmul_speed(arguments.shape, arguments.tokens, dtype, arguments.device)]
        seconds, same = {}, {}
        first: list[torch.Tensor] = []
        for rung in RUNGS:
            weights, times = one(rung, folder, dtype, arguments.device, pairs)
            first = first or weights
            seconds[rung] = times[-1]
            same[rung] = all(torch.equal(a, b) for a, b in zip(first, weights, strict=True))
            speeds.append(matmul_speed(arguments.shape, arguments.tokens, dtype, arguments.device))
        speed = sorted(speeds)[len(speeds) // 2]
        floor = work["floor"] / speed
        size = f"{BATCH} x {arguments.tokens} + {BATCH} x {arguments.tokens} tokens"
        print(f"{arguments.shape}, {arguments.dtype}, {arguments.device}, layer {LAYER} of 32, {size},", end=" ")
        print(f"{torch.get_num_threads()} thread; matmul {speed / 1e9:.0f} GFLOP/s", end=" ")
        print(f"({min(speeds) / 1e9:.0f}-{max(speeds) / 1e9:.0f});", end=" ")
        print(f"floor {work['floor'] / 1e12:.3f} TFLOP, {floor:.3g} s\n")
        print("| | TFLOP | s/step | times faster | / floor | private GB | resident GB | same bits |")
        print("|---|---|---|---|---|---|---|---|")
        for rung in RUNGS:
            held = memory_of(rung, arguments, folder)
            print(
                f"| {rung} | {work[rung] / 1e12:.3f} | {seconds[rung]:.3g} "
                f"| {seconds['reference'] / seconds[rung]:.1f} | {seconds[rung] / floor:.2f} "
                f"| {held['private'] / 1e9:.2f} | {held['resident'] / 1e9:.2f} "
                f"| {'yes' if same[rung] else 'NO'} |"
            )
        print()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rung", choices=RUNGS, help="one step of it, for its memory")
    parser.add_argument("--folder", type=Path)
    arguments = parse_arguments(parser, "1b", 128, 2)
    if arguments.rung is None:
        ladder(arguments)
    else:
        print(json.dumps(memory_here(arguments)))


def memory_here(arguments: argparse.Namespace) -> dict[str, int]:
    """Peaks of this process while it does two steps: the moments are there in the second."""
    vocabulary = config_of(arguments.shape).vocab_size
    made = batches(arguments.tokens, vocabulary, 4, arguments.device)
    dtype = getattr(torch, arguments.dtype)
    with watched() as memory:
        one(arguments.rung, arguments.folder, dtype, arguments.device, list(zip(made[::2], made[1::2], strict=True)))
    if arguments.device == "cuda":
        memory.private = memory.resident = torch.cuda.max_memory_allocated()
    return {"private": memory.private, "resident": memory.resident}


if __name__ == "__main__":
    main()
