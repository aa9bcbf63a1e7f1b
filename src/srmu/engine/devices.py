"""The devices of this machine: a processor, NVIDIA GPUs or Apple's, and the memory of each."""

import ctypes
import gc
import signal
import timeit
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from srmu.engine.distributed import get_size
from srmu.errors import SrmuError, first_line

PROBED = 256  # rows and columns of the matrices whose product is timed
SLOWER, REPEATS = 5, 9  # times as slow as float32 is too slow; how often both are timed


def list_devices() -> list[str]:
    """What a device may be called here, the fastest first."""
    if count := torch.cuda.device_count():
        return ["cuda", *(f"cuda:{number}" for number in range(count)), "cpu"]
    # MPS is Apple's GPU; the processes of a launcher cannot send each other what lies on it
    return ["mps", "cpu"] if torch.backends.mps.is_available() and get_size() == 1 else ["cpu"]


def find_device(name: str) -> str:
    """The device that a name stands for, `auto` the fastest; SrmuError where it is not there, or cannot be used."""
    there = list_devices()
    name = there[0] if name == "auto" else name
    if name not in there:
        raise SrmuError(f"device {name} is not there; expected auto, or {' or '.join(there)}")
    try:
        torch.empty(0, device=name)
    except RuntimeError as error:
        raise SrmuError(f"device {name} cannot be used: {first_line(error)}; device=cpu goes without it") from None
    return name


def name_gpu(device: str | torch.device | None = None) -> str | None:
    """What kind of GPU a device is, by default the first one; None where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return "Apple MPS" if torch.backends.mps.is_available() else None


def free_bytes(device: str | torch.device) -> int:
    """Memory of the device that nothing holds; Apple's GPU shares the processor's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


@cache
def computes_bf16() -> bool:
    """Whether this processor multiplies about as fast in bfloat16 as in float32.

    Without instructions for bfloat16 it takes some thirty times as long.
    """
    halves, wholes = (torch.ones(PROBED, PROBED, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    # in turns, the best of several: the answer decides a run's id, so a busy machine must not change it
    turns = [(timeit.timeit(lambda: halves @ halves, number=1), timeit.timeit(lambda: wholes @ wholes, number=1))
             for _ in range(REPEATS)]  # fmt: skip
    half, whole = map(min, zip(*turns, strict=True))
    return half < SLOWER * whole


def reset_peak_memory(device: str) -> int:
    """Count the peak of the device's memory anew; the bytes that this process holds now."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    release_memory()
    if device == "mps":
        torch.mps.empty_cache()
        return torch.mps.driver_allocated_memory()
    with suppress(OSError):  # not Linux
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def read_peak_memory(device: str) -> int:
    """The most bytes held since `reset_peak_memory`: allocated on a GPU, else resident; off Linux those held now."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if device == "mps":
        return torch.mps.driver_allocated_memory()  # it keeps what was freed
    with suppress(OSError):
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    return psutil.Process().memory_info().rss


def return_freed_blocks() -> None:
    """Make glibc return freed blocks of 24 MB and more at once: a step on 8 layers of a 1B model takes 0.2 GB less."""
    with suppress(OSError, AttributeError, TypeError):  # another C library, which keeps less memory
        ctypes.CDLL(None).mallopt(-3, 24 << 20)  # M_MMAP_THRESHOLD


def release_memory() -> None:
    with hold_interrupt():  # inside a finaliser it would be swallowed
        gc.collect()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def hold_interrupt() -> Iterator[None]:
    """Run the block, and only then the handler of an interrupt that came meanwhile."""
    before = signal.getsignal(signal.SIGINT)
    came: list[Any] = []
    try:
        signal.signal(signal.SIGINT, lambda *how: came.append(how))
    except ValueError:  # not in the main thread, which is the one that is interrupted
        before = None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])
