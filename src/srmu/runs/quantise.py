"""A run's full model with rounded weights, as it is served: a GGUF file, or a folder in NF4 or FP8."""

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from srmu.engine import weights
from srmu.engine.files import carry_files, read_json, whole_folder, write_json, write_whole
from srmu.engine.loading import load_module, load_pretrained
from srmu.engine.losses import average_means, mean_nll
from srmu.engine.model import EditableModel
from srmu.engine.progress import Watch, ignore_progress
from srmu.engine.sites import is_stack
from srmu.engine.topic import move_batch
from srmu.errors import SrmuError, first_line
from srmu.runs.model_card import write_model_card
from srmu.runs.plan import load_topics
from srmu.runs.run import CARD, Run, open_target

Costs = dict[str, dict[str, float]]  # by role, then before, after, rounded

KINDS = ("q4_0", "q8_0", "nf4", "fp8")
LIBRARIES = {"q4_0": "gguf", "q8_0": "gguf", "nf4": "bitsandbytes"}  # beside those that are always here
# What is rounded in a GGUF file; norms, routers and convolutions are not.
ROUNDED = re.compile(
    r"(blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)(_exps|_shexp)?)|token_embd|output)\.weight"
)
BATCHES = 2  # of each role and topic, on which rounding is measured
BLOCKS = (128, 64, 32, 16)  # rows and columns that share a scale in FP8: the first that divides all sizes
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def export_quantised(
    run: Run, out: Path, kind: str, watch: Watch = ignore_progress, *, last_good: bool = False
) -> tuple[Path, Costs]:
    """Write the model of a run to the folder `out`, rounded as `kind` says: what to load, and what a token costs it.

    Refuses as `Run.export` does.
    """
    if kind not in KINDS:
        raise SrmuError(f"--quantise {kind} is none of {', '.join(KINDS)}")
    run.require_model(last_good)
    if kind in LIBRARIES and find_spec(LIBRARIES[kind]) is None:
        raise SrmuError(f"--quantise {kind} takes a library: pip install {LIBRARIES[kind]}")
    writers: dict[str, Callable[[Run, str, Path], Path]] = {"nf4": write_nf4, "fp8": write_fp8}
    with whole_folder(out) as folder:
        try:
            name = writers.get(kind, write_gguf)(run, kind, folder).name
        except SrmuError:
            raise
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise SrmuError(f"{run.folder} cannot be written as {kind}: {first_line(error)}") from error
        write_whole(folder / CARD, write_model_card(run.record, kind))
    place = out if name == folder.name else out / name
    return place, compare_costs(run, place, watch)


@torch.no_grad()
def compare_costs(run: Run, place: Path, watch: Watch = ignore_progress) -> Costs:
    """What a forget and a retain token of the run's first batches cost the original, its model and that one rounded.

    In nats; empty where the run's texts are no longer here.
    """
    opened = open_target(run, "cpu")
    try:
        topics = load_topics(run.config, opened.tokenizer)
    except (SrmuError, OSError):
        return {}
    costs: Costs = {}

    def measure(when: str, module: Any, tick: Callable[[str], None]) -> None:
        model = EditableModel(module, ())
        for role in ("forget", "retain"):
            batches = [batch for topic in topics for batch in getattr(topic, role)[:BATCHES]]
            batches = [move_batch(batch, module.device) for batch in batches]
            means = [mean_nll(model.logits(batch), batch["labels"]) for batch in batches]
            costs.setdefault(role, {})[when] = average_means(means)
        tick(when)

    with watch("measuring what rounding does", 3) as tick:
        for when, module in opened.states():
            measure(when, module, tick)
        del module, opened  # two models at once may not fit into memory
        measure("rounded", load_module(weights.locate_model(str(place))), tick)
    return costs


