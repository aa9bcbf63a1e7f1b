"""Load a checkpoint no deeper than needed, and refuse models that cannot be cut.

The module is built from a config with fewer layers if that gives the same layers. If not, it is built whole and cut,
which is nearly as cheap unless loading converts tensors (another dtype, stacked experts).
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from srmu.engine.converted import ADAPTER
from srmu.engine.devices import computes_bf16
from srmu.engine.text_part import (
    PREFIXES,
    choose_class,
    find_loader,
    find_whole_class,
    is_language_model,
    keep_text,
    list_placeholders,
    open_config,
    take_text_config,
)
from srmu.engine.weights import in_layer, is_there, layer_number, stored_entries, stored_types
from srmu.errors import SrmuError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_config(folder: Path) -> Any:
    """The configuration of a model, of its text part if it also reads images; SrmuError where there is none."""
    import transformers

    if not (folder / "config.json").is_file():
        files = sorted(folder.glob("*.gguf"))
        if (folder / "record.json").is_file():
            raise SrmuError(f"{folder} is a run, not a model: srmu export {folder} OUT writes its model")
        if runs := sorted(folder.glob("*/record.json")):
            raise SrmuError(f"{folder} is a folder of runs: name one of them, such as {runs[0].parent}")
        if (folder / "model" / "config.json").is_file():
            raise SrmuError(f"model folder {folder} has no config.json; name the model in it: {folder / 'model'}")
        meant = f"the GGUF file in it: {files[0]}" if len(files) == 1 else "a Hugging Face model"
        raise SrmuError(f"model folder {folder} has no config.json; name {meant}")
    if (folder / ADAPTER).is_file():  # transformers would put it on top, unsaid
        mend = f"merge it (merge_and_unload) into a folder of its own, or take {ADAPTER} out"
        raise SrmuError(f"model folder {folder} holds an adapter beside the model: {mend}")
    whole = open_config(folder)
    config, kind, name = take_text_config(whole), whole.model_type, str((whole.architectures or ["none named"])[0])
    if not is_language_model(name, whole) or (config is not whole and not hasattr(transformers, name)):
        what = f"{folder} is not a causal language model: its architecture is {name}"
        raise SrmuError(f"{what}; srmu needs one that transformers loads with AutoModelForCausalLM")
    if whole is config and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SrmuError(f"{folder} is of type {kind}, which AutoModelForCausalLM does not load")
    if not hasattr(config, "num_hidden_layers"):
        raise SrmuError(f"{folder} has no single stack of decoder layers (num_hidden_layers); srmu needs one")
    refuse_sharing(config)
    return config


def refuse_sharing(config: Any) -> None:
    """SrmuError if layers share keys and values and transformers is too old to do so without a cache."""
    release = version("transformers")
    if getattr(config, "num_kv_shared_layers", None) and tuple(map(int, release.split(".")[:2])) < (5, 6):
        what = f"layers of {config.model_type} share keys and values, which transformers {release} computes wrongly"
        raise SrmuError(f"{what}; install transformers 5.6 or later")


def check_layers(config: Any, layer: int, window: int = 1) -> None:
    """SrmuError if the layer, or the window of updated layers ending there, does not exist."""
    count = config.num_hidden_layers
    if not 0 <= layer < count:
        raise SrmuError(f"layer {layer} does not exist: this model has {count} layers (0-{count - 1})")
    # Gemma 3n and 4: the last layers read keys and values of earlier ones, which cannot be recorded.
    sharing = getattr(config, "num_kv_shared_layers", None) or 0
    if layer >= count - sharing:
        what = f"layer {layer} takes its keys and values from an earlier layer, as the last {sharing} of this model do"
        raise SrmuError(f"{what}; choose method.layer below {count - sharing}")
    if not 1 <= window <= layer + 1:
        what = f"a window of {window} layers ending at layer {layer} is impossible"
        raise SrmuError(f"{what}: use method.window=1 to {layer + 1}")


def load_module(folder: Path, dtype: str = "auto", depth: int | None = None) -> PreTrainedModel:
    """A checkpoint, whole if a module of `depth` layers would differ; SrmuError if a tensor is missing."""
    config = read_config(folder)
    missing = []
    if depth is not None and depth < config.num_hidden_layers:
        missing = lost_tensors(folder, config)
        config = cut_config(config, depth) or config
    options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    if find_whole_class(folder):
        options["key_mapping"] = PREFIXES
    module, info = load_pretrained(folder, choose_class(config), config=config, **options)
    if missing := missing or sorted(info["missing_keys"]):
        what = f"model {folder} lacks {len(missing)} tensors, the first is {missing[0]}"
        raise SrmuError(f"{what}; transformers would fill them with random numbers")
    if head := module.get_output_embeddings():
        head.register_forward_pre_hook(make_contiguous)
    return module


def make_contiguous(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Put what the head reads side by side in memory: otherwise torch copies a frozen head once for each text."""
    return tuple(value.contiguous() for value in args)


