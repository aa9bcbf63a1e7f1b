"""A causal language model, cut to the depth needed, that keeps the originals of trained tensors."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Tensor, nn

from srmu.engine import distributed
from srmu.engine.activation_cache import Activations
from srmu.engine.devices import return_freed_blocks
from srmu.engine.loading import find_layers, load_module, read_config
from srmu.engine.sites import Site, catch_value, hook_outputs, in_role, is_stack, is_turned, shape_by_token, swap_blocks
from srmu.engine.topic import Batch
from srmu.errors import SrmuError, first_line


class EditableModel:
    """A causal language model cut to `depth` layers, in which only the parameters named `trainable` change.

    What a method works on: `hidden` and `logits` are its answers as it is now, inside `frozen()` as it was; `trained`
    holds the parameters that change, by name, `original` what they were.

    `trainable` holds roles by layer (`"7.mlp_down"`, `"7.mlp+router"`) or glob patterns of parameter names, whose
    originals are kept: the frozen model is this same module inside `frozen()`. The layers below the first trained one
    run once per batch; `activations` keeps the output of the last of them.
    """

    def __init__(self, module: Any, trainable: Sequence[str], depth: int | None = None, copy: bool = True) -> None:
        self.folder: Path | None = None  # where it was loaded from
        self.module = module.eval()  # no dropout: the retain loss of step 0 is exactly 0
        self.shallow = False
        self.activations = Activations()
        self._place = find_layers(module)
        if depth is not None and depth < len(self.layers):
            setattr(*self._place, self.layers[:depth])
            self.shallow = True
        self._prefix = next(n for n, m in module.named_modules() if m is self.layers)
        module.requires_grad_(False)
        self.trained: dict[str, nn.Parameter] = self._select(trainable)
        # Layers at the bottom that cannot change. A parameter outside the layers may be the embedding, below them all.
        places = [re.match(rf"{re.escape(self._prefix)}\.(\d+)\.", name) for name in self.trained]
        self.fixed = min((int(m[1]) if m else 0 for m in places), default=0)
        # the loaded memory, which may be the checkpoint's own file
        self.original: dict[str, Tensor] = {name: parameter.data for name, parameter in self.trained.items()}
        for parameter in self.trained.values():
            if copy:  # else `shard` copies its part only
                parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
        self._frozen = False
        self._adapters: dict[str, Any] = {}  # by the name of the matrix beside it

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        depth: int | None,
        trainable: Sequence[str],
        dtype: str = "auto",
        device: str = "cpu",
        offload: bool = False,
        copy: bool = True,
    ) -> "EditableModel":
        """Load the first `depth` layers of a checkpoint (None: all); the others are never read from disk."""
        return_freed_blocks()
        model = cls(load_module(folder, dtype, depth), trainable, depth, copy)
        model.check_causal()
        model.folder = folder
        model.shallow = len(model.layers) < read_config(folder).num_hidden_layers
        if offload:  # layers below the trained ones stay in main memory, and move to the device one at a time
            from accelerate import cpu_offload

            for layer in model.layers[: model.fixed]:
                cpu_offload(layer, execution_device=torch.device(device))
            for tensor in (*model.module.parameters(), *model.module.buffers()):
                if not tensor.is_meta:
                    tensor.data = tensor.data.to(device)
        else:
            model.module.to(device)
        model.original = {name: tensor.to(device) for name, tensor in model.original.items()}
        return model

    @torch.no_grad()
    def check_causal(self) -> None:
        """SrmuError for a model, such as BERT, whose first layer lets a token read those after it."""
        if any(getattr(layer, "attention_type", "") == "block_sparse" for layer in self.layers):
            raise SrmuError(
                f"{type(self.module).__name__} reads long texts in another way than short ones; srmu needs one with "
                '"attention_type": "original_full" in config.json'
            )
        length = min(16, self.position_count or 16)
        ids = torch.arange(length, device=self.device)[None] % self.vocabulary_size
        text = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        whole, part = (self.hidden(text.cut(tokens=slice(n)), Site(0)) for n in (length, length // 4))
        noise = max(1e-3, 4 * torch.finfo(part.dtype).eps)
        if (whole[:, : length // 4] - part).norm() > noise * part.norm():
            raise SrmuError(
                f"{type(self.module).__name__} lets a token read those after it, so it cannot learn to predict them; "
                'name a causal language model (BERT and its kin are one with "is_decoder": true in config.json)'
            )

    def shard(self, device: str) -> None:
        """Shard layers, embeddings and head over the processes (FSDP2), before any training."""
        distributed.shard_modules([*self.layers, *self.ends], device)
        self.module.to(device)  # the rest: norms, tied ends
        parameters = dict(self.module.named_parameters())
        self.trained = {name: parameters[name] for name in self.trained}
        self.original = {name: p.detach().clone() for name, p in self.trained.items()}

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(*self._place)

    @property
    def ends(self) -> list[nn.Module]:
        """Embeddings and head; none where they are tied, as neither works without the other."""
        both = [self.module.get_input_embeddings(), self.module.get_output_embeddings()]
        ends = [end for end in both if end is not None]
        return ends if len({id(end.weight) for end in ends}) == len(ends) else []

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def vocabulary_size(self) -> int:
        return self.module.get_input_embeddings().weight.shape[0]

    @property
    def position_count(self) -> int | None:
        return count_positions(self.module)

    def is_transposed(self, name: str) -> bool:
        """Whether the matrix of that name is stored as (in, out), as in a Conv1D."""
        return is_turned(self.module.get_submodule(name.rpartition(".")[0]))

    def hidden(self, batch: Batch, site: Site, keep: bool = True) -> Float[Tensor, "B T D"]:
        """Activations at `site`, where the model stops; inside `frozen()` from `activations`, which may `keep` them."""
        self._check_loaded(site.layer)
        name = f"{site}/{batch.key}"
        if self._frozen and isinstance(known := self.activations.find(name), Tensor):
            return known
        layer = self.layers[site.layer]
        with self._layers_for(batch, site.layer + 1), catch_value(layer, site.stream) as caught:
            self.module.base_model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            )
        if not caught:
            raise SrmuError(f"{type(self.module).__name__} answers without {self._prefix}.{site.layer}; cannot be cut")
        value = caught[0]
        if value.ndim == 4 and hasattr(self.module.config, "altup_num_inputs"):
            value = value.permute(1, 2, 0, 3)  # Gemma 3n: the first dimension holds streams, all features of a token
        value = shape_by_token(value, *batch["input_ids"].shape)
        if self._frozen and keep:
            self.activations.keep(name, value)
        return value

    def logits(self, batch: Batch, control: Tensor | None = None) -> Float[Tensor, "B T V"]:
        """Next-token logits; SrmuError if the model was not loaded whole.

        `control`, (D,) or (B, D), is an embedding to read after the first token of each text, padded on the right.
        """
        if self.shallow:
            raise SrmuError(f"logits need the whole model; only {len(self.layers)} layers loaded")
        if control is not None:
            read = self.module.get_input_embeddings()(batch["input_ids"])
            extra = control.to(read.dtype).expand(len(read), -1).unsqueeze(1)
            mask = batch["attention_mask"]
            try:
                logits = self.module(  # not inside _layers_for: its keys do not cover the control
                    inputs_embeds=torch.cat([read[:, :1], extra, read[:, 1:]], dim=1),
                    attention_mask=torch.cat([mask[:, :1], mask], dim=1),
                    use_cache=False,
                ).logits
            except (AttributeError, TypeError, ValueError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                what = f"{type(self.module).__name__} takes no embeddings in place of tokens ({first_line(error)})"
                raise SrmuError(f"{what}; choose another method, such as method.name=npo") from error
            return logits[:, 1:]  # the first token predicts the control, which predicts the second
        with self._layers_for(batch, len(self.layers)):
            out = self.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        return out.logits

    @contextmanager
    def adapted(self, rank: int, alpha: int, seed: int) -> Iterator[None]:
        """Train low-rank adapters (LoRA, arXiv 2106.09685) for the trained matrices; `merge` keeps what they learn."""
        from peft import LoraConfig, inject_adapter_in_model

        dense = self.trained, self.original
        stacks = [name for name, parameter in self.trained.items() if is_stack(name, parameter)]
        maps = [name for name in self.trained if name not in stacks]
        settings = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=[name.rpartition(".")[0] for name in maps] or None,
            target_parameters=[f"model.{name}" for name in stacks] or None,
            fan_in_fan_out=any(map(self.is_transposed, maps)),
        )
        with torch.random.fork_rng(range(torch.accelerator.device_count())):
            torch.manual_seed(seed)
            # not the model itself: peft would give the experts other adapters
            inject_adapter_in_model(settings, nn.ModuleDict({"model": self.module}))
        self._adapters = {name: self._find_adapter(name) for name in self.trained}
        for parameter in dense[0].values():
            parameter.requires_grad_(False)
        self.trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.original = {name: p.detach().clone() for name, p in self.trained.items()}
        try:
            yield
        finally:
            for name, adapter in self._adapters.items():
                self.module.set_submodule(name.rpartition(".")[0], adapter.get_base_layer())
            self.trained, self.original = dense
            self._adapters = {}
            for parameter in self.trained.values():
                parameter.requires_grad_(True)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the effect of the adapters to the matrices beside them, in float32."""
        for name, adapter in self._adapters.items():
            weight = getattr(adapter.get_base_layer(), name.rpartition(".")[2])
            weight.copy_(weight.float() + adapter.get_delta_weight("default").float())

    def _find_adapter(self, name: str) -> Any:
        """The adapter beside a matrix or a stack of them; those of several stacks of a module wrap each other."""
        owner, _, last = name.rpartition(".")
        adapter = self.module.get_submodule(owner)
        while getattr(adapter, "parameter_name", last) != last:
            adapter = adapter.base_layer
        return adapter

    @contextmanager
    def only(self, trainable: Sequence[str]) -> Iterator[None]:
        """Run the block with gradients for some of the trained tensors only."""
        chosen = self._select(trainable)
        before = {name: parameter.requires_grad for name, parameter in self.trained.items()}
        for name, parameter in self.trained.items():
            parameter.requires_grad_(name in chosen)
        try:
            yield
        finally:
            for name, parameter in self.trained.items():
                parameter.requires_grad_(before[name])

    @contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the block with other tensors in place of the trained ones, without gradients."""
        frozen, self._frozen = self._frozen, weights is self.original
        current = {name: replace_tensor(self.trained[name], tensor) for name, tensor in weights.items()}
        try:
            with torch.no_grad():
                yield
        finally:
            self._frozen = frozen
            for name, tensor in current.items():
                replace_tensor(self.trained[name], tensor)

    def frozen(self) -> Any:
        """Run the block as the original model."""
        return self.using(self.original)

    def list_aliases(self) -> dict[str, list[str]]:
        """All names of each trained parameter: a tied one stands in several places."""
        every = [*self.module.named_parameters(remove_duplicate=False)]
        return {name: [other for other, p in every if p is mine] for name, mine in self.trained.items()}

    def delta(self) -> dict[str, Tensor]:
        """The trained tensors that differ from their originals; every process calls this, the first gets them whole."""
        changed = {}
        for name, parameter in self.trained.items():
            parts = (distributed.local_part(t.detach()) for t in (parameter, self.original[name]))
            if not all(distributed.gather_values(torch.equal(*parts))):
                changed[name] = distributed.gather_to_first(parameter.detach())
        return changed

    def measure_change(self) -> float:
        """|after - before| / |before| over all trained tensors; every process must call this."""
        norms = torch.zeros(2)
        for name, parameter in self.trained.items():
            before = self.original[name].float()
            parts = (parameter.detach().float() - before).norm(), before.norm()
            norms = torch.hypot(norms, torch.stack([distributed.gather_tensor(part).cpu() for part in parts]))
        moved, size = norms.tolist()
        return moved / size if size else 0.0

    def _select(self, trainable: Sequence[str]) -> dict[str, nn.Parameter]:
        first = {parameter: name for name, parameter in self.module.named_parameters()}  # layers may share a block
        every = dict(self.module.named_parameters(remove_duplicate=False))
        chosen: dict[str, nn.Parameter] = {}
        for pattern in trainable:
            if match := re.fullmatch(r"(\d+|\*)\.([\w+]+)", pattern):
                matches = []
                for layer in range(len(self.layers)) if match[1] == "*" else [int(match[1])]:
                    self._check_loaded(layer)
                    inside = [n for role in match[2].split("+") for n in in_role(self.layers[layer], role)]
                    matches += [f"{self._prefix}.{layer}.{name}" for name in inside]
            else:
                matches = [name for name in every if fnmatchcase(name, pattern)]
            if not matches:
                raise SrmuError(f"no parameter of this model matches {pattern!r}")
            chosen |= {first[every[name]]: every[name] for name in matches}
        return chosen

    def _check_loaded(self, layer: int) -> None:
        if not 0 <= layer < len(self.layers):
            raise SrmuError(f"layer {layer} is not loaded: only layers 0-{len(self.layers) - 1} are")

    @contextmanager
    def _layers_for(self, batch: Batch, depth: int) -> Iterator[None]:
        """Cut the module to `depth` layers and replace the fixed ones by their known output, or keep that output.

        The module's own code still makes masks and rotary tables, which differ between architectures.
        """
        kept = self.layers[:depth]
        hooks: dict[nn.Module, Any] = {}
        stack = ExitStack()
        # Gemma 3n and 4: the last layers read keys and values of layers that must then be run.
        sharing = getattr(self.module.config, "num_kv_shared_layers", None) or 0
        reads = sharing and depth > self.module.config.num_hidden_layers - sharing
        if 0 < self.fixed < depth and not reads:
            name = f"prefix/{batch.key}"
            if (output := self.activations.find(name)) is not None:
                for layer in kept[: self.fixed]:  # not another module: some models read more of their layers
                    stack.enter_context(patch.object(layer, "forward", lambda *_, **__: output))
            else:

                def record(args: Any, output: Any) -> None:
                    if not isinstance(output, tuple | list):
                        self.activations.keep(name, output.detach())
                    elif not any(isinstance(t, Tensor) and not t.is_floating_point() for t in output[1:]):
                        # else the next layer takes more than the first of them, such as indices: keep nothing
                        self.activations.keep(name, (output[0].detach(), *[None] * (len(output) - 1)))

                hooks[kept[self.fixed - 1]] = record
        with stack, swap_blocks(self._place, kept), hook_outputs(hooks):
            yield


def count_positions(module: Any) -> int | None:
    """The most tokens of a text where each position has a row of a table; None where there is no such table."""
    limit = getattr(module.config, "max_position_embeddings", None)
    tables = [*module.named_parameters(), *module.named_buffers()]
    sizes = [len(table) for name, table in tables if table.ndim == 2 and re.search(r"pos|\bwpe\b", name)]
    # some keep a row or two before that of the first token
    return limit if limit and any(size in range(limit, limit + 3) for size in sizes) else None


def copy_values(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for place, value in zip(places, values, strict=True):
        place.data.copy_(value)


def replace_tensor(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """Put a tensor in place of a parameter; returns the one that was there."""
    if not distributed.is_sharded(parameter):
        before, parameter.data = parameter.data, tensor
        return before
    part = distributed.local_part(parameter.detach())  # filled in place: FSDP holds its memory
    before = part.clone()
    part.copy_(distributed.local_part(tensor))
    return before
