"""Checkpoints on disk: find, check, and write only the tensors that changed.

A delta holds the changed tensors under their checkpoint names. An export copies the base model's
files and patches the changed tensors' bytes where they lie, so that everything else stays
byte-identical.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from srmu.errors import UserError
from srmu.files import sha256, whole_folder
from srmu.model import first_line

INDEX = "model.safetensors.index.json"
KEPT = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".md")  # what an export copies as it is
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def locate(model: str, revision: str | None = None, base: Path = Path()) -> Path:
    """The folder of a model: a local one, or the cached snapshot of a hub id."""
    folder = base / Path(model).expanduser()
    if folder.is_dir():
        if revision:
            raise UserError(f"revision does not apply to the local folder {folder}")
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"model {model}: no such folder, and not a hub id like owner/name")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds
        raise UserError(
            f"model {model}: no such folder, and the hub says: {first_line(error)}"
        ) from error


def shards(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor. UserError where a file or tensor is missing or elsewhere."""
    single = folder / "model.safetensors"
    if single.exists():  # transformers, too, takes it before an index
        return dict.fromkeys(tensor_names(single), single)
    if not (folder / INDEX).exists():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        raise UserError(
            f"model folder {folder} has no model.safetensors"
            + (f", only {pickles[0]}: convert it with save_pretrained" if pickles else "")
        )
    try:
        listed = json.loads((folder / INDEX).read_text())["weight_map"]
        found = {str(name): str(file) for name, file in listed.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder / INDEX} is not a safetensors index") from error
    for file in sorted(set(found.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX} points out of the folder: {file!r}")
        if not (folder / file).is_file():
            raise UserError(f"model folder {folder} lacks {file}, which its index names")
        inside = set(tensor_names(folder / file))
        if lost := sorted(n for n, f in found.items() if f == file and n not in inside):
            raise UserError(f"{folder / file} lacks the tensor {lost[0]}, which the index names")
    return {name: folder / file for name, file in found.items()}


def tensor_names(path: Path) -> list[str]:
    """The tensors in a safetensors file; UserError naming the file when it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}; fetch it again") from error


def header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header and the offset at which its data starts."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def checkpoint_names(folder: Path, originals: Mapping[str, Tensor]) -> dict[str, str]:
    """The checkpoint's name for each parameter: one may carry a prefix that the other lacks.

    Sure because the stored bytes are compared with the original values, not only the names.
    """
    where = shards(folder)
    names = {}
    for name, original in originals.items():
        close = [key for key in where if alike(key, name)]
        if len(close) != 1:
            raise UserError(f"{folder} stores {name} as {close or 'nothing'}: cannot write it back")
        stored = stored_tensor(where[close[0]], close[0])
        if not stored.isfinite().all():
            raise UserError(f"{folder} stores NaN or infinity in {close[0]}; fetch it again")
        if not torch.equal(stored.to(original.dtype), original.cpu()):
            raise UserError(f"{folder} stores {name} in another form; cannot write it back")
        names[name] = close[0]
    return names


def alike(a: str, b: str) -> bool:
    """Whether two tensor names are the same but for a prefix, such as `transformer.`."""
    return a == b or a.endswith("." + b) or b.endswith("." + a)


def save_delta(
    path: Path,
    folder: Path,
    names: Mapping[str, str],
    changed: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write the changed tensors in the checkpoint's own dtypes, under their `checkpoint_names`."""
    where = shards(folder)
    delta, marks = {}, {}
    for name, tensor in changed.items():
        key = names[name]
        if not tensor.isfinite().all():
            raise UserError(f"{name} holds NaN or infinity; nothing was saved")
        stored = stored_tensor(where[key], key)
        delta[key] = tensor.detach().cpu().to(stored.dtype).contiguous()
        marks[f"base.{key}"] = sha256(raw(stored))
    temporary = path.with_name(f".{path.name}")
    save_file(delta, temporary, metadata={**metadata, **marks})
    temporary.replace(path)


def load_delta(path: Path, folder: Path) -> dict[str, Tensor]:
    """The tensors of a delta by checkpoint name; UserError when its base model has changed."""
    where = shards(folder)
    try:
        delta = load_file(path)
        with safe_open(path, "pt") as file:
            marks = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error
    for key in delta:
        if key not in where or marks.get(f"base.{key}") != sha256(
            raw(stored_tensor(where[key], key))
        ):
            raise UserError(
                f"{path} was made from another model than {folder} now is: {key} differs there"
            )
    return delta


def stored_tensor(path: Path, key: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(key)


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor as they lie in a file."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def apply_delta(module: torch.nn.Module, folder: Path, delta: Mapping[str, Tensor]) -> None:
    """Put a delta's tensors into a loaded model."""
    parameters = dict(module.named_parameters())
    for name, tensor in delta.items():
        close = [known for known in parameters if alike(known, name)]
        if len(close) != 1 or parameters[close[0]].shape != tensor.shape:
            raise UserError(f"the delta's tensor {name} does not fit the model {folder}")
        parameters[close[0]].data.copy_(tensor)


def export(folder: Path, delta: Mapping[str, Tensor], out: Path) -> None:
    """Write a full checkpoint: the base's files, with the delta's tensors in their places.

    The source is never modified. `out` appears when it is complete.
    """
    where = shards(folder)
    if lost := sorted(set(delta) - set(where)):
        raise UserError(f"the model {folder} has no tensor {lost[0]}; is it another model?")
    with whole_folder(out) as temporary:
        for file in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
            # Not the weights that the model does not load: they would keep the old tensors.
            wanted = file.suffix in KEPT or file in where.values()
            if file.is_file() and wanted and not file.name.startswith("."):
                copy = temporary / file.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file.resolve(), copy)
        for path in sorted({where[name] for name in delta}):
            patch(temporary / path.name, {n: t for n, t in delta.items() if where[n] == path})


def patch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite tensors of a safetensors file in place: same dtype, shape and position."""
    entries, start = header(path)
    with path.open("r+b") as file:
        for name, tensor in tensors.items():
            entry = entries[name]
            if (entry["dtype"], entry["shape"]) != (DTYPES.get(tensor.dtype), list(tensor.shape)):
                raise UserError(
                    f"{name} has another type or shape in the model; is it another one?"
                )
            file.seek(start + entry["data_offsets"][0])
            file.write(raw(tensor))


def fingerprint(folder: Path) -> str:
    """SHA-256 over a model's weights, config and tokenizer."""
    names = sorted(
        p for p in folder.iterdir() if p.suffix in (".safetensors", *KEPT) and p.suffix != ".md"
    )
    parts: list[bytes | Path] = []
    for path in names:
        parts += [path.name.encode(), path]
    return sha256(*parts)


def changed_fingerprint(base: str, delta: Mapping[str, Tensor]) -> str:
    """The fingerprint of a model whose base has the fingerprint `base`, with a delta on it."""
    parts = [base.encode()]
    for name, tensor in sorted(delta.items()):
        parts += [name.encode(), raw(tensor)]
    return sha256(*parts)
