"""A training's state on disk, so that a run that was killed goes on with the same bits."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from srmu.engine.files import sha256, whole_folder, write_json
from srmu.errors import SrmuError, first_line

TENSORS, NUMBERS = "state.safetensors", "complete.json"


@dataclass
class Checkpoints:
    """The folder where a training is kept every `seconds` seconds; None: it is not.

    What is kept is a folder `step-N` with tensors, numbers and the digest of the tensors: without
    the digest, which is written last, it does not count. `belongs` says what the training is of:
    a checkpoint of anything else does not count either.
    """

    folder: Path | None = None
    seconds: float = 60.0
    belongs: Mapping[str, Any] = field(default_factory=dict)
    failed: str = ""  # why the last one could not be written
    last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        return self.folder is not None and time.monotonic() - self.last >= self.seconds

    def save(self, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Keep the state after `step` steps in place of an earlier one.

        A disk that is full costs the checkpoint, never the run.
        """
        assert self.folder is not None
        older = self.kept()
        try:
            # a folder whose writing was cut off; named anew, it would be in the way
            shutil.rmtree(self.folder / f"step-{step}", ignore_errors=True)
            with whole_folder(self.folder / f"step-{step}") as place:
                flat = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
                save_file(flat, place / TENSORS)
                mark = {"belongs": dict(self.belongs), "sha256": sha256(place / TENSORS)}
                write_json(place / NUMBERS, mark | {"step": step, "numbers": dict(numbers)})
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
                mark = json.loads((folder / NUMBERS).read_text())
                same = mark["belongs"] == json.loads(json.dumps(dict(self.belongs)))
                if same and mark["sha256"] == sha256(folder / TENSORS):
                    return int(mark["step"]), load_file(folder / TENSORS), mark["numbers"]
            except (OSError, ValueError, KeyError, TypeError, SafetensorError):
                continue  # cut off in its writing
        return None

    def done(self) -> int:
        """How many steps the newest whole checkpoint spares."""
        newest = self.load()
        return newest[0] if newest else 0

    def kept(self) -> list[Path]:
        """The folders of checkpoints, the oldest first."""
        folders = self.folder.glob("step-*") if self.folder else ()
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))

    def clear(self) -> None:
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def pack_memory(memory: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What changes from step to step, as tensors and JSON values.

    Tensors, random streams, plain numbers, and what has a `state_dict` of JSON values. All else is
    fixed for a run: whoever made it makes it again.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, value in memory.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, torch.Generator):
            tensors[name] = value.get_state()
        elif isinstance(value, bool | int | float | str):
            numbers[name] = value
        elif hasattr(value, "state_dict"):
            numbers[name] = value.state_dict()
    return tensors, numbers


def unpack_memory(
    memory: dict[str, Any], tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Put what `packed` gave back into a memory that was set up anew."""
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
