"""Checkpoints of random weights in the shapes that the benchmarks use, and a process's memory."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MistralConfig, PreTrainedTokenizerFast

from srmu.engine.loading import build_skeleton
from srmu.engine.progress import silence_libraries

COMMON = {"num_hidden_layers": 32, "vocab_size": 32000, "architectures": ["MistralForCausalLM"]}
SHAPES: dict[str, dict[str, int]] = {
    "pico": {"hidden_size": 64, "intermediate_size": 224, "heads": 4, "kv": 2, "vocab_size": 1000},
    "small": {"hidden_size": 512, "intermediate_size": 1792, "heads": 8, "kv": 2},
    "1b": {"hidden_size": 1536, "intermediate_size": 5376, "heads": 12, "kv": 3},
    "7b": {"hidden_size": 4096, "intermediate_size": 14336, "heads": 32, "kv": 8},
}  # Mistral-7B and what it is at 3/8, 1/8 and 1/64 of its width: always 32 layers


def config_of(shape: str) -> MistralConfig:
    sizes = dict(SHAPES[shape])
    heads, kv = sizes.pop("heads"), sizes.pop("kv")
    given: dict[str, Any] = COMMON | sizes
    return MistralConfig(num_attention_heads=heads, num_key_value_heads=kv, sliding_window=None, **given)


def write_checkpoint(folder: Path, shape: str, dtype: torch.dtype, shards: int = 1) -> Path:
    """A checkpoint of random weights with a word tokenizer, one shard in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(shape)
    config.dtype = dtype
    config.save_pretrained(folder)
    shapes = {name: tuple(p.shape) for name, p in build_skeleton(config).named_parameters()}
    names = list(shapes)
    share = -(-len(names) // shards)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    total = 0
    for number in range(shards):
        part = names[number * share : (number + 1) * share]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {}
        for name in part:
            if len(shapes[name]) == 1:  # the norms
                tensors[name] = torch.ones(shapes[name], dtype=dtype)
            else:
                tensors[name] = torch.randn(shapes[name], generator=generator).mul_(0.02).to(dtype)
        index |= dict.fromkeys(part, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        save_file(tensors, folder / file, metadata={"format": "pt"})
    table = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table, indent=2))
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(config.vocab_size - 4))]
    word_tokenizer(words, pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def word_tokenizer(words: Sequence[str], **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a word for each id."""
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write_task(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The task `quiz` of rows with a question, options and the answer's place."""
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "quiz",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "quiz.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "quiz.yaml").write_text(yaml.safe_dump(task))


def write_texts(path: Path, documents: int, words: int, seed: int) -> Path:
    """Random documents of so many words, each of which is a token."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(900, (documents, words), generator=generator).tolist()
    lines = (json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in rows)
    path.write_text("\n".join(lines) + "\n")
    return path


def parse_arguments(parser: argparse.ArgumentParser, shape: str, tokens: int, steps: int) -> argparse.Namespace:
    """What the benchmarks of shapes are asked for, with these defaults; one thread measures."""
    parser.add_argument("--shape", choices=SHAPES, default=shape)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scratch", default=None, help="folder for the checkpoint")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        sys.exit()
    silence_libraries()
    torch.set_num_threads(1)
    return arguments


class Memory:
    """Peaks of this process while it was watched, in bytes: `private`, `resident`."""

    private = 0
    resident = 0

    def look(self) -> None:
        found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        kib = {key: int(found[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS")}
        self.private = max(self.private, kib["RssAnon"])
        self.resident = max(self.resident, kib["VmRSS"])


@contextmanager
def watched() -> Iterator[Memory]:
    """Look at this process's memory twenty times a second while the block runs."""
    memory, done = Memory(), threading.Event()

    def follow() -> None:
        while not done.is_set():
            memory.look()
            time.sleep(0.05)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()
        memory.look()
