"""Checkpoints on disk: find them, check them, and write only the tensors that changed.

A delta holds the changed tensors under their checkpoint names. An export copies the files of the base model and
overwrites the changed tensors in place, so that everything else stays byte-identical.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from srmu.engine.activation_cache import flat_bytes
from srmu.engine.converted import ADAPTER, convert_gguf, merge_adapter
from srmu.engine.files import (
    CARRIED,
    EXPORTED,
    read_json,
    require_space,
    require_utf8,
    sha256,
    whole_folder,
    write_whole,
)
from srmu.engine.progress import Watch, ignore_progress
from srmu.engine.quantised import dequantise_folder
from srmu.engine.text_part import rename_stored
from srmu.errors import SrmuError, first_line, suggest_path

INDEX = "model.safetensors.index.json"
PAGE = 4096  # bytes
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

Tensors = dict[str, Tensor]
Places = Mapping[str, Sequence[str]]  # the checkpoint's names of each parameter


def locate_model(model: str, revision: str | None = None) -> Path:
    """The folder of a model: a local one, the cached snapshot of a hub id, or what such a one was converted to."""
    folder = Path(model).expanduser()
    gguf = folder.suffix == ".gguf" and folder.is_file()
    if gguf or folder.is_dir():
        if revision:
            raise SrmuError(f"revision does not apply to the local {'file' if gguf else 'folder'} {folder}")
        if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
            return merge_adapter(folder, locate_model)
        return convert_gguf(folder) if gguf else dequantise_folder(require_utf8(folder))
    if folder.suffix == ".gguf" or folder.is_file():
        what = "not a model" if folder.is_file() else "no such file"
        raise SrmuError(f"model {model}: {what}{suggest_path(folder) or '; name a folder, a .gguf file or a hub id'}")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise SrmuError(f"model {model}: no such folder, and not a hub id like owner/name{suggest_path(folder)}")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "LICENSE*", *(f"*{kind}" for kind in CARRIED if kind)]
        snapshot = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds
        hint = suggest_path(folder)
        raise SrmuError(f"model {model}: no such folder, and the hub says: {first_line(error)}{hint}") from error
    return dequantise_folder(snapshot)


def is_there(folder: Path) -> bool:
    """Whether a model's folder holds more than its config.json, from which a run can be planned."""
    kinds = ("*.safetensors", "*.index.json", "*.bin", "*.gguf", "*.pt", "tokenizer*")
    return not (folder / "config.json").is_file() or any(any(folder.glob(k)) for k in kinds)


def list_shards(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor; SrmuError if a file or tensor is not where the index says."""
    single = folder / "model.safetensors"
    if single.exists():  # transformers, too, prefers it to an index
        return dict.fromkeys(read_header(single)[0], single)
    if not (folder / INDEX).exists():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        found = f", only {pickles[0]}: convert it with save_pretrained" if pickles else ""
        raise SrmuError(f"model folder {folder} has no model.safetensors{found}")
    try:
        files = {str(name): str(file) for name, file in read_json(folder / INDEX)["weight_map"].items()}
    except (SrmuError, KeyError, AttributeError, TypeError) as error:
        raise SrmuError(f"{folder / INDEX} is not a safetensors index") from error
    for file in sorted(set(files.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise SrmuError(f"{folder / INDEX} points out of the folder: {file!r}")
        if not (folder / file).is_file():
            raise SrmuError(f"model folder {folder} lacks {file}, which its index names")
        inside = read_header(folder / file)[0]
        if lost := sorted(n for n, f in files.items() if f == file and n not in inside):
            raise SrmuError(f"{folder / file} lacks the tensor {lost[0]}, which the index names")
    return {name: folder / file for name, file in files.items()}


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The tensors of a safetensors file, and the offset at which their data starts; SrmuError if it is damaged."""
    try:
        with safe_open(path, "pt"):  # refuses what is damaged
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(size))
    except Exception as error:  # damaged in some way
        raise SrmuError(f"{path} is damaged: {first_line(error)}; fetch it again") from error
    entries.pop("__metadata__", None)
    return entries, 8 + size


def stored_entries(folder: Path) -> dict[str, Any]:
    """The header entry of each tensor of a checkpoint: dtype, shape, data_offsets."""
    files = sorted(set(list_shards(folder).values()))
    return {name: entry for path in files for name, entry in read_header(path)[0].items()}


def stored_types(folder: Path) -> dict[str, torch.dtype]:
    """The dtype of each tensor as it is stored."""
    return {name: TYPES.get(entry["dtype"], torch.uint8) for name, entry in stored_entries(folder).items()}


def layer_number(name: str) -> int | None:
    """The decoder layer that a tensor belongs to, by the first number in its name."""
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(match[1]) if match else None


def in_layer(name: str) -> str:
    """The name of a tensor inside its decoder layer; what precedes it differs between classes."""
    return re.split(r"(?:^|\.)\d+\.", name, maxsplit=1)[-1]


