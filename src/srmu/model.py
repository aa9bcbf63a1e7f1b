"""A causal language model, as deep as needed, that remembers the tensors it is about to change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from srmu.errors import UserError

Batch = dict[str, Tensor]  # input_ids, attention_mask, labels (B, T); label -100 = not counted

Stream = Literal["resid_post", "mlp_out", "mlp_post"]

# Role -> where that weight sits inside a decoder layer, by architecture. Never by position: the
# seventh parameter of a layer is down_proj on Llama, o_proj on Qwen2, gate_proj on Qwen3.
ROLES: dict[str, tuple[str, ...]] = {
    "mlp_down": (
        "mlp.down_proj.weight",  # Llama, Mistral, Qwen, Gemma, Phi-3, OLMo
        "mlp.c_proj.weight",  # GPT-2
        "mlp.dense_4h_to_h.weight",  # GPT-NeoX, Falcon, BLOOM
        "mlp.fc2.weight",  # Phi
        "mlp.fc_out.weight",  # GPT-J
        "fc2.weight",  # OPT
    ),
}


@dataclass(frozen=True)
class Site:
    """A place in the network where activations are read; text form `7.resid_post`.

    `resid_post` is the output of the decoder layer (D wide), `mlp_out` that of its MLP (D wide),
    `mlp_post` the input of the MLP's down-projection (F wide). The input of layer l is
    `resid_post` of layer l-1.
    """

    layer: int
    stream: Stream = "resid_post"

    def __post_init__(self) -> None:
        if self.stream not in get_args(Stream):
            known = ", ".join(get_args(Stream))
            raise UserError(f"stream {self.stream!r} does not exist; choose one of {known}")

    def __str__(self) -> str:
        return f"{self.layer}.{self.stream}"


def read_config(folder: Path) -> Any:
    """The model's configuration; UserError when it is not one of a causal language model."""
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {folder} has no config.json; name a Hugging Face model")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{folder}/config.json cannot be read: {first_line(error)}") from error
    names = config.architectures or ["none named"]
    if not names[0].endswith(("ForCausalLM", "LMHeadModel")):
        raise UserError(
            f"{folder} is not a causal language model: its architecture is {names[0]}; "
            "srmu needs one that transformers loads with AutoModelForCausalLM"
        )
    return config


def check_layers(config: Any, layer: int, window: int = 1) -> None:
    """UserError when the layer, or the window of updated layers that ends there, is not there."""
    count = config.num_hidden_layers
    if not 0 <= layer < count:
        raise UserError(
            f"layer {layer} does not exist: this model has {count} layers (0-{count - 1})"
        )
    if not 1 <= window <= layer + 1:
        raise UserError(
            f"a window of {window} layers ending at layer {layer} is impossible: "
            f"use method.window=1 to {layer + 1}"
        )


