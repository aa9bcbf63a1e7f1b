"""Every decoder class of transformers that can be built tiny: it works, or a line says why it does not."""

from pathlib import Path

import pytest
import torch
import transformers

from helpers import architectures
from helpers.models import VOCABULARY
from srmu.engine.generate import write_on
from srmu.engine.loading import read_config
from srmu.errors import SrmuError

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
ROWS = [line for line in PAGE.read_text().splitlines() if line.startswith("| `") and "`model_type`" not in line]


def test_the_table_has_a_class_once() -> None:
    listed = [row.split("`")[1] for row in ROWS]
    assert listed == sorted(set(listed))
    assert set(listed) <= set(architectures.decoder_types())


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("`")[1])
def test_row(row: str, tmp_path: Path) -> None:
    """Nothing ends in an internal error; the outcome is the one that docs/models.md has."""
    assert architectures.describe_type(row.split("`")[1], tmp_path) == row


@pytest.mark.parametrize(
    ("kind", "family", "line"),
    [
        ("openai-gpt", "activations", ""),  # its layers give lists
        ("prophetnet", "activations", "this architecture reads more than its tokens there"),
        ("prophetnet", "neurons", "this architecture reads more than its tokens there"),
        ("xlm", "activations", "keeps the parts of its layers in 4 lists"),
        ("deepseek_v4", "LoRA", ""),  # a linear map of its own kind
        ("deepseek_v4", "reward", "takes no embeddings in place of tokens"),
        ("gemma4_text", "reward", "takes no embeddings in place of tokens"),
        ("axk2", "neurons", "MLPs of several widths"),
        ("mamba", "LoRA", ""),
        ("falcon", "LoRA", ""),
        ("phimoe", "LoRA", ""),  # its router is a linear map that gives more than a product
    ],
)
def test_what_was_an_internal_error(kind: str, family: str, line: str, tmp_path: Path) -> None:
    assert architectures.write_world(kind, tmp_path)
    found = architectures.try_in_memory(tmp_path, family)
    assert line in found
    assert bool(line) == bool(found)


def test_a_stack_without_attention_writes_on() -> None:
    """`generate` has no use for a cache that holds recurrent states alone."""
    config = architectures.tiny_config("jamba")
    sizes = config.to_dict() | {"attn_layer_period": 9, "attn_layer_offset": 8}
    config = type(config)(**{name: size for name, size in sizes.items() if name != "layer_types"})
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    rows, _ = write_on(module, [[1, 5, 6]], 3, set())
    ids = [1, 5, 6]
    for _ in range(3):
        ids.append(int(module(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert rows == [ids[3:]]


def test_a_model_of_parts_is_refused(tmp_path: Path) -> None:
    transformers.FuyuConfig(vocab_size=VOCABULARY, architectures=["FuyuForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(SrmuError, match="has no single stack of decoder layers"):
        read_config(tmp_path)