def checkpoint_names(
    folder: Path, originals: Mapping[str, Tensor], aliases: Places = MappingProxyType({})
) -> dict[str, list[str]]:
    """The checkpoint's name for each parameter, where the same values lie; one for each part that lies apart."""
    where, names = list_shards(folder), {}
    for name, parts in list_candidates(folder, originals, aliases).items():
        matches = [[key for key in keys if stores_values(where[key], key, part)] for keys, part in parts]
        if any(len(keys) != 1 for keys in matches):
            raise SrmuError(f"{folder} does not store {name} in this form, once: cannot write it back")
        names[name] = [key for (key,) in matches]
    return names


def list_candidates(
    folder: Path, originals: Mapping[str, Tensor], aliases: Places = MappingProxyType({})
) -> dict[str, list[tuple[list[str], Tensor]]]:
    """The parts of each parameter with the names of stored tensors that may hold them; SrmuError where there is none.

    `aliases` are the names of a parameter that stands in several places, such as a tied head: each may be stored, too.
    """
    entries, found = stored_entries(folder), {}
    renamed = {key: rename_stored(key) for key in entries}
    for name, original in originals.items():
        close = ([key for key in entries if are_alike(renamed[key], one)] for one in aliases.get(name, [name]))
        parts = [(keys, original) for keys in close if keys]
        if not parts:
            # transformers may give it another name: embed_out of GPT-NeoX is its lm_head
            layer = [key for key in entries if layer_number(key) == layer_number(name)]
            parts = [([key for key in layer if entries[key]["shape"] == [*original.shape]], original)]
            if not parts[0][0] and original.ndim == 3:  # experts, whose gate and up projection may lie apart, too
                inside = [[key for key in layer if expert_of(key) == i] for i in range(len(original))]
                shapes = [entries[key]["shape"] for key in inside[0]]
                heights = {shape[0] for shape in shapes if shape[1:] == [*original.shape[2:]]}
                fits = [n for n in heights if n <= original.shape[1] and original.shape[1] % n == 0]
                pieces = [part.split(max(fits, default=len(part))) for part in original]
                parts = [(keys, piece) for keys, part in zip(inside, pieces, strict=True) for piece in part]
        parts = [([key for key in keys if entries[key]["shape"] == [*part.shape]], part) for keys, part in parts]
        if not all(keys for keys, _ in parts):
            raise SrmuError(f"{folder} does not store {name} in this form: cannot write it back")
        found[name] = parts
    return found


def expert_of(name: str) -> int | None:
    """The expert that a tensor belongs to, by the second number in its name."""
    numbers = re.findall(r"\.(\d+)(?=\.)", name)
    return int(numbers[1]) if len(numbers) == 2 else None


def stores_values(path: Path, key: str, original: Tensor) -> bool:
    """Whether a stored tensor holds those values; SrmuError if it holds NaN or infinity."""
    stored, values = stored_tensor(path, key), original.cpu().nan_to_num()
    if stored.shape != values.shape or not torch.equal(stored.to(values.dtype).nan_to_num(), values):
        return False
    if not stored.isfinite().all():
        raise SrmuError(f"{path} stores NaN or infinity in {key}; fetch it again")
    return True


def are_alike(a: str, b: str) -> bool:
    """Whether two tensor names differ only by a prefix, such as `transformer.`."""
    return a == b or a.endswith("." + b) or b.endswith("." + a)


def save_delta(path: Path, folder: Path, names: Places, changed: Tensors, metadata: dict[str, Any]) -> None:
    """Write the changed tensors under their `checkpoint_names`, in the dtypes of the checkpoint."""
    where = list_shards(folder)
    delta, marks = {}, {}
    for name, tensor in changed.items():
        if not tensor.isfinite().all():
            raise SrmuError(f"{name} holds NaN or infinity; nothing was saved")
        keys = names[name]
        old = [stored_tensor(where[key], key) for key in keys]
        for key, stored, part in zip(keys, old, split_parts(tensor, keys, old[0]), strict=True):
            delta[key] = part.detach().cpu().to(stored.dtype, copy=len(keys) > 1).contiguous()
            marks[key] = sha256(flat_bytes(stored))
    metadata = {"places": {name: names[name] for name in changed}, **metadata, "base": marks}
    temporary = path.with_name(f".{path.name}")
    # one entry, as safetensors writes several in an order that differs between processes
    save_file(delta, temporary, {"srmu": json.dumps(metadata, sort_keys=True)})
    temporary.replace(path)


def split_parts(tensor: Tensor, keys: Sequence[str], stored: Tensor) -> Sequence[Tensor]:
    """The parts of a parameter that a checkpoint has under `keys`: each is all of it, or some of its rows."""
    if tensor.shape == stored.shape:
        return [tensor] * len(keys)
    return tensor.view(-1, tensor.shape[-1]).chunk(len(keys))


def load_delta(path: Path, folder: Path) -> tuple[Tensors, Places]:
    """The tensors of a delta by checkpoint name, and where they belong; SrmuError if its base model has changed."""
    where = list_shards(folder)
    try:
        delta = load_file(path)
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["srmu"])
            marks, places = about["base"], about["places"]
    except KeyError:
        raise SrmuError(f"{path} was written by another version of srmu; unlearn again, or use that version") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise SrmuError(f"{path} is damaged: {first_line(error)}") from error
    for key in delta:
        if key not in where or marks.get(key) != sha256(flat_bytes(stored_tensor(where[key], key))):
            raise SrmuError(f"{path} was made from another model than {folder} now is: {key} differs there")
    return delta, places


