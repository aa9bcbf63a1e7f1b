"""The text part of a model that also reads images or sounds: a causal language model of its own.

Its weights are read from the whole checkpoint, under their names there, so that what is saved goes back to its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from srmu.errors import SrmuError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")  # ends of the names of classes with a head
WHOLE_MODELS = (*LANGUAGE_MODELS, "ForConditionalGeneration")  # likewise, of models that read more than text
# Checkpoints keep the text part under these prefixes, with or without a `model.` before and after.
PREFIXES = {
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(?!lm_head\.)": "model.",
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
}


def reads_more(config: Any) -> bool:
    """Whether a model reads more than text, and has a text part that srmu could take out."""
    return config.get_text_config() is not config and not config.is_encoder_decoder


def is_language_model(name: str, config: Any) -> bool:
    """Whether a class of that name, with such a config, is one that predicts tokens."""
    return name.endswith(WHOLE_MODELS if reads_more(config) else LANGUAGE_MODELS)


def take_text_config(config: Any) -> Any:
    """The config of a model's text part; the config itself where the model reads text alone."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    if not reads_more(config):
        return config
    text = config.get_text_config()
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(text) not in MODEL_MAPPING:
        what = f"transformers builds the text part of {config.model_type} ({text.model_type}) only inside the whole"
        raise SrmuError(f"{what}; srmu needs a text model that stands alone")
    # what the whole says is what counts
    tied = getattr(config, "tie_word_embeddings", None)
    text.tie_word_embeddings = getattr(text, "tie_word_embeddings", False) if tied is None else tied
    text.dtype = config.dtype or text.dtype
    for name in ("quantization_config", "quantization"):  # MLX has the second
        if how := getattr(config, name, None):
            setattr(text, name, how)
    return text


def choose_class(config: Any) -> Any:
    """What builds and loads the causal language model of a config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    from srmu.engine.text_model import TextModel

    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else TextModel


def view_text(module: PreTrainedModel) -> PreTrainedModel:
    """The text part of a model in memory, which shares its weights; the model itself where it reads text alone."""
    config = take_text_config(type(module.config).from_dict(module.config.to_dict()))  # without what loading chose
    if type(config) is type(module.config):
        return module
    with torch.device("meta"):
        text = choose_class(config).from_config(config)
    part = module.get_decoder()
    if type(part) is type(text):  # Llama 4 has the head in there
        return part
    setattr(text, text.base_model_prefix, part)
    text.set_output_embeddings(module.get_output_embeddings())
    return text


def open_config(folder: Path) -> Any:
    """The config of a model's folder as transformers reads it; SrmuError where it cannot."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # configs refuse values in many ways
        raise SrmuError(f"{folder}/config.json cannot be read: {first_line(error)}") from error


def find_whole_class(folder: Path) -> Any:
    """The class of a model that reads more than text, as its users load it; None where it reads text alone."""
    import transformers

    config = open_config(folder)
    return getattr(transformers, config.architectures[0]) if reads_more(config) else None


def find_loader(folder: Path) -> Any:
    """The class with which a user of the model in a folder loads it."""
    from transformers import AutoModelForCausalLM

    return find_whole_class(folder) or AutoModelForCausalLM


def list_placeholders(folder: Path) -> list[int]:
    """Ids of the tokens that stand for images or sounds: there the text part and the whole model differ."""
    values = vars(open_config(folder)).items()
    return [v for k, v in values if re.search(r"(image|video|audio|vision)\w*_token_(id|index)$", k) and v is not None]


def keep_text(folder: Path, stored: Mapping[str, T], build: Callable[[], nn.Module]) -> Mapping[str, T]:
    """Of what a checkpoint stores by name, what belongs to the text part that `build` makes; all of a model of text."""
    if find_whole_class(folder) is None:
        return stored
    places = {place_of(name) for name, _ in build().named_parameters()}
    return {name: value for name, value in stored.items() if place_of(rename_stored(name)) in places}


def rename_stored(name: str) -> str:
    """A stored tensor's name in a text part: `model.norm.weight` for `language_model.model.norm.weight`."""
    for pattern, prefix in PREFIXES.items():
        name = re.sub(pattern, prefix, name)
    return name


def place_of(name: str) -> str:
    """`model.layers` of `model.layers.0.mlp.down_proj.weight`."""
    return ".".join(name.split(".")[:2])


def rename_to_whole(folder: Path, named: dict[str, T]) -> dict[str, T]:
    """Rename modules of the text part to their names in the model as its users load it."""
    whole = find_whole_class(folder)
    if whole is None:
        return named
    with torch.device("meta"):
        module = whole._from_config(open_config(folder))
    text = view_text(module)
    names = {id(part): name for name, part in module.named_modules()}
    return {names[id(text.get_submodule(name))]: value for name, value in named.items()}
