"""A run's change as a LoRA adapter, to be served beside its base and switched off again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from srmu.engine import weights
from srmu.engine.converted import ADAPTED, put_adapter, refuse_strays
from srmu.engine.files import whole_folder
from srmu.engine.loading import (
    build_skeleton,
    choose_dtype,
    load_module,
    load_pretrained,
    read_config,
    sample_logits,
    widens_within,
)
from srmu.engine.sites import is_linear, is_turned
from srmu.engine.text_part import rename_to_whole
from srmu.errors import SrmuError
from srmu.runs.run import Run


@dataclass(frozen=True)
class Factors:
    """Two matrices whose product is nearly the change of a linear map's weights."""

    up: Float[Tensor, "O r"]
    down: Float[Tensor, "r I"]
    error: float  # norm of what is left out, over that of the change

    @property
    def rank(self) -> int:
        return len(self.down)


def export_adapter(run: Run, out: Path, error: float, *, last_good: bool = False) -> dict[str, Any]:
    """Write the adapter to `out`: of each matrix the lowest rank that leaves out at most `error` of the change's norm.

    Returns its ranks and errors by module, and how much of what the run does to logits is left out. SrmuError for a
    change that no adapter holds.
    """
    run.require_model(last_good)
    if not 0 < error < 1:
        raise SrmuError(f"--error {error:g} is outside 0-1: it is the share of the change that may be lost")
    modules = dict(build_skeleton(read_config(run.base)).named_modules())
    parts = {name: factor_change(change, error) for name, change in read_changes(run, modules).items()}
    if not parts:
        raise SrmuError(f"{run.folder} changed nothing; there is no adapter to write")
    turned = any(is_turned(modules[name]) for name in parts)
    parts = rename_to_whole(run.base, parts)
    with whole_folder(out) as folder:
        write_adapter(run, parts, turned, folder)
        apart = compare_logits(run, folder)
    return {
        "modules": {name: {"rank": part.rank, "error": part.error} for name, part in parts.items()},
        "numbers": sum(part.up.numel() + part.down.numel() for part in parts.values()),
        "logits": apart,
    }


def read_changes(run: Run, modules: Mapping[str, nn.Module]) -> dict[str, Float[Tensor, "O I"]]:
    """What a run added to the weights of each linear map that it changed, by the module's name."""
    (delta, places), where, changes = run.changes, weights.list_shards(run.base), {}
    for name, (key, *others) in places.items():  # a parameter, and the tensors that the checkpoint has of it
        module, last = name.rpartition(".")[::2]
        owner = modules.get(module)
        if others or last != "weight" or owner is None or not is_linear(owner):
            raise SrmuError(f"an adapter holds changes of linear maps, and {key} is not one: leave out --adapter")
        change = delta[key].float() - weights.stored_tensor(where[key], key).float()
        changes[module] = change.T if is_turned(owner) else change
    return changes


def factor_change(change: Float[Tensor, "O I"], error: float) -> Factors:
    """The truncated singular value decomposition of a change, which leaves out least (Eckart and Young, 1936)."""
    left, sizes, right = torch.linalg.svd(change, full_matrices=False)
    # of each rank from 0: the norm of the singular values that are left out
    rest = torch.cat([sizes.square().flip(0).cumsum(0).flip(0), sizes.new_zeros(1)]).sqrt() / sizes.norm()
    rank = max(1, int((rest > error).sum()))
    half = sizes[:rank].sqrt()
    return Factors((left[:, :rank] * half).contiguous(), (half[:, None] * right[:rank]).contiguous(), float(rest[rank]))


def write_adapter(run: Run, parts: Mapping[str, Factors], turned: bool, folder: Path) -> None:
    """The files that peft reads; an adapter's scale is alpha over rank, here 1. `turned`: maps store inputs first."""
    from peft import LoraConfig

    ranks = {name: part.rank for name, part in parts.items()}
    model = Path(run.config.model).expanduser()
    # of a GGUF file or an adapter the name alone: what was made of it lies in this machine's cache
    base = str(run.base) if model.resolve() == run.base else model.name if model.exists() else run.config.model
    settings = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=[*parts],
        fan_in_fan_out=turned,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base,
        revision=run.config.revision,
    )
    settings.save_pretrained(str(folder))
    tensors = {}
    for name, part in parts.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = part.down
        tensors[f"base_model.model.{name}.lora_B.weight"] = part.up
    save_file(tensors, folder / ADAPTED, {"format": "pt"})


def compare_logits(run: Run, folder: Path) -> float:
    """How far logits of the base with the adapter are from the run's: a share of what the run changed of the base's.

    In float32, where that fits into memory: in bfloat16 rounding alone may be more than what is left out.
    """
    dtype = "float32" if widens_within(run.base) else choose_dtype(run.base, "cpu")
    module = load_module(run.base, dtype).eval()
    weights.apply_delta(module, *run.changes)
    expected = sample_logits(module, run.base)
    del module  # two models at once may not fit into memory
    both = put_adapter(load_pretrained(run.base, **({} if dtype == "auto" else {"dtype": dtype})), folder)
    refuse_strays(folder, both)
    with both.disable_adapter():
        before = sample_logits(both, run.base)
    return float((sample_logits(both, run.base) - expected).norm() / (expected - before).norm())
