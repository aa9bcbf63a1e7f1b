"""A subject whose every word is known: a model that says what a rule says, and its tokenizer."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from srmu.evals.subject import Subject

Rule = Callable[[list[str]], dict[str, float]]  # the words so far -> the logits of some words


class Past(list[list[int]]):
    """What a rule remembers of a text: all of it."""

    def batch_repeat_interleave(self, count: int) -> None:
        self[:] = [list(row) for row in self for _ in range(count)]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self[:] = [list(self[i]) for i in indices]


class RuleModel(torch.nn.Module):
    """Looks like a transformers model, and says after each text what its rule says."""

    def __init__(self, words: list[str], rule: Rule) -> None:
        super().__init__()
        self.words, self.rule, self.device = words, rule, torch.device("cpu")
        self.config = SimpleNamespace(max_position_embeddings=4096)
        self._is_stateful = False
        self.head = torch.nn.Identity()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(
        self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = False, logits_to_keep: Any = 0
    ) -> Any:
        before = past_key_values or [[] for _ in input_ids]
        rows = [old + new for old, new in zip(before, input_ids.tolist(), strict=True)]
        logits = torch.zeros(*input_ids.shape, len(self.words))
        for row, ids, old in zip(logits, rows, before, strict=True):
            for at, line in enumerate(row, len(old) + 1):
                for word, value in self.rule([self.words[i] for i in ids[:at]]).items():
                    line[self.words.index(word)] = value
        logits = self.head(logits[:, -logits_to_keep:])
        return SimpleNamespace(logits=logits, past_key_values=Past(rows) if use_cache else None)


def rule_subject(words: list[str], rule: Rule) -> Subject:
    """Words are cut at spaces, and signs from words; what is unknown is `<unk>`."""
    known = ["<unk>", "<s>", *dict.fromkeys(words)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<s>", pad_token="<s>")
    return Subject(RuleModel(known, rule), tokenizer)  # type: ignore[arg-type]
