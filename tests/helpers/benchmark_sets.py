"""Data sets laid out as those of the hub, and answers one token at a time."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from helpers.models import word_tokenizer
from srmu.evals.subject import Subject

Sets = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]  # (config, split) -> rows


def write_sets(folder: Path, sets: Sets, ending: str = "jsonl") -> Path:
    """A folder laid out as the hub's: a file for each split, named in the README's header."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    lines = ["---", "configs:"]
    for config in dict.fromkeys(config for config, _ in sets):
        lines += [f"- config_name: {config}", "  data_files:"]
        for (own, split), rows in sets.items():
            if own == config:
                path = folder / f"{config}-{split}.{ending}"
                lines += [f"  - split: {split}", f"    path: {path.name}"]
                if ending == "parquet":
                    datasets.Dataset.from_list([*map(dict, rows)]).to_parquet(path)
                else:
                    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def edited(module: Any) -> Subject:
    """A model that is not the original: it may write nothing."""
    return Subject(module, word_tokenizer(), {"lm_head.weight": module.lm_head.weight.clone()})


def greedy(model: Subject, prompt: str, new_tokens: int) -> str:
    """One prompt, one token at a time, without padding or a cache."""
    ids, made = model.tokens(prompt), []
    with torch.no_grad():
        while len(made) < new_tokens:
            token = int(model.module(torch.tensor([ids + made])).logits[0, -1].argmax())
            if token == model.tokenizer.eos_token_id:
                break
            made.append(token)
    return model.tokenizer.decode(made, skip_special_tokens=True).strip()
