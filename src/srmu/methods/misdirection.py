"""Methods of one site: forget activations move to a target, retain activations stay in place."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from srmu.engine import distributed
from srmu.engine.activation_cache import digest_tensors, open_activations
from srmu.engine.loading import check_layers
from srmu.engine.losses import (
    average_means,
    is_counted,
    token_cosine,
    token_distance,
    token_mean,
    token_mse,
    without_first,
)
from srmu.engine.sites import ROUTER, Site, Stream, down_projection
from srmu.engine.stopping import CHECKED_BATCHES
from srmu.engine.topic import move_batch
from srmu.engine.train import TrainOptions
from srmu.errors import SrmuError
from srmu.methods.base import Batch, Bounds, Count, EditableModel, Needs, Objective, Part, State, Terms, Topic, Weight
from srmu.methods.importance import sum_features
from srmu.methods.own_texts import count_chunks, write_anchors

KAPPA = 8.0  # the default strength
ROUNDING = 1e-9  # of the mean square of activations: two passes of some models differ by as much
LEAST = 1e-30  # avoids a division by 0
OWN = Needs("anchors=self")


@dataclass(frozen=True, kw_only=True)
class Misdirection(Objective):
    """Drives forget activations at one site to a target and holds retain activations in place."""

    level = "representation"
    spreads = True
    scales = True
    uses = ("retain texts", "the original activations")
    measures: ClassVar[tuple[str, ...]] = ("forget",)  # texts whose activations are averaged

    layer: int | None = None  # None: 7 of 32 layers, as in the papers, scaled to the depth
    stream: Stream = "resid_post"
    window: Count = 3  # number of layers to update; the last is `layer`
    matrices: Literal["down", "mlp"] = "down"  # of each MLP that are updated; mlp: also gate and up
    router: bool = False  # also update the routers, which send tokens to experts
    coeff: Weight | None = None  # the literal strength of the papers, c or c_map
    kappa: Weight | None = None  # the strength as the norm of the target over that of activations; 8 without coeff
    alpha: Weight = 1200.0  # weight of the retain loss
    anchors: Literal["none", "random", "self"] = "none"  # rows to retain: random tokens, own texts
    anchor_share: Annotated[Part, Needs("anchors=random or self")] = 0.5  # of each retain batch
    own_texts: Annotated[Count, OWN] = 480  # that the original writes
    own_ratio: Annotated[float, Bounds(1, 1e30), OWN] = 2.5  # drops those with a token so much likelier in forget texts
    error: Literal["mean", "sum"] = "mean"  # of a token's squared errors; sum, as SRMU prints: D times the loss
    columns: Annotated[Part, Needs("matrices=down")] = 1.0  # share of each matrix' input columns that is updated
    skip_first: bool = True  # leave the first token of each text out of means and norms
    map_batches: Count = 64  # batches over which activations are averaged before the first step

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coeff is not None and self.kappa is not None:
            advice = "give one of them, for example method.coeff=6.5 method.kappa=null"
            raise SrmuError(f"method.coeff and method.kappa both set the strength; {advice}")

    @property
    def site(self) -> Site:
        assert self.layer is not None, "resolved() fills the layer in"
        return Site(self.layer, self.stream)

    @property
    def depth(self) -> int | None:
        return None if self.anchors == "self" else self.site.layer + 1  # to write texts takes the whole model

    @property
    def updated(self) -> range:
        """The layers whose matrices are trained."""
        # The input of a down-projection does not depend on that down-projection.
        end = self.site.layer + (self.stream != "mlp_post")
        return range(end - self.window, end)

    @property
    def trainable(self) -> tuple[str, ...]:
        role = f"{'mlp_down' if self.matrices == 'down' else 'mlp'}{'+router' * self.router}"
        return tuple(f"{i}.{role}" for i in self.updated)

    def resolved(self, config: Any) -> Self:
        method = self
        if self.coeff is None and self.kappa is None:
            method = replace(method, kappa=KAPPA)
        if self.layer is None:
            lowest = self.window - (self.stream != "mlp_post")
            count = config.num_hidden_layers
            method = replace(method, layer=min(max(lowest, round(count * 7 / 32)), count - 1))
        check_layers(config, method.site.layer)
        check_layers(config, method.updated.stop - 1, self.window)
        return method

    def with_options(self, options: Mapping[str, Any]) -> Self:
        both = {"coeff", "kappa"}
        if both & set(options):  # the strength of the topic replaces that of the method
            options = dict.fromkeys(both) | dict(options)
        return replace(self, **options)

    def check(self, topics: Sequence[Topic], train: TrainOptions) -> None:
        super().check(topics, train)
        if (size := distributed.get_size()) > 1 and (self.columns < 1 or self.anchors == "self"):
            processes = f"{size} were started; start it without the launcher"
            raise SrmuError(f"method.columns below 1 and anchors=self run in one process, but {processes}")
        if self.columns < 1 and (decay := train.weight_decay):
            raise SrmuError(f"train.weight_decay={decay:g} would move columns that method.columns holds; set it to 0")

    def write_texts(self, model: EditableModel, topic: Topic, state: State) -> Sequence[Sequence[int]]:
        if self.anchors != "self":
            return topic.own
        rows, dropped = write_anchors(model, topic, self.own_texts, self.own_ratio)
        state.numbers["anchors"] = {"kept": len(rows), "dropped": dropped}
        return rows

    def reads(self, topic: Topic) -> int:
        averaged = sum(min(self.map_batches, len(getattr(topic, role))) for role in self.measures)
        looked_at = len(topic.forget) + len(topic.retain) + count_chunks(self.own_texts)
        return averaged + looked_at * (self.anchors == "self")

    def prepared(self, topic: Topic) -> Topic:
        return topic if self.anchors == "none" else topic.add_anchors(self.anchor_share)

    @contextmanager
    def editing(self, model: EditableModel, topics: Sequence[Topic]) -> Iterator[None]:
        if self.anchors == "self" and model.activations.kept == "disk":  # they could reveal the texts
            model.activations = open_activations("memory", {}, model.device)
        if self.router and not any(ROUTER.fullmatch(name) for name in model.trained):
            raise SrmuError("method.router=true, but no layer that is updated has a router; leave it out")
        with ExitStack() as stack:
            if self.columns < 1:
                for layer in self.updated:
                    down_projection(model.layers[layer])  # SrmuError where each expert has one of its own
                for layer, (name, parameter) in zip(self.updated, model.trained.items(), strict=True):
                    chosen = self.choose_columns(model, layer, name, topics)
                    # AdamW leaves weights without a gradient unchanged, bit for bit
                    stack.callback(parameter.register_hook(partial(torch.mul, chosen)).remove)
            yield

    def choose_columns(self, model: EditableModel, layer: int, name: str, topics: Sequence[Topic]) -> Tensor:
        """Marks the columns of a down-projection whose inputs forget texts excite most."""
        moments = []  # mean squares of the inputs, in the original model
        for role in ("forget", "retain"):
            total, count = torch.zeros((), device=model.device), 0
            for batch in (b for topic in topics for b in getattr(topic, role)[: self.map_batches]):
                batch = move_batch(batch, model.device)
                with model.frozen():
                    read = model.hidden(batch, Site(layer, "mlp_post"), keep=False)[self.measured_tokens(batch)]
                total, count = total + read.float().square().sum(0), count + len(read)
            moments.append(total / count)
        # eq: input columns, r_j = E_f[x_j^2] / E_r[x_j^2], the largest are updated
        ratio = moments[0] / moments[1].clamp(min=1e-30)
        chosen = torch.zeros_like(ratio, dtype=torch.bool)
        chosen[ratio.argsort(descending=True, stable=True)[: max(1, round(self.columns * len(ratio)))]] = True
        return chosen[:, None] if model.is_transposed(name) else chosen

    @property
    def factor(self) -> float:
        """The norm of the target over the norm of forget activations."""
        return KAPPA if self.kappa is None else self.kappa

    def scaled(self, shape: Tensor, norm: float) -> Tensor:
        """The target of that shape: times coeff, or scaled to the norm kappa times `norm`."""
        if self.coeff is not None:
            return self.coeff * shape
        size = float(shape.norm())
        return shape * (self.factor * norm / size if size else 0.0)

    def measured_tokens(self, batch: Batch) -> Tensor:
        """The tokens of a batch whose activations enter means and norms, (B, T)."""
        mask = is_counted(batch["labels"])
        return without_first(mask, batch.get("attention_mask")) if self.skip_first else mask

    def frozen_sums(self, model: EditableModel, batches: Sequence[Batch], keep: bool = True) -> Iterator[Tensor]:
        """The sums that statistics need of the original's activations; `keep`: whether later steps need these too."""
        for batch in batches[: self.map_batches]:
            batch = move_batch(batch, model.device)
            mask = self.measured_tokens(batch)
            name = f"sums/{self.site}/{batch.key}/{digest_tensors(mask)}"
            sums = model.activations.find(name)
            if not isinstance(sums, Tensor):
                with model.frozen():
                    sums = sum_features(model.hidden(batch, self.site, keep), mask)
                model.activations.keep(name, sums)
            yield sums

    def state(self, shape: Tensor, norm: float, **tensors: Tensor) -> State:
        """The target, from its `shape` (D,) and the forget activations' mean norm, and the tensors it was made of."""
        if not 0 < norm < float("inf"):
            raise SrmuError(f"the forget activations at {self.site} are {'not finite' if norm else 'all zero'}")
        target = self.scaled(shape, norm)
        size, length = float(shape.norm()), float(target.norm())
        numbers = {"coeff": length / size if size else 0.0, "kappa": length / norm}
        return State({**tensors, "target": target}, numbers | {"target_norm": length, "activation_norm": norm})

    def target(self, model: EditableModel, state: State, forget: Batch, retain: Batch, hidden: Tensor) -> Tensor:
        """Where forget activations are sent, broadcastable to (B, T, D)."""
        return state.tensors["target"]

    def forget_hidden(self, model: EditableModel, forget: Batch) -> Tensor:
        """The forget activations that are driven to the target, (B, T, D)."""
        return model.hidden(forget, self.site)

    def retain_target(self, state: State, anchor: Tensor) -> Tensor:
        """Where retain activations are held, (B, T, D): at `anchor`, those of the original."""
        return anchor

    def measure_effect(self, model: EditableModel, topic: Topic, state: State) -> dict[str, float]:
        """How far activations moved: forget ones on the way to the target and in norms, retain ones in norms."""
        state = State({**state.tensors}, {**state.numbers}, {**state.memory})  # `target` writes to it
        ways, shifts, drifts = [], [], []
        for pair in islice(topic.pairs(), min(CHECKED_BATCHES, len(topic.forget))):
            forget, retain = (move_batch(batch, model.device) for batch in pair)
            with model.frozen():
                before = model.hidden(forget, self.site, keep=False)
            after, mask = model.hidden(forget, self.site), self.measured_tokens(forget)
            target = self.target(model, state, forget, retain, after)
            left, way = (token_distance(hidden, target) for hidden in (after, before))
            ways.append(token_mean(1 - left / way.clamp(min=LEAST), mask))
            shifts.append(token_mean((way - left) / before.float().norm(dim=-1).clamp(min=LEAST), mask))
        for batch in topic.retain[:CHECKED_BATCHES]:
            batch = move_batch(batch, model.device)
            with model.frozen():
                anchor = model.hidden(batch, self.site, keep=False)
            drift = token_distance(model.hidden(batch, self.site), anchor) / anchor.float().norm(dim=-1).clamp(
                min=LEAST
            )
            drifts.append(token_mean(drift, self.measured_tokens(batch)))
        means = {"forget_moved": ways, "forget_shift": shifts, "retain_moved": drifts}
        return {name: average_means(each) for name, each in means.items()}

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        with model.frozen():
            anchor = model.hidden(retain, self.site)
        forget_mask, retain_mask = is_counted(forget["labels"]), is_counted(retain["labels"])
        hidden = self.forget_hidden(model, forget)
        target = self.target(model, state, forget, retain, hidden.detach())
        held = model.hidden(retain, self.site)
        drift = float(token_mse(held.detach(), anchor, retain_mask).value) if step == 0 else 0.0
        # some models repeat themselves to the last bits only
        if drift > ROUNDING * float(anchor.float().square().mean()) and not model.delta():
            why = f"the first retain loss is {drift:.3g} and not 0: the cached activations do not belong to this run"
            raise SrmuError(f"{why}; srmu info cache clear, or cache=none")
        size = float(hidden.shape[-1]) if self.error == "sum" else 1.0
        losses = {
            # eq: SRMU eq. 5 and RMU, L = E |h(x_f) - T|^2 + alpha E |h(x_r) - h0(x_r)|^2
            "forget": size * token_mse(hidden, target, forget_mask),
            "retain": size * self.alpha * token_mse(held, self.retain_target(state, anchor), retain_mask),
        }
        with torch.no_grad():
            length = target.float().norm(dim=-1).expand(forget_mask.shape)
            logged = {
                "target_ratio": token_mean(length, forget_mask) * (1 / state.numbers["activation_norm"]),
                "forget_cos": token_cosine(hidden, target, forget_mask),
                "retain_cos": token_cosine(held, anchor, retain_mask),
            }
        return Terms(losses, logged)