class EditableModel:
    """A causal LM cut to `depth` layers, of which only the parameters named `trainable` change.

    `trainable` holds roles by layer (`"7.mlp_down"`) or glob patterns of parameter names. The
    original values of those parameters are kept, so that the frozen model is this same module run
    inside `frozen()`: no second model.
    """

    def __init__(
        self, module: PreTrainedModel, trainable: Sequence[str], depth: int | None = None
    ) -> None:
        self.module = module.eval()  # no dropout: the retain loss of step 0 is exactly 0
        self.shallow = False
        self._owner, self._attribute = find_layers(module)
        if depth is not None and depth < len(self.layers):
            self._set_layers(self.layers[:depth])
            self.shallow = True
        module.requires_grad_(False)
        self.trained: dict[str, nn.Parameter] = self._select(trainable)
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        self.original = {name: p.detach().clone() for name, p in self.trained.items()}

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        depth: int | None,
        trainable: Sequence[str],
        dtype: str = "auto",
        device: str = "cpu",
    ) -> EditableModel:
        """Load the first `depth` layers of a checkpoint (all of them when None).

        The tensors are memory-mapped, so layers that are cut off are never read from disk.
        """
        model = cls(load_module(folder, dtype), trainable, depth)
        model.module.to(device)
        model.original = {name: tensor.to(device) for name, tensor in model.original.items()}
        return model

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self._owner, self._attribute)

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def vocabulary_size(self) -> int:
        return self.module.get_input_embeddings().weight.shape[0]

    def hidden(self, batch: Batch, site: Site) -> Float[Tensor, "B T D"]:
        """Activations at `site`; layers above it are not run."""
        check_layers_loaded(len(self.layers), site.layer)
        layer = self.layers[site.layer]
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: Any, output: Any = None) -> None:
            value = args if output is None else output
            caught.append(value[0] if isinstance(value, tuple) else value)

        if site.stream == "resid_post":
            handle = layer.register_forward_hook(catch)
        elif site.stream == "mlp_out":
            handle = child(layer, "mlp").register_forward_hook(catch)
        else:
            down = role_in_layer(layer, "mlp_down").removesuffix(".weight")
            handle = child(layer, down).register_forward_pre_hook(catch)
        try:
            with self._cut(site.layer + 1):
                self.module.base_model(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    use_cache=False,
                )
        finally:
            handle.remove()
        return caught[0].reshape(*batch["input_ids"].shape, -1)  # OPT flattens inside its layers

    def logits(self, batch: Batch) -> Float[Tensor, "B T V"]:
        """Next-token logits; UserError when the model was loaded shallow."""
        if self.shallow:
            raise UserError(f"logits need the whole model; only {len(self.layers)} layers loaded")
        return self.module(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits

    @contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the block with other tensors in place of the trained ones, without gradients."""
        current = {name: self.trained[name].data for name in weights}
        for name, tensor in weights.items():
            self.trained[name].data = tensor
        try:
            with torch.no_grad():
                yield
        finally:
            for name, tensor in current.items():
                self.trained[name].data = tensor

    def frozen(self) -> Any:
        """Run the block as the original model."""
        return self.using(self.original)

    def delta(self) -> dict[str, Tensor]:
        """The trained tensors that differ from their originals, by parameter name."""
        return {
            name: parameter.detach()
            for name, parameter in self.trained.items()
            if not torch.equal(parameter, self.original[name])
        }

    def _select(self, trainable: Sequence[str]) -> dict[str, nn.Parameter]:
        names = dict(self.module.named_parameters())
        chosen: dict[str, nn.Parameter] = {}
        prefix = next(n for n, m in self.module.named_modules() if m is self.layers)
        for pattern in trainable:
            if match := re.fullmatch(r"(\d+)\.(\w+)", pattern):
                layer = int(match[1])
                check_layers_loaded(len(self.layers), layer)
                inner = role_in_layer(self.layers[layer], match[2])
                found = [f"{prefix}.{layer}.{inner}"]
            else:
                found = [name for name in names if fnmatchcase(name, pattern)]
            if not found:
                raise UserError(f"no parameter of this model matches {pattern!r}")
            chosen |= {name: names[name] for name in found}
        return chosen

    def _set_layers(self, layers: nn.ModuleList) -> None:
        setattr(self._owner, self._attribute, layers)

    @contextmanager
    def _cut(self, depth: int) -> Iterator[None]:
        layers = self.layers
        self._set_layers(layers[:depth])
        try:
            yield
        finally:
            self._set_layers(layers)


def load_module(folder: Path, dtype: str = "auto") -> PreTrainedModel:
    """The whole checkpoint through transformers; UserError when a tensor is missing or misfits."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model {folder} cannot be loaded: {first_line(error)}") from error
    module, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model {folder} lacks {len(missing)} tensors, the first is {missing[0]}; "
            "transformers would fill them with random numbers"
        )
    return module


def find_layers(module: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that owns the list of decoder layers, and that list's attribute name."""
    count = module.config.num_hidden_layers
    for owner in module.base_model.modules():
        for attribute, inner in owner.named_children():
            if isinstance(inner, nn.ModuleList) and len(inner) == count:
                return owner, attribute
    raise UserError(f"{type(module).__name__} has no list of {count} decoder layers; cannot be cut")


def role_in_layer(layer: nn.Module, role: str) -> str:
    """The name, inside a decoder layer, of the weight that plays `role`."""
    if role not in ROLES:
        raise UserError(f"role {role!r} does not exist; choose one of {', '.join(ROLES)}")
    names = dict(layer.named_parameters())
    for name in ROLES[role]:
        if name in names:
            return name
    raise UserError(
        f"{type(layer).__name__} has no weight in the role {role!r}; it has {', '.join(names)}"
    )


def child(layer: nn.Module, name: str) -> nn.Module:
    """A submodule of a decoder layer; UserError naming what there is when it is missing."""
    try:
        return layer.get_submodule(name)
    except AttributeError:
        names = ", ".join(n for n, _ in layer.named_children())
        raise UserError(f"{type(layer).__name__} has no {name!r}; it has {names}") from None


def check_layers_loaded(loaded: int, layer: int) -> None:
    if not 0 <= layer < loaded:
        raise UserError(f"layer {layer} is not loaded: only layers 0-{loaded - 1} are")


def first_line(error: BaseException) -> str:
    """The first line of another library's message, for a one-line error of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