def choose_dtype(folder: Path, device: str, dtype: str = "auto") -> str:
    """The dtype to load a model in: `auto`, the checkpoint's own, becomes float32 where that is much faster.

    So it is on a processor that does not compute in bfloat16, if the model then takes at most half of the memory.
    """
    if dtype != "auto" or device != "cpu" or not is_there(folder) or computes_bf16():
        return dtype
    return "float32" if widens_within(folder) else dtype


def widens_within(folder: Path) -> bool:
    """Whether a 16-bit model takes at most half of the memory in float32; False where none of it has 16 bits."""
    entries = [one for one in stored_entries(folder).values() if one["dtype"] in ("BF16", "F16")]
    size = sum(one["data_offsets"][1] - one["data_offsets"][0] for one in entries)
    return bool(entries) and 2 * size <= psutil.virtual_memory().total / 2


def load_pretrained(folder: Path, loader: Any = None, **options: Any) -> Any:
    """What transformers loads from a folder; without options, as its user would, with the images that it reads."""
    loader = loader or find_loader(folder)
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else it lists the layers that were left out
    try:
        return loader.from_pretrained(folder, **options)
    except (SafetensorError, ImportError, OSError, ValueError, RuntimeError) as error:
        raise SrmuError(f"model {folder} cannot be loaded: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


@torch.no_grad()
def sample_logits(module: PreTrainedModel, folder: Path) -> Tensor:
    """Logits for a few texts of random tokens, to compare two loaded forms of the model in `folder`."""
    size = len(next(module.get_input_embeddings().parameters()))
    tokens = torch.randint(size, (2, 8), generator=torch.Generator().manual_seed(0))
    for place in list_placeholders(folder):
        tokens[tokens == place] = 0
    tokens = tokens.to(module.device)
    return module(input_ids=tokens, use_cache=False).logits.float().cpu()


def lost_tensors(folder: Path, config: Any) -> list[str]:
    """Tensors of a layer that the checkpoint lacks although it has them for another layer."""
    types = keep_text(folder, stored_types(folder), partial(build_skeleton, config))
    stored = {(layer_number(name), in_layer(name)) for name in types}
    known = {name for layer, name in stored if layer is not None}
    wanted = {name: in_layer(name) for name, _ in build_skeleton(config).named_parameters()}
    return sorted(n for n, inside in wanted.items() if inside in known and (layer_number(n), inside) not in stored)


def build_skeleton(config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The module of a configuration, without memory for its tensors."""
    with torch.device("meta"):
        # A copy: building writes the dtype into the config.
        module = choose_class(config).from_config(deepcopy(config), dtype=dtype or config.dtype)
    module.tie_weights()  # transformers 5.0 leaves the ends of such a module untied
    return module


def needs_conversion(folder: Path, config: Any, dtype: str) -> bool:
    """Whether loading makes new tensors, because the dtype or the layout differs."""
    types = keep_text(folder, stored_types(folder), partial(build_skeleton, config))
    stored = {name: t for name, t in types.items() if t.is_floating_point}
    wanted = wanted_dtype(config, dtype)
    if wanted is not None and {*stored.values()} != {wanted}:
        return True
    known = {in_layer(name) for name in stored}
    return any(
        in_layer(name) not in known
        for name, _ in build_skeleton(config).named_parameters()
        if layer_number(name) is not None
    )


def wanted_dtype(config: Any, dtype: str) -> torch.dtype | None:
    """The dtype after loading; None where `auto` finds none in the config: as stored."""
    value = config.dtype if dtype == "auto" else dtype
    return getattr(torch, value) if isinstance(value, str) else value


def cut_config(config: Any, depth: int) -> Any | None:
    """The configuration of the first `depth` layers; None if these would differ from those of the whole model."""
    count = config.num_hidden_layers
    short = deepcopy(config)
    try:
        short.num_hidden_layers = depth
        for name, value in vars(config).items():
            if isinstance(value, list | tuple) and len(value) == count:
                setattr(short, name, value[:depth])
        # some models count a pattern of layers from the end: both are built, without memory, and compared
        whole, cut = (describe_module(build_skeleton(c)) for c in (config, short))
    except Exception:  # architectures refuse a depth in many ways
        return None
    kept = {k: v for k, v in whole.items() if not any(f".{i}." in f".{k}." for i in range(depth, count))}
    return short if kept == cut else None


def describe_module(module: nn.Module) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for name, part in module.named_modules():
        settings = {k: v for k, v in vars(part).items() if isinstance(v, bool | int | float | str | None)}
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        parts[name] = (type(part).__name__, settings, {k: (t.shape, t.dtype) for k, t in tensors})
    return parts


def find_layers(module: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that owns the list of decoder layers, and that list's attribute name."""
    refuse_sharing(module.config)
    count = module.config.num_hidden_layers
    for owner in module.base_model.modules():
        for attribute, inner in owner.named_children():
            if isinstance(inner, nn.ModuleList) and len(inner) == count:
                lists = [part for part in owner.children() if isinstance(part, nn.ModuleList) and len(part) == count]
                if len(lists) > 1:
                    raise SrmuError(
                        f"{type(module).__name__} keeps the parts of its layers in {len(lists)} lists; cannot be cut"
                    )
                return owner, attribute
    raise SrmuError(f"{type(module).__name__} has no list of {count} decoder layers; cannot be cut")
