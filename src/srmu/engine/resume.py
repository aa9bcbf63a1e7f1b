"""The state of a training on disk, so that a killed run goes on with the same bits."""

import json
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from srmu.engine.activation_cache import digest_tensors
from srmu.engine.files import flush_path
from srmu.errors import first_line

STATE = "state.safetensors"


@dataclass
class Checkpoints:
    """The folder where a training is saved every `seconds` seconds; None: it is not saved.

    Its one file holds tensors, and in the metadata numbers, a digest of the tensors and `belongs`, which identifies the
    training: that of another does not count, nor does a damaged file.
    """

    folder: Path | None = None
    seconds: float = 60.0
    belongs: dict[str, Any] = field(default_factory=dict)
    failed: str = ""  # why the last one could not be written
    last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        return self.folder is not None and time.monotonic() - self.last >= self.seconds

    def save(self, step: int, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Save the state after `step` steps. A full disk costs the checkpoint, never the run."""
        assert self.folder is not None
        flat = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
        mark = {"belongs": self.belongs, "sha256": digest_tensors(*flat.values()), "step": step, "numbers": numbers}
        temporary = self.folder / f".{STATE}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(flat, temporary, {"mark": json.dumps(mark)})
            flush_path(temporary)
            temporary.replace(self.folder / STATE)
            self.failed = ""
        except (OSError, SafetensorError) as error:
            self.failed = first_line(error)
        self.last = time.monotonic()

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Steps done, tensors and numbers of the checkpoint, if there is one."""
        if self.folder is None:
            return None
        damage = OSError, ValueError, KeyError, TypeError, SafetensorError
        with suppress(*damage), safe_open(self.folder / STATE, "pt") as file:
            mark = json.loads(file.metadata()["mark"])
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            same = mark["belongs"] == json.loads(json.dumps(self.belongs))
            if same and mark["sha256"] == digest_tensors(*tensors.values()):
                return mark["step"], tensors, mark["numbers"]
        return None

    def clear(self) -> None:
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def pack_memory(memory: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, generators, numbers and `state_dict`s of JSON values in a memory; all else is made again."""
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
