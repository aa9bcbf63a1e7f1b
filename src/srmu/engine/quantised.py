"""Quantised checkpoints: FP8 and MXFP4 are dequantised to bfloat16 once; all others are refused with advice."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from srmu.engine.converted import drop_quantisation, hash_folders, keep_folder
from srmu.engine.files import cache_dir, format_gb, read_json, require_space
from srmu.engine.progress import print_line
from srmu.engine.text_part import find_loader
from srmu.errors import SrmuError, first_line

# What transformers itself dequantises, rounded to bfloat16.
DEQUANTISED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
ORIGIN = "name the model that it was quantised from"
WAYS_OUT = {
    "bitsandbytes": f"{ORIGIN}, or load it with bitsandbytes and save what model.dequantize() makes of it",
    "compressed-tensors": f"{ORIGIN}, or load it with CompressedTensorsConfig(run_compressed=False) and save that",
    "mlx": f"{ORIGIN}, or have mlx_lm.convert --dequantize write it out",
}


def name_quantisation(settings: Any) -> tuple[str, Any]:
    """The kind of quantisation that a part of a config describes, and its bits; "" where there is none."""
    if not settings:
        return "", None
    found = settings.to_dict() if hasattr(settings, "to_dict") else settings if isinstance(settings, dict) else {}
    mlx = {"group_size", "bits"} <= found.keys() and not found.get("quant_method")
    kind = "mlx" if mlx else found.get("quant_method") or "in an unknown way"
    return str(getattr(kind, "value", kind)), found.get("bits")


def refuse_quantised(model: str | Path, config: Any, later: Collection[str] = ()) -> None:
    """SrmuError for a quantised model, unless its kind is in `later`: dequantised once its weights are here."""
    kind, bits = name_quantisation(
        getattr(config, "quantization_config", None) or getattr(config, "quantization", None)
    )
    if kind and kind not in later:
        many = f" with {bits} bits" if bits else ""
        raise SrmuError(f"model {model} is quantised ({kind}{many}); {WAYS_OUT.get(kind, ORIGIN)}")


def dequantise_folder(folder: Path) -> Path:
    """The folder to load: for a model in FP8 or MXFP4 its copy in bfloat16, made once; else the folder itself."""
    try:
        settings = read_json(folder / "config.json", {})
    except SrmuError:  # `read_config` says what is wrong with it
        return folder
    kind, _ = name_quantisation(settings.get("quantization_config") if isinstance(settings, dict) else None)
    if kind not in DEQUANTISED or not any(folder.glob("*.safetensors")):  # a plan needs the config alone
        return folder
    digest = hash_folders(folder)
    place = cache_dir() / "dequantised" / digest
    if not (place / "model").is_dir():
        write_dequantised(folder, kind, place, {"folder": folder.name, "sha256": digest, "quantisation": kind})
    return place / "model"


def write_dequantised(folder: Path, kind: str, place: Path, source: dict[str, Any]) -> None:
    """Write the model of a folder, dequantised by transformers, to `place/model`."""
    import transformers

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) * (4 if kind == "mxfp4" else 2)
    require_space(place, size)
    print_line(f"dequantising {folder} ({kind}), once, to {format_gb(size)} at most in {place}")
    settings = getattr(transformers, DEQUANTISED[kind])(dequantize=True)
    given = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        loader = find_loader(folder)
        module, info = loader.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=settings, **given)
        refuse_incomplete(folder, info)
        module = module.to(torch.bfloat16)  # with what is not quantised
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise SrmuError(f"model {folder} cannot be dequantised: {first_line(error)}; {ORIGIN}") from error
    keep_folder(drop_quantisation(module), tokenizer, place, {"quantised": source}, beside=folder)


def refuse_incomplete(folder: Path, info: dict[str, Any]) -> None:
    """ValueError where tensors are missing, or an FP8 tensor lacks the scale that transformers looks for."""
    held: set[str] = set()
    rounded = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                held.add(name)
                rounded += [name] if file.get_slice(name).get_dtype().startswith("F8_E4") else []
    if lost := [name for name in rounded if f"{name}_scale_inv" not in held]:
        raise ValueError(f"it holds {lost[0]} in FP8 without {lost[0]}_scale_inv")
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} tensors, the first is {missing[0]}")
