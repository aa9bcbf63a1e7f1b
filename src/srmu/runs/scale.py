"""How large a model is, what a process holds, what a token costs: arithmetic of dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Whose layers are those below: attention, a gated MLP or experts, two norms; no biases.
KNOWN = ("llama", "mistral", "mixtral", "qwen3", "qwen3_moe")
DEVICES = (24, 48, 80, 141)  # GB of the common GPUs
PROCESSES = (1, 2, 4, 8)
MORE = (16, 64)  # where a part of 8 is more than `LARGE` holds
LARGE = 80e9
KEPT_PIECES = 4  # on the CPU: what stays with a process of pieces it gathered and freed, measured


@dataclass(frozen=True)
class Size:
    """How many numbers a model has, by the pieces in which `--shard` cuts it."""

    layers: tuple[int, ...]
    ends: tuple[int, ...]  # embeddings and head, where they are apart: cut as the layers are
    rest: int  # the last norm, tied ends: whole in each process

    @property
    def total(self) -> int:
        return sum(self.layers) + sum(self.ends) + self.rest

    def part(self, processes: int) -> int:
        return -(-(sum(self.layers) + sum(self.ends)) // processes) + self.rest


@dataclass(frozen=True)
class Variant:
    """A way to make a step, measured on a whole batch in one process."""

    lora: int  # the rank of adapters; 0: the tensors themselves are trained
    caching: bool
    sharded: bool
    trained: Size  # with adapters: what they stand beside
    adapters: int  # numbers of theirs
    activations: int  # bytes that a pass leaves for its gradient
    cache: int  # bytes of activations kept from step to step
    flops: int
    offloaded: tuple[int, ...] = ()  # numbers of the layers left on the disk, which come one by one


# --- from a configuration ------------------------------------------------------------------------


def size_of(config: Any, depth: int | None = None) -> Size:
    """The numbers of a model cut to `depth` layers, head included: it is loaded, too."""
    width, end = config.hidden_size, config.vocab_size * config.hidden_size
    layers = (layer_size(config),) * (depth or config.num_hidden_layers)
    if config.tie_word_embeddings:
        return Size(layers, (), end + width)
    return Size(layers, (end, end), width)


def layer_size(config: Any) -> int:
    norms = 2 * config.hidden_size
    if config.model_type.startswith("qwen3"):
        norms += 2 * head_size(config)  # of queries and keys
    return matrices_of(config, experts_of(config)) + norms


def matrices_of(config: Any, experts: int) -> int:
    """The numbers in a layer's matrices, with so many of its experts."""
    width = config.hidden_size
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    attention = width * heads * head_size(config)
    if not experts:
        return attention + 3 * width * config.intermediate_size
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return attention + width * experts_of(config) + experts * 3 * width * inner


def experts_of(config: Any) -> int:
    return getattr(config, "num_local_experts", 0)


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def flops_per_token(config: Any, tokens: int, depth: int | None = None) -> int:
    """FLOPs of a forward pass for one of so many tokens of a text; to the head without `depth`.

    Two for each number of the matrices that a token meets: of the experts, those it is sent to.
    """
    met = matrices_of(
        config, getattr(config, "num_experts_per_tok", 0) if experts_of(config) else 0
    )
    attention = 4 * tokens * config.num_attention_heads * head_size(config)
    head = 0 if depth else 2 * config.vocab_size * config.hidden_size
    return (depth or config.num_hidden_layers) * (2 * met + attention) + head


# --- what a process holds ------------------------------------------------------------------------


def held_bytes(
    size: Size, way: Variant, processes: int, share: float, itemsize: int, mixed: bool, gpu: bool
) -> dict[str, int]:
    """Bytes a process holds of a model whose numbers have `itemsize` bytes, by what they are.

    It reads `share` of each batch. `mixed`: float32 masters of smaller numbers are trained.
    """
    cut = processes if way.sharded else 1
    beside = way.trained.part(cut)
    # adapters are float32 themselves
    trained, each = (way.adapters, 4) if way.lora else (beside, itemsize)
    mixed = mixed and not way.lora
    exact = 4 if mixed else each
    # While a piece runs it is there whole, beside what arrives of it; then its gradient is, and is
    # summed in float32.
    gathered, largest = 0, max(*way.trained.layers, *way.trained.ends, 0)
    if way.sharded:
        gathered = itemsize * (2 * max(*size.layers, *size.ends) + largest) + 4 * largest
        if not gpu:  # gloo sums in a copy of its own
            gathered += 4 * largest + KEPT_PIECES * itemsize * max(*size.layers, *size.ends)
    backward = gathered + max(way.activations * share, trained * each)
    # On a GPU AdamW works on all tensors at once, and makes one more copy of them. On the CPU it
    # takes one by one, and the C library keeps what a pass has freed: gradients come beside it.
    update = exact * (2 * trained if gpu else trained + (0 if way.lora else largest // cut))
    step = max(backward, update) if gpu else backward + update
    there = size.part(cut) - sum(way.offloaded) + max(way.offloaded, default=0)
    return {
        "weights": there * itemsize,
        "originals": beside * itemsize,
        "last_good": trained * each,
        "masters": trained * 4 if mixed else 0,
        "moments": 2 * trained * exact,
        "step": round(step),
        "cache": round(way.cache * share),
    }


def scale_launches(
    size: Size,
    ways: Sequence[Variant],
    rows: int,
    itemsize: int,
    *,
    mixed: bool,
    gpu: bool,
    spreads: bool,
) -> list[dict[str, Any]]:
    """What each process holds and computes, of so many, in each way that there is."""
    found: list[dict[str, Any]] = []
    for processes in (*PROCESSES, *MORE):
        if processes > 1 and not spreads:
            break
        last = [row["memory_per_rank"] for row in found if row["processes"] == PROCESSES[-1]]
        if processes in MORE and min(last) <= LARGE:
            break
        share = -(-rows // processes) / rows
        for way in ways:
            if (processes == 1 and way.sharded) or (processes > 1 and way.offloaded):
                continue
            parts = held_bytes(size, way, processes, share, itemsize, mixed, gpu)
            memory = sum(parts.values())
            found.append(
                {
                    "processes": processes,
                    "sharded": way.sharded,
                    "caching": way.caching,
                    "lora": way.lora,
                    "offloaded": bool(way.offloaded),
                    "memory_per_rank": memory,
                    "device_gb": next((n for n in DEVICES if memory <= n * 1e9), None),
                    "flops_per_rank_per_step": round(way.flops * share),
                    "parts": parts,
                }
            )
    return found
