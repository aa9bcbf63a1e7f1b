"""Models in GGUF files: dequantised once, through transformers, into an ordinary folder in the cache."""

from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from srmu.engine.files import cache_dir, cached, format_gb, read_json, require_space, sha256, whole_folder, write_json
from srmu.engine.progress import print_line
from srmu.errors import SrmuError, first_line

SOURCE = "gguf.json"  # beside the folder of a model: the file that it was made from


def convert_gguf(path: Path) -> Path:
    """The folder of the model in a GGUF file, in bfloat16; SrmuError where transformers cannot dequantise it."""
    stat = path.stat()
    key = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]  # a file that stays as it is need not be read again
    place = cache_dir() / "gguf" / cached("hashes", key, partial(sha256, path))
    folder = place / "model"
    if not folder.is_dir():
        write_folder(path, place)
    return folder


def write_folder(path: Path, place: Path) -> None:
    """Dequantise a GGUF file into `place/model`, and write beside it what the file is."""
    if find_spec("gguf") is None:
        raise SrmuError(f"{path}: to read GGUF files takes a library: pip install gguf (or srmu[real])")
    source = describe_gguf(path, place.name)
    require_space(place, 2 * source["parameters"])
    size = f"{format_gb(path.stat().st_size)}, {source['quantisation']}"
    print_line(f"dequantising {path} ({size}), once, to {format_gb(2 * source['parameters'])} in {place}")
    try:
        given: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **given)
        if hasattr(transformers, "GgufConfig"):  # before it there was no other way than to dequantise
            given["quantization_config"] = transformers.GgufConfig(dequantize=True)
        module = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.bfloat16, **given)
    except Exception as error:  # transformers and gguf raise many kinds
        advice = "name its safetensors checkpoint instead"
        raise SrmuError(f"{path} cannot be dequantised: {first_line(error)}; {advice}") from error
    settings = module.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(module)(type(module.config)(**settings))  # not marked as quantised, which cannot be saved
    plain.load_state_dict(module.state_dict(), assign=True)
    plain.tie_weights()
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / SOURCE, source)
    try:
        with whole_folder(place / "model") as scratch:
            plain.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
    except OSError:
        if not (place / "model").is_dir():  # else another process was first
            raise


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


def read_source(folder: Path) -> dict[str, Any] | None:
    """What `describe_gguf` said of the file that a model's folder was made from; None where there was none."""
    return read_json(folder.parent / SOURCE) if (folder.parent / SOURCE).is_file() else None
