"""Pico models and tokenizers built from configs: no hub, no sockets, one thread."""

import os

os.environ["OMP_WAIT_POLICY"] = "passive"  # before torch is loaded
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from srmu.data.tokens import batch_rows, tokenise_texts
from srmu.engine.topic import Topic
from srmu.evals.subject import Subject

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
VOCABULARY = len(SPECIAL) + len(WORDS)

# Four layers each; the names are those of transformers' config classes.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES: dict[str, Any] = {
    "llama": (transformers.LlamaConfig, GROUPED),
    "mistral": (transformers.MistralConfig, GROUPED),
    "qwen2": (
        transformers.Qwen2Config,
        {k: v for k, v in GROUPED.items() if k != "head_dim"},
    ),
    "qwen3": (transformers.Qwen3Config, GROUPED),
    "gemma2": (transformers.Gemma2Config, GROUPED),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {**GROUPED, "sliding_window": 4, "sliding_window_pattern": 2},
    ),
    "olmo2": (transformers.Olmo2Config, {k: v for k, v in GROUPED.items() if k != "head_dim"}),
    "phi3": (transformers.Phi3Config, {k: v for k, v in GROUPED.items() if k != "head_dim"}),
    "falcon": (transformers.FalconConfig, {**SIZES, "new_decoder_architecture": False}),
    "mixtral": (
        transformers.MixtralConfig,
        {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {
            **GROUPED, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
        },
    ),
    "phi": (transformers.PhiConfig, {**SIZES, "intermediate_size": 48}),
    "gpt_neox": (transformers.GPTNeoXConfig, {**SIZES, "intermediate_size": 48}),
    "gpt2": (
        transformers.GPT2Config,
        {
            "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64,
            "n_inner": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
}  # fmt: skip

# The list of decoder layers, and the parameter of a layer that is its down-projection.
PLACES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(ARCHITECTURES, ("model.layers", "mlp.down_proj.weight")),
    "falcon": ("transformer.h", "mlp.dense_4h_to_h.weight"),
    "gpt2": ("transformer.h", "mlp.c_proj.weight"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h.weight"),
    "phi": ("model.layers", "mlp.fc2.weight"),
    # Mixtures of experts: the module stacks those of all experts in one parameter.
    "mixtral": ("model.layers", "mlp.experts.down_proj"),
    "qwen3_moe": ("model.layers", "mlp.experts.down_proj"),
}
# How many experts a layer has, and under which name their checkpoints keep each one's.
EXPERTS: dict[str, tuple[int, str]] = {
    "mixtral": (3, "block_sparse_moe.experts.{}.w2.weight"),
    "qwen3_moe": (4, "mlp.experts.{}.down_proj.weight"),
}


def block_name(arch: str, layer: int) -> str:
    return f"{PLACES[arch][0]}.{layer}"


def down_name(arch: str, layer: int) -> str:
    """The module's name for the down-projection of a layer."""
    return f"{block_name(arch, layer)}.{PLACES[arch][1]}"


def stored_names(arch: str, layer: int) -> list[str]:
    """The checkpoint's names for it: one, or one an expert."""
    if arch not in EXPERTS:
        return [down_name(arch, layer)]
    count, inner = EXPERTS[arch]
    return [f"{block_name(arch, layer)}.{inner.format(i)}" for i in range(count)]


def pico_module(name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random four-layer model, with weights large enough for every layer to matter."""
    cls, sizes = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = transformers.AutoModelForCausalLM.from_config(cls(**sizes))
        for parameter in module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return module.to(dtype).eval()


def word_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """Words w0 to w59; a text starts with one <s>."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, **special})


def save_pico(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """An ordinary Hugging Face folder of a pico model with its tokenizer, in two or more shards."""
    pico_module(name, dtype).save_pretrained(folder, max_shard_size="40KB")
    word_tokenizer().save_pretrained(folder)
    return folder


def texts(count: int, seed: int, words: range = range(60)) -> list[str]:
    """Random texts of 5 to 12 words."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    return [" ".join(f"w{words[draw(0, len(words))]}" for _ in range(draw(5, 13))) for _ in range(count)]


def write_jsonl(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def fill(folder: Path, count: int) -> Path:
    """A pico model and as many texts of each role, in a folder."""
    save_pico(folder / "model")
    for number, role in enumerate(("forget", "retain")):
        write_jsonl(folder / f"{role}.jsonl", texts(count, seed=number))
    return folder


def both_ways(folder: Path) -> dict[str, dict[str, str]]:
    """Two topics of the texts in a folder: what one forgets the other keeps."""
    sources = {role: str(folder / f"{role}.jsonl") for role in ("forget", "retain")}
    back = {"forget": sources["retain"], "retain": sources["forget"]}
    return {"bio": sources, "cyber": back}


def batches(documents: list[str], size: int = 2, padding: Any = "mask") -> list[Any]:
    tokenizer = word_tokenizer()
    return list(batch_rows(tokenise_texts(documents, tokenizer, 64), tokenizer, size, padding))


def topic(name: str = "bio", seed: int = 0, padding: Any = "mask", **options: Any) -> Topic:
    """Forget words w0-w29, retain words w20-w59."""
    return Topic(
        name,
        batches(texts(4, 1, range(30)), padding=padding),
        batches(texts(4, 2, range(20, 60)), padding=padding),
        seed,
        torch.arange(4, VOCABULARY),
        options,
    )


class Answer(NamedTuple):
    """What a command said."""

    code: int
    out: str
    err: str


Call = Callable[..., Answer]


def pieces(texts: list[str], size: int = 90) -> PreTrainedTokenizerFast:
    """A tokenizer that cuts words into pieces, and joins a space to the piece after it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>"], initial_alphabet=list("abcdefghijklmnopqrstuvwxyz")
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def scaled(factor: float) -> Subject:
    """A model edited into one whose logits are as many times as large; it may write nothing."""
    module = pico_module()
    head = module.lm_head.weight.detach().clone()
    with torch.no_grad():
        module.lm_head.weight.mul_(factor)
    return Subject(module, word_tokenizer(), {"lm_head.weight": head})