def stored_tensor(path: Path, key: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(key)


def apply_delta(module: torch.nn.Module, delta: Tensors, places: Places) -> None:
    """Copy the tensors of a delta into a loaded model, to the parameters from which they came."""
    parameters = dict(module.named_parameters())
    for name, keys in places.items():
        for i, key in enumerate(keys):
            if key not in delta:
                continue
            part = split_parts(parameters[name].data, keys, delta[key])[i] if name in parameters else None
            if part is None or part.shape != delta[key].shape:
                raise SrmuError(
                    f"the delta's tensor {key} does not fit the parameter {name} of {type(module).__name__}"
                )
            part.copy_(delta[key])


def export_checkpoint(
    folder: Path,
    delta: Tensors,
    out: Path,
    link: bool | None = None,
    watch: Watch = ignore_progress,
    texts: dict[str, str] | None = None,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a full checkpoint: the files of the base, with the tensors of the delta, and `texts` by file name.

    It appears in its place only after `check` of the folder that holds it. Shards without a changed tensor become hard
    links if `link` is true, and by default where the base lies in the hub's cache, whose files nobody edits.
    """
    where = list_shards(folder)
    if lost := sorted(set(delta) - set(where)):
        raise SrmuError(f"the model {folder} has no tensor {lost[0]}; is it another model?")
    patched = {where[name] for name in delta}
    files = [folder / name for name in list_carried(folder)]
    require_space(out, sum(file.stat().st_size for file in files if not link))
    with whole_folder(out) as temporary, watch("writing files", len(files)) as tick:
        for file in files:
            copy = temporary / file.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            share = file.is_symlink() if link is None else link
            if share and file in where.values() and file not in patched:
                with suppress(OSError):  # on another file system: copied
                    copy.hardlink_to(file.resolve())
            if not copy.exists():
                shutil.copyfile(file.resolve(), copy)
            tick(file.name)
        for path in sorted(patched):
            patch_file(temporary / path.name, {n: t for n, t in delta.items() if where[n] == path})
        for name, text in (texts or {}).items():
            write_whole(temporary / name, text)
        check(temporary)


def list_carried(folder: Path) -> list[str]:
    """The files of a checkpoint that an export includes; weights not loaded are not, as they would keep old tensors."""
    loaded = set(list_shards(folder).values())
    files = [file for file in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")) if file.is_file()]
    stale = (INDEX,) if folder / "model.safetensors" in loaded else ()  # of shards that are not loaded
    wanted = (file for file in sorted(files) if file in loaded or (file.suffix in CARRIED and file.name not in stale))
    return [file.relative_to(folder).as_posix() for file in wanted if not file.name.startswith((".", EXPORTED))]


def patch_file(path: Path, tensors: Tensors) -> None:
    """Overwrite tensors of a safetensors file in place; dtype, shape and position stay."""
    entries, start = read_header(path)
    with path.open("r+b") as file:
        for name, tensor in tensors.items():
            entry = entries[name]
            if (TYPES.get(entry["dtype"]), entry["shape"]) != (tensor.dtype, list(tensor.shape)):
                raise SrmuError(f"{name} has another type or shape in the model; is it another model?")
            file.seek(start + entry["data_offsets"][0])
            file.write(flat_bytes(tensor))


def identify_base(folder: Path, depth: int | None) -> str:
    """A digest that tells the first layers of two models apart without reading them whole.

    It covers the size, time of change and header of each file, and, as `cp -p` keeps times, three pages of each tensor.
    """
    code = hashlib.sha256()
    for path in sorted(set(list_shards(folder).values())):
        entries, start = read_header(path)
        stat = path.stat()
        code.update(json.dumps([path.name, stat.st_size, stat.st_mtime_ns, stat.st_ino, entries]).encode())
        spans = [e["data_offsets"] for n, e in entries.items() if depth is None or (layer_number(n) or 0) < depth]
        with path.open("rb") as file:
            for low, high in spans:
                for place in (low, (low + high) // 2, max(low, high - PAGE)):
                    file.seek(start + place)
                    code.update(file.read(min(PAGE, high - place)))
    return code.hexdigest()


def fingerprint_model(folder: Path) -> str:
    """SHA-256 over a model's weights, config and tokenizer."""
    names = sorted(p for p in folder.iterdir() if p.suffix in {".safetensors", *CARRIED} - {".md", ""})
    return sha256(*(part for path in names for part in (path.name.encode(), path)))


def changed_fingerprint(base: str, delta: Tensors) -> str:
    """The fingerprint of a model with a delta, whose base has the fingerprint `base`."""
    changes = (part for name, tensor in sorted(delta.items()) for part in (name.encode(), flat_bytes(tensor)))
    return sha256(base.encode(), *changes)
