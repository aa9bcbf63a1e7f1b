"""The state of a training on disk, so that a killed run goes on with the same bits."""

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from srmu.engine.files import read_json, sha256, whole_folder, write_json
from srmu.errors import SrmuError, first_line

TENSORS, NUMBERS = "state.safetensors", "complete.json"


@dataclass
class Checkpoints:
    """The folder where a training is saved every `seconds` seconds; None: it is not saved.

    A checkpoint is a folder `step-N` with tensors, numbers and, written last, a digest of the tensors; without the
    digest it does not count. `belongs` identifies the training: checkpoints of any other training do not count either.
    """

    folder: Path | None = None
    seconds: float = 60.0
    belongs: dict[str, Any] = field(default_factory=dict)
    failed: str = ""  # why the last one could not be written
    last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        return self.folder is not None and time.monotonic() - self.last >= self.seconds

    def save(self, step: int, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Save the state after `step` steps in place of an earlier one.

        A full disk costs the checkpoint, never the run.
        """
        assert self.folder is not None
        older = self.kept()
        try:
            shutil.rmtree(self.folder / f"step-{step}", ignore_errors=True)  # which was not written to its end
            with whole_folder(self.folder / f"step-{step}") as place:
                save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, place / TENSORS)
                mark = {"belongs": self.belongs, "sha256": sha256(place / TENSORS)}
                write_json(place / NUMBERS, mark | {"step": step, "numbers": numbers})
            for folder in older:
                shutil.rmtree(folder, ignore_errors=True)
            self.failed = ""
        except (OSError, SafetensorError, SrmuError) as error:
            self.failed = first_line(error)
        self.last = time.monotonic()

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Steps done, tensors and numbers of the newest whole checkpoint, if there is one."""
        for folder in reversed(self.kept()):
            try:
                mark = read_json(folder / NUMBERS)
                same = mark["belongs"] == json.loads(json.dumps(self.belongs))
                if same and mark["sha256"] == sha256(folder / TENSORS):
                    return int(mark["step"]), load_file(folder / TENSORS), mark["numbers"]
            except (OSError, ValueError, KeyError, TypeError, SafetensorError):
                continue  # not written to its end
        return None

    def done(self) -> int:
        """The number of steps that the newest whole checkpoint saves."""
        newest = self.load()
        return newest[0] if newest else 0

    def kept(self) -> list[Path]:
        """The folders of checkpoints, oldest first."""
        folders = self.folder.glob("step-*") if self.folder else ()
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))

    def clear(self) -> None:
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def pack_memory(memory: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The part of a memory that changes from step to step, as tensors and JSON values.

    That is tensors, random generators, plain numbers, and objects with a `state_dict` of JSON values. Everything else
    is fixed for a run and made again.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, value in memory.items():
        if isinstance(value, Tensor | torch.Generator):
            tensors[name] = value if isinstance(value, Tensor) else value.get_state()
        elif isinstance(value, bool | int | float | str):
            numbers[name] = value
        elif hasattr(value, "state_dict"):
            numbers[name] = value.state_dict()
    return tensors, numbers


def unpack_memory(memory: dict[str, Any], tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Restore what `pack_memory` returned into a memory that was just set up."""
    for name, tensor in tensors.items():
        current = memory.get(name)
        if isinstance(current, torch.Generator):
            current.set_state(tensor)
        else:
            memory[name] = tensor.to(current.device) if isinstance(current, Tensor) else tensor
    for name, value in numbers.items():
        if hasattr(memory.get(name), "load_state_dict"):
            memory[name].load_state_dict(value)
        else:
            memory[name] = value
