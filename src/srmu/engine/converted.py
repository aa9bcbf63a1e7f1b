"""Models in GGUF files, and adapters of others: made an ordinary folder in the cache, once, by their libraries."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from safetensors import safe_open

from srmu.engine.files import (
    cache_dir,
    cached,
    carry_files,
    format_gb,
    read_json,
    require_space,
    sha256,
    whole_folder,
    write_json,
)
from srmu.engine.progress import print_line
from srmu.engine.text_part import find_loader
from srmu.errors import SrmuError, first_line

SOURCE = "srmu-source.json"  # beside the folder of a model: what it was made from
ADAPTER, ADAPTED = "adapter_config.json", "adapter_model.safetensors"


def convert_gguf(path: Path) -> Path:
    """The folder of the model in a GGUF file, in bfloat16; SrmuError where transformers cannot dequantise it."""
    place = cache_dir() / "gguf" / hash_file(path)
    if not (place / "model").is_dir():
        dequantise(path, place)
    return place / "model"


def hash_file(path: Path) -> str:
    """The SHA-256 of a file; one that stays as it is is not read again."""
    stat = path.stat()
    found: str = cached("hashes", [str(path.resolve()), stat.st_size, stat.st_mtime_ns], partial(sha256, path))
    return found


def hash_folders(*folders: Path) -> str:
    """One SHA-256 for the files of all folders together."""
    held = sorted(path for folder in folders for path in folder.iterdir() if path.is_file())
    return sha256(*(hash_file(path).encode() for path in held))


def merge_adapter(folder: Path, locate: Callable[[str, str | None], Path]) -> Path:
    """The folder of an adapter's base with the adapter in its weights; `locate` finds the base.

    SrmuError where the base is not found, or peft cannot put the adapter into it.
    """
    settings = read_json(folder / ADAPTER)
    named = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not (folder / ADAPTED).is_file():
        raise SrmuError(f"adapter {folder} has no {ADAPTED}; save it again with peft's save_pretrained")
    if not named or not isinstance(named, str):
        raise SrmuError(f"{folder / ADAPTER} names no base_model_name_or_path; write there which model it adapts")
    beside = (folder / named).resolve()
    wanted, revision = (str(beside), None) if beside.exists() else (named, settings.get("revision"))
    if folder.resolve() in list_chain(beside):
        raise SrmuError(f"{folder / ADAPTER} leads back to the adapter itself as its base")
    try:
        base = locate(wanted, None if Path(wanted).expanduser().exists() else revision)
    except SrmuError as error:
        raise SrmuError(f"the base of adapter {folder}: {error}") from error
    place = cache_dir() / "adapters" / hash_folders(folder, base)
    if not (place / "model").is_dir():
        source = {"file": folder.name, "sha256": hash_file(folder / ADAPTED), "base": str(named)}
        merge(folder, base, place, source)
    return place / "model"


def list_chain(folder: Path) -> list[Path]:
    """A folder, and where it is an adapter the folder of its base, and so on, up to one that comes again."""
    chain: list[Path] = []
    while folder not in chain:
        chain.append(folder)
        if not (folder / ADAPTER).is_file() or (folder / "config.json").is_file():
            break
        named = read_json(folder / ADAPTER).get("base_model_name_or_path")
        folder = (folder / str(named)).resolve()
    return chain


def merge(folder: Path, base: Path, place: Path, source: dict[str, Any]) -> None:
    """Write the base with an adapter in its weights to `place/model`."""
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    require_space(place, size)
    print_line(f"merging adapter {folder} with its base {source['base']}, once, to {format_gb(size)} in {place}")
    from transformers import AutoTokenizer

    try:
        given: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}
        module: Any = find_loader(base).from_pretrained(base, **given)
        module = put_adapter(module, folder)
        refuse_strays(folder, module)
        module = module.merge_and_unload()
        if not all(parameter.isfinite().all() for parameter in module.parameters()):
            raise ValueError("its weights are not finite")
        words = folder if any(folder.glob("tokenizer*")) else base
        tokenizer = AutoTokenizer.from_pretrained(words, trust_remote_code=False)
    except Exception as error:  # transformers and peft raise many kinds
        raise SrmuError(f"adapter {folder} cannot be merged with {base}: {first_line(error)}") from error
    keep_folder(module, tokenizer, place, {"adapter": source})


def refuse_strays(folder: Path, module: Any) -> None:
    """ValueError where an adapter's file holds tensors that have no place in the model."""
    from peft import get_peft_model_state_dict

    with safe_open(folder / ADAPTED, "pt") as file:
        held = {name for name in file.keys() if "lora_" in name}  # noqa: SIM118 (no mapping)
    if strays := sorted(held - get_peft_model_state_dict(module, save_embedding_layers=False).keys()):
        raise ValueError(f"it holds {len(strays)} tensors for which the base has no place, the first is {strays[0]}")


