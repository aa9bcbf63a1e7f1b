"""The processes that a launcher started for one run: their ranks, and sums over all of them.

`torchrun` or `accelerate launch` describe them in the environment. In a single process all of this is trivial.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from srmu.errors import SrmuError

if TYPE_CHECKING:  # the command line asks for its rank before it imports torch
    from torch import Tensor, nn
    from torch.distributed.tensor import DTensor

    from srmu.engine.topic import Batch

PATIENCE = timedelta(minutes=30)  # for which ranks wait for one that loads or writes
T = TypeVar("T")
S = TypeVar("S")

_alone = False  # while `share_work` does a part of the work


def get_rank() -> int:
    return 0 if get_size() == 1 else int(os.environ.get("RANK", "0"))


def get_size() -> int:
    launched = "MASTER_ADDR" in os.environ and not _alone
    return int(os.environ.get("WORLD_SIZE", "1")) if launched else 1


def is_first() -> bool:
    return get_rank() == 0


def join_group() -> None:
    """Join the other processes, once; SrmuError if they cannot be reached."""
    if get_size() == 1:
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group(timeout=PATIENCE)  # gloo for the CPU, NCCL for CUDA
    except (RuntimeError, ValueError) as error:
        raise SrmuError(f"the {get_size()} processes cannot meet: {error}") from error


def leave_group() -> None:
    if get_size() > 1:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()


def says_first(message: str) -> bool:
    """Whether no other process has printed this message."""
    if get_size() == 1:
        return True
    with suppress(Exception):  # the other processes may be gone, and their store too
        from torch.distributed.distributed_c10d import _get_default_store

        return int(_get_default_store().add(f"said {message}", 1)) == 1
    return True


def gather_values(value: T) -> list[T]:
    """The values of all processes, on each."""
    if get_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * get_size()
    dist.all_gather_object(values, value)
    return values


def agree_on(value: T) -> T:
    return gather_values(value)[0]


def share_work(items: Sequence[S], do: Callable[[S], T]) -> list[T]:
    """The results of `do` for each item, on all processes; each does a part of the work as if it were alone.

    If one fails, it raises its error once all are done, and the others exit too.
    """
    global _alone
    rank, count = get_rank(), get_size()
    if count == 1:
        return [do(item) for item in items]
    mine: list[T] | Exception
    _alone = True
    try:
        mine = [do(item) for item in items[rank::count]]
    except Exception as raised:  # whatever it is, the others must learn of it
        mine = raised
    finally:
        _alone = False
    parts = gather_values(mine if isinstance(mine, list) else None)
    if isinstance(mine, Exception):
        raise mine
    whole = [part for part in parts if part is not None]
    if len(whole) < count:
        raise SystemExit(1)  # the one that failed says why
    return [whole[i % count][i // count] for i in range(len(items))]


def sum_values(value: Tensor) -> Tensor:
    """The sum of the processes' values, without gradient."""
    if get_size() == 1:
        return value.detach()
    import torch.distributed as dist

    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def take_rows(batch: Batch) -> Batch:
    """Every `size`-th row of a batch, with its padding; if this process has none, a row that counts nothing."""
    if get_size() == 1 or not batch:
        return batch
    if get_rank() < len(batch["labels"]):
        return batch.cut(slice(get_rank(), None, get_size()))
    first = batch.cut(slice(1))
    return first.replace(labels=first["labels"].new_full(first["labels"].shape, -100))


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """This process' part of a sharded tensor, in its own memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gather_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor whole, on every process; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gather_to_first(tensor: Tensor) -> Tensor:
    """A sharded tensor whole in the first process's main memory, empty on the others; every process must call this."""
    if not is_sharded(tensor):
        return tensor
    whole = gather_tensor(tensor)
    return whole.cpu() if is_first() else whole.new_empty(0)


def shard_like(tensor: Tensor, place: Tensor) -> Tensor:
    """A whole tensor, present in every process, sharded in the same way as `place`."""
    if not is_sharded(place):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = place.device_mesh
    everything = DTensor.from_local(tensor.to(place.device), mesh, [Replicate()], run_check=False)
    return everything.redistribute(mesh, place.placements)


def shard_modules(modules: Iterable[nn.Module], device: str) -> None:
    """Shard the tensors of modules over the processes (FSDP2)."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, share_comm_ctx

    mesh = init_device_mesh(device.partition(":")[0], (get_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    # Each is its own root, as activations are also read without the model's own forward. Sharing a context frees the
    # gradients of one module before those of the next are summed.
    roots: list[Any] = [fully_shard(m, mesh=mesh, mp_policy=policy, reshard_after_forward=True) for m in modules]
    share_comm_ctx(roots)
