"""A run's model with rounded weights, as it is served: a GGUF file, or a folder in NF4 or FP8."""

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
from srmu.engine.progress import Watch, ignore_progress, print_line
from srmu.engine.sites import is_stack
from srmu.engine.topic import move_batch
from srmu.errors import SrmuError, first_line
from srmu.runs.gguf_file import convert_to_gguf, rewrite_gguf
from srmu.runs.model_card import write_model_card
from srmu.runs.plan import load_topics
from srmu.runs.run import CARD, Run, open_target

Costs = dict[str, dict[str, float]]  # by role, then before, after, rounded

KINDS = ("q4_0", "q4_k", "q8_0", "nf4", "fp8")
LIBRARIES = {"q4_0": "gguf", "q4_k": "gguf", "q8_0": "gguf", "nf4": "bitsandbytes"}  # beside those that are always here
BATCHES = 2  # of each role and topic, on which rounding is measured
BLOCKS = (128, 64, 32, 16)  # rows and columns that share a scale in FP8: the first that divides all sizes
NF4_SIDE = 64  # what divides both sides of a matrix that bitsandbytes computes with on a processor
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def export_quantised(
    run: Run, out: Path, kind: str, watch: Watch = ignore_progress, *, last_good: bool = False
) -> tuple[Path, Costs]:
    """Write the model of a run, rounded as `kind` says, to the folder `out`.

    Returns what to load, and the costs before and after rounding. Refuses as `Run.export` does.
    """
    if kind not in KINDS:
        raise SrmuError(f"--quantise {kind} is none of {', '.join(KINDS)}")
    run.require_model(last_good)
    if kind in LIBRARIES and find_spec(LIBRARIES[kind]) is None:
        raise SrmuError(f"--quantise {kind} needs a library: pip install {LIBRARIES[kind]}")
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
    try:
        return place, compare_costs(run, place, watch)
    except (SrmuError, OSError, ValueError, RuntimeError, AssertionError) as error:
        # such as texts that are gone, or a file that a library cannot read
        print_line(f"what rounding does was not measured: {first_line(error)}")
        return place, {}


@torch.no_grad()
def compare_costs(run: Run, place: Path, watch: Watch = ignore_progress) -> Costs:
    """The mean loss of a forget and of a retain token, in nats: of the original, the run's model and the rounded one.

    It is measured on the run's first batches.
    """
    opened = open_target(run, "cpu")
    topics = load_topics(run.config, opened.tokenizer)
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
    """A GGUF file of the run's model: its base's own file with other matrices, or a new one."""
    write = rewrite_gguf if Path(run.config.model).suffix == ".gguf" else convert_to_gguf
    return write(run, kind, folder)


def write_nf4(run: Run, kind: str, folder: Path) -> Path:
    """A folder that bitsandbytes reads, with 4-bit numbers spaced as those of a normal distribution."""
    from transformers import BitsAndBytesConfig

    with TemporaryDirectory(dir=folder.parent) as scratch:
        full = run.export(Path(scratch) / "full", last_good=True)
        module = load_pretrained(full)
        chosen, others = list_maps(module, kind)
        sizes = sorted({size for name in chosen for size in module.get_submodule(name).weight.shape})
        if odd := [size for size in sizes if size % NF4_SIDE]:
            raise SrmuError(f"--quantise {kind}: bitsandbytes takes sides that {NF4_SIDE} divides, not {odd}")
        del module
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
    """A folder in transformers' own FP8: the text model's linear maps as e4m3 numbers, with one scale a block."""
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
    """The linear maps of a model's text layers, which are rounded, and all other linear maps.

    SrmuError where the layers hold experts, or no linear map at all.
    """
    text, head = module.get_decoder(), module.get_output_embeddings()
    if any(is_stack(name, parameter) for name, parameter in text.named_parameters()):
        raise SrmuError(f"--quantise {kind} writes no experts; export without it, then use llm-compressor")
    inside = {id(part) for part in text.modules()} - {id(head)}
    maps = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    chosen = [name for name, part in maps.items() if id(part) in inside]
    if not chosen:
        raise SrmuError(f"--quantise {kind} rounds nn.Linear, but the layers of {type(module).__name__} have none")
    return chosen, [name for name in maps if name not in chosen]


def round_fp8(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """A matrix as e4m3 numbers and what to multiply each block of them by."""
    rows, columns = weight.shape
    blocks = weight.detach().float().reshape(rows // block, block, columns // block, block)
    scale = (blocks.abs().amax((1, 3)) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(weight.shape), scale
