"""A GGUF file of a run's model: the base's own file with other matrices, or a new one of a common architecture."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srmu.engine import weights
from srmu.engine.loading import read_config
from srmu.engine.progress import print_line
from srmu.engine.rounding import pack_q4_k, split_rows
from srmu.errors import SrmuError
from srmu.runs.plan import load_tokenizer
from srmu.runs.run import Run

# What is rounded; norms, routers and convolutions are not.
ROUNDED = re.compile(
    r"(blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)(_exps|_shexp)?)|token_embd|output)\.weight"
)
INSTEAD = {"q4_k": ("q5_0",)}  # where rows do not fill a block, as in llama.cpp
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # by model_type
SMALL = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
# How a tokenizer cuts text before it merges bytes, by llama.cpp's names.
SPLITS = {ENDINGS + SMALL % "": "qwen2", ENDINGS + SMALL % "{1,3}": "llama-bpe"}
ELSEWHERE = "export without --quantise, then use llama.cpp's convert_hf_to_gguf.py and llama-quantize"


def rewrite_gguf(run: Run, kind: str, folder: Path) -> Path:
    """Write the GGUF file of the base again, with the matrices of the run, rounded anew, and the rest as it was."""
    import gguf

    source = Path(run.config.model).expanduser()
    reader = gguf.GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    changed = place_changes(run, reader, arch)
    path = folder / f"{source.stem}-{run.config.method.name}-{kind}.gguf"
    writer = gguf.GGUFWriter(path, arch)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    if "general.alignment" in reader.fields:
        writer.data_alignment = int(reader.fields["general.alignment"].contents())
    for tensor in reader.tensors:
        wanted = choose_type(tensor.name, int(tensor.shape[0]), kind, tensor.tensor_type)
        data = tensor.data
        if tensor.name in changed or wanted != tensor.tensor_type:
            values = changed.get(tensor.name)
            plain = gguf.dequantize(tensor.data, tensor.tensor_type) if values is None else values.numpy()
            data = round_values(plain, wanted)
        writer.add_tensor(tensor.name, data, raw_dtype=wanted)
    finish_file(writer, kind, "general.quantization_version" in reader.fields)
    return path


def choose_type(name: str, width: int, kind: str, otherwise: Any) -> Any:
    """The type of a tensor with rows of that width: `kind` where it is to be rounded and its blocks fit."""
    import gguf

    if not ROUNDED.fullmatch(name):
        return otherwise
    for target in (gguf.GGMLQuantizationType[one.upper()] for one in (kind, *INSTEAD.get(kind, ()))):
        if width % gguf.GGML_QUANT_SIZES[target][0] == 0:
            return target
    print_line(f"{name} is not rounded: its rows of {width} numbers are no multiple of a block")
    return otherwise


def round_values(values: Any, target: Any) -> Any:
    """The bytes of an array in a GGUF type; gguf writes no Q4_K by itself."""
    import gguf

    if target != gguf.GGMLQuantizationType.Q4_K:
        return gguf.quantize(values, target)
    parts = split_rows(torch.from_numpy(values.copy()).flatten(0, -2))  # a copy, as a file's own array is read-only
    return torch.cat([pack_q4_k(rows) for rows in parts]).reshape(*values.shape[:-1], -1).numpy()


def place_changes(run: Run, reader: Any, arch: str) -> dict[str, Tensor]:
    """The changed tensors in float32, by their names in a GGUF file and with their rows in its order."""
    import gguf

    names = name_tensors(arch, int(reader.fields[f"{arch}.block_count"].contents()))
    held, where, placed = {tensor.name: tensor for tensor in reader.tensors}, weights.list_shards(run.base), {}
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


def convert_to_gguf(run: Run, kind: str, folder: Path) -> Path:
    """Write a new GGUF file of a run's model; SrmuError for an architecture or tokenizer that is not supported here."""
    import gguf

    settings = read_config(run.base)
    arch, rope = ARCHITECTURES.get(settings.model_type), settings.rope_parameters
    if arch is None:
        raise SrmuError(f"a {settings.model_type} is not written as a GGUF file here: {ELSEWHERE}")
    if rope.get("rope_type", "default") != "default" or getattr(settings, "use_sliding_window", False):
        raise SrmuError(f"{run.base} scales its positions or has sliding attention: {ELSEWHERE}")
    path = folder / f"{run.base.name}-{run.config.method.name}-{kind}.gguf"
    writer, heads = gguf.GGUFWriter(path, arch), settings.num_attention_heads
    shared = settings.num_key_value_heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    writer.add_name(run.base.name)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(settings.vocab_size)
    write_vocabulary(writer, load_tokenizer(run.base), settings.vocab_size)
    for name, values in read_tensors(run, arch, settings):
        if arch == "llama" and (match := re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)):
            count = heads if match[1] == "q" else shared
            # llama.cpp stores the two halves of each head in turn
            values = values.reshape(count, 2, len(values) // count // 2, -1).swapaxes(1, 2).reshape(values.shape)
        wanted = choose_type(name, values.shape[-1], kind, gguf.GGMLQuantizationType.F32)
        writer.add_tensor(name, round_values(np.ascontiguousarray(values), wanted), raw_dtype=wanted)
    finish_file(writer, kind, False)
    return path


def read_tensors(run: Run, arch: str, settings: Any) -> Iterator[tuple[str, Any]]:
    """The tensors of a run's model in float32, by their names in a GGUF file."""
    names = name_tensors(arch, settings.num_hidden_layers)
    for key, file in weights.list_shards(run.base).items():
        tensor = run.delta[key] if key in run.delta else weights.stored_tensor(file, key)
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise SrmuError(f"a GGUF file of this architecture has no place for {key}: {ELSEWHERE}")
        if name != "output.weight" or not settings.tie_word_embeddings:
            yield name, tensor.float().numpy()


def write_vocabulary(writer: Any, tokenizer: Any, size: int) -> None:
    """Write a tokenizer that merges bytes: tokens, merges, how it cuts text, special tokens and chat template."""
    import gguf

    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    model, cut = settings["model"], name_split(settings["pre_tokenizer"])
    if model["type"] != "BPE" or not cut or settings["normalizer"] not in (None, {"type": "NFC"}):
        raise SrmuError(f"the tokenizer of {tokenizer.name_or_path} is not one of those written here: {ELSEWHERE}")
    tokens = {number: (token, gguf.TokenType.NORMAL) for token, number in model["vocab"].items()}
    for one in settings["added_tokens"]:
        kind = gguf.TokenType.CONTROL if one["special"] else gguf.TokenType.USER_DEFINED
        tokens[one["id"]] = (one["content"], kind)
    every = [tokens.get(number, (f"[PAD{number}]", gguf.TokenType.UNUSED)) for number in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list([token for token, _ in every])
    writer.add_token_types([kind for _, kind in every])
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in model["merges"]])
    adders = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}
    for name, add in adders.items():
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            add(number)
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(bool(first) and first == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def name_split(settings: Any) -> str:
    """llama.cpp's name for the way in which a tokenizer cuts text before it merges bytes; "" for an unknown one."""
    parts = settings.get("pretokenizers", [settings]) if settings else []
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1]["use_regex"]:
        return SPLITS.get(parts[0]["pattern"].get("Regex", ""), "")
    return ""


def name_tensors(arch: str, blocks: int) -> Any:
    """What a GGUF file calls the tensors of an architecture."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[arch], blocks)


def finish_file(writer: Any, kind: str, versioned: bool) -> None:
    """Say how the numbers are rounded, and write the file."""
    import gguf

    writer.add_file_type(gguf.LlamaFileType["MOSTLY_" + {"q4_k": "Q4_K_S"}.get(kind, kind.upper())])
    if not versioned:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