def write_gguf(run: Run, kind: str, folder: Path) -> Path:
    """The GGUF file that the run's model came from, with its matrices rounded anew; what else it says stays."""
    import gguf

    source = Path(run.config.model).expanduser()
    if source.suffix != ".gguf":
        advice = "export without --quantise, then use llama.cpp's convert_hf_to_gguf.py and llama-quantize"
        raise SrmuError(f"--quantise {kind} needs the GGUF file that the model came from; {run.base} is none: {advice}")
    reader, target = gguf.GGUFReader(source), gguf.GGMLQuantizationType[kind.upper()]
    arch = str(reader.fields["general.architecture"].contents())
    changed = place_changes(run, reader, arch)
    path = folder / f"{source.stem}-{run.config.method.name}-{kind}.gguf"
    writer = gguf.GGUFWriter(path, arch)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    if "general.quantization_version" not in reader.fields:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if "general.alignment" in reader.fields:
        writer.data_alignment = int(reader.fields["general.alignment"].contents())
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    for tensor in reader.tensors:
        fits = ROUNDED.fullmatch(tensor.name) and tensor.shape[0] % gguf.GGML_QUANT_SIZES[target][0] == 0
        wanted = target if fits else tensor.tensor_type
        data = tensor.data
        if tensor.name in changed or wanted != tensor.tensor_type:
            values = changed.get(tensor.name)
            plain = gguf.dequantize(tensor.data, tensor.tensor_type) if values is None else values.numpy()
            data = gguf.quantize(plain, wanted)
        writer.add_tensor(tensor.name, data, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def place_changes(run: Run, reader: Any, arch: str) -> dict[str, Tensor]:
    """The changed tensors in float32, by their names in a GGUF file and with their rows in its order."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = int(reader.fields[f"{arch}.block_count"].contents())
    names, held = gguf.get_tensor_name_map(kinds[arch], blocks), {tensor.name: tensor for tensor in reader.tensors}
    where, placed = weights.list_shards(run.base), {}
    for key, new in run.delta.items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        order = None
        if name is not None and name in held:
            old = weights.stored_tensor(where[key], key)
            there = torch.from_numpy(gguf.dequantize(held[name].data, held[name].tensor_type).copy()).to(old.dtype)
            order = find_order(old, there)
        if name is None or order is None:
            raise SrmuError(f"the GGUF file holds {key} in another form; export without --quantise")
        placed[name] = new[order].float().contiguous()
    return placed


def find_order(rows: Tensor, others: Tensor) -> Tensor | None:
    """Which of `rows` each row of `others` is, as llama.cpp reorders some matrices; None if that is not clear."""
    if torch.equal(rows, others):
        return torch.arange(len(rows))
    places = {weights.flat_bytes(row).tobytes(): i for i, row in enumerate(rows)}
    found = [places.get(weights.flat_bytes(row).tobytes()) for row in others]
    return torch.tensor(found) if len(places) == len(rows) and {*found} == {*range(len(rows))} else None


def write_nf4(run: Run, kind: str, folder: Path) -> Path:
    """A folder that bitsandbytes reads, with 4-bit numbers spaced as those of a normal distribution."""
    from transformers import BitsAndBytesConfig

    with TemporaryDirectory(dir=folder.parent) as scratch:
        full = run.export(Path(scratch) / "full", last_good=True)
        _, others = list_maps(load_pretrained(full), kind)
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=others,
        )
        load_pretrained(full, quantization_config=settings).save_pretrained(folder)
    carry_files(run.base, folder)
    return folder


def write_fp8(run: Run, kind: str, folder: Path) -> Path:
    """A folder in transformers' own FP8: each linear map of the text model as e4m3 numbers with a scale a block."""
    with TemporaryDirectory(dir=folder.parent) as scratch:
        module = load_pretrained(run.export(Path(scratch) / "full", last_good=True))
    tensors, (chosen, others) = module.state_dict(), list_maps(module, kind)
    sizes = {size for name in chosen for size in tensors[f"{name}.weight"].shape}
    block = next((size for size in BLOCKS if all(one % size == 0 for one in sizes)), 0)
    if not block:
        raise SrmuError(f"--quantise {kind}: no block of {BLOCKS[-1]} or more divides the sizes {sorted(sizes)}")
    for name in chosen:
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = round_fp8(tensors[f"{name}.weight"], block)
    module.save_pretrained(folder, state_dict=tensors)
    settings = read_json(folder / "config.json")
    settings["quantization_config"] = {
        "quant_method": kind,
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
        "modules_to_not_convert": others,
    }
    write_json(folder / "config.json", settings)
    carry_files(run.base, folder)
    return folder


def list_maps(module: Any, kind: str) -> tuple[list[str], list[str]]:
    """The linear maps of a model's text layers, which are rounded, and all others; SrmuError where others matter."""
    text, head = module.get_decoder(), module.get_output_embeddings()
    if any(is_stack(name, parameter) for name, parameter in text.named_parameters()):
        raise SrmuError(f"--quantise {kind} writes no experts; export without it, then use llm-compressor")
    inside = {id(part) for part in text.modules()} - {id(head)}
    maps = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    chosen = [name for name, part in maps.items() if id(part) in inside]
    if not chosen:
        raise SrmuError(f"--quantise {kind} rounds nn.Linear, of which {type(module).__name__} has none in its layers")
    return chosen, [name for name in maps if name not in chosen]


def round_fp8(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """A matrix as e4m3 numbers and what to multiply each block of them by."""
    rows, columns = weight.shape
    blocks = weight.detach().float().reshape(rows // block, block, columns // block, block)
    scale = (blocks.abs().amax((1, 3)) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(weight.shape), scale