def put_adapter(module: Any, folder: Path) -> Any:
    """A model with an adapter beside its weights, as peft loads it."""
    from peft import PeftModel

    with catch_warnings(action="ignore"):  # of what peft asks transformers, which will change
        filterwarnings("error", message=".*missing adapter keys")  # it fits another model
        return PeftModel.from_pretrained(module, str(folder)).eval()


def dequantise(path: Path, place: Path) -> None:
    """Dequantise a GGUF file into `place/model`, and write beside it what the file is."""
    if find_spec("gguf") is None:
        raise SrmuError(f"{path}: reading GGUF files needs a library: pip install gguf (or srmu[real])")
    source = describe_gguf(path, place.name)
    require_space(place, 2 * source["parameters"])
    size = f"{format_gb(path.stat().st_size)}, {source['quantisation']}"
    print_line(f"dequantising {path} ({size}), once, to {format_gb(2 * source['parameters'])} in {place}")
    import transformers

    try:
        given: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **given)
        if hasattr(transformers, "GgufConfig"):  # before it there was no other way than to dequantise
            given["quantization_config"] = transformers.GgufConfig(dequantize=True)
        module = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.bfloat16, **given)
    except Exception as error:  # transformers and gguf raise many kinds
        advice = "name its safetensors checkpoint instead"
        raise SrmuError(f"{path} cannot be dequantised: {first_line(error)}; {advice}") from error
    keep_folder(drop_quantisation(module), tokenizer, place, {"gguf": source})


def keep_folder(
    module: Any, tokenizer: Any, place: Path, source: Mapping[str, Any], beside: Path | None = None
) -> None:
    """Write a model to `place/model`, whole or not at all, and beside it what it was made from.

    What else lies in the folder `beside`, such as a processor's files, comes with it.
    """
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / SOURCE, source)
    try:
        with whole_folder(place / "model") as scratch:
            module.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            if beside:
                carry_files(beside, scratch)
    except (OSError, SrmuError):
        if not (place / "model").is_dir():  # else another process was first
            raise


def drop_quantisation(module: Any) -> Any:
    """A dequantised model without the mark of quantisation in its config, with which transformers would not save it."""
    settings = module.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(module)(type(module.config).from_dict(settings))
    plain.load_state_dict(module.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = module.generation_config
    return plain


def describe_gguf(path: Path, digest: str) -> dict[str, Any]:
    """Name, digest, size and commonest quantisation of a GGUF file; SrmuError where it is not one."""
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(path).tensors
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise SrmuError(f"{path} is not a GGUF file: {first_line(error)}") from error
    kinds: Counter[str] = Counter()
    for tensor in tensors:
        kinds[tensor.tensor_type.name] += int(tensor.n_elements)
    quantisation = kinds.most_common(1)[0][0] if kinds else "none"
    return {"file": path.name, "sha256": digest, "parameters": kinds.total(), "quantisation": quantisation}


def read_source(folder: Path) -> dict[str, Any]:
    """What a model's folder was made from, a GGUF file, an adapter or quantised weights; else empty."""
    found = read_json(folder.parent / SOURCE, {}) if folder.name == "model" else {}
    return {kind: found[kind] for kind in ("gguf", "adapter", "quantised") if kind in found}
