"""Tiny models in GGUF files."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

Q8 = gguf.GGMLQuantizationType.Q8_0
ARCHES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {}),
    "gemma3": (transformers.Gemma3TextConfig, {"head_dim": 8, "tie_word_embeddings": True}),
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
TOKENS = ["<s>", "</s>", "<pad>", "<unk>", "w", *"0123456789", *(f"x{i}" for i in range(49))]


def write_gguf(path: Path, arch: str = "llama", kind: Any = None, **sizes: int) -> dict[str, torch.Tensor]:
    """A random model as a GGUF file, its matrices quantised to `kind`; what they are after that, in bfloat16."""
    cls, more = ARCHES[arch]
    config = cls(**SIZES | more | sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    if arch == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
        writer.add_token_scores([-float(i) for i in range(len(TOKENS))])
    else:
        writer.add_token_merges(["w 1", "w 2"])  # older transformers reads one alone as a word
    writer.add_tokenizer_model("llama" if arch == "gemma3" else "gpt2")
    writer.add_token_list([*TOKENS[:15], "w1", "w2", *TOKENS[17:]])
    writer.add_token_types([3, 3, 3, 2] + [1] * (len(TOKENS) - 4))
    for add, token in zip((writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id), range(3)):  # noqa: B905
        add(token)
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], config.num_hidden_layers)
    expected = {}
    for name, tensor in module.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored, place = tensor.numpy(), names.get_name(name, try_suffixes=(".weight", ".bias"))
        if arch == "llama" and (heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])):
            half = stored.shape[0] // heads // 2  # llama.cpp stores the two halves of each head in turn
            stored = stored.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(stored.shape)
        if arch == "gemma3" and "norm" in name:
            stored = stored + 1
            tensor = torch.from_numpy(stored - 1)  # what is left of it
        if kind is None or stored.ndim == 1:
            writer.add_tensor(place, np.ascontiguousarray(stored))
            expected[name] = tensor.bfloat16()
        else:
            packed = gguf.quantize(stored, kind)
            writer.add_tensor(place, packed, raw_dtype=kind)
            # a block of 32 numbers has one scale, so that the order of rows does not matter
            expected[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind)).bfloat16()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
