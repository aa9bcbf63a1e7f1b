"""DEPN: detecting and editing privacy neurons (Wu et al., arXiv 2310.20138)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from srmu.engine.losses import is_predicted, token_nll
from srmu.engine.sites import down_projection, edit_input, is_turned, shape_by_token
from srmu.engine.topic import move_batch
from srmu.errors import SrmuError
from srmu.methods.base import Amount, Batch, Count, Edit, EditableModel, Share, State, Topic, Watch
from srmu.methods.edits import split_batches


@dataclass(frozen=True, kw_only=True)
class DEPN(Edit):
    """Switches off the MLP neurons that most raise the likelihood of forget texts."""

    name = "depn"
    paper = "arXiv 2310.20138"
    level = "neuron"
    trainable = ("*.mlp_down",)

    points: Count = 8  # between a neuron off and on, where gradients are taken
    neuron_share: Share = 0.1  # of the largest attribution in a text, from which a neuron counts
    text_share: Share = 0.5  # share of texts in which a neuron must count
    most: Amount = 64  # neurons of each topic, at most
    samples: Count = 32  # texts of each topic, at most

    def edit(self, model: EditableModel, topics: Sequence[Topic], watch: Watch) -> dict[str, State]:
        downs: list[Any] = [down_projection(layer) for layer in model.layers]
        states = {}
        for topic in topics:
            method = self.with_options(topic.options)
            texts, attributions = split_batches(topic.forget)[: method.samples], []
            with watch(f"attributing {topic.name} to neurons", len(texts)) as tick:
                for text in texts:
                    attributions.append(attribute_neurons(model, downs, move_batch(text, model.device), method.points))
                    tick("")
            states[topic.name] = method.select_neurons(torch.stack(attributions))
        # Only now: all topics are measured on the same model, whatever their order.
        for state in states.values():
            for layer, neuron in state.tensors["neurons"].tolist():
                weight = downs[layer].weight.data
                # eq: DEPN, edit: W_down[:, k] = 0, as if neuron k were 0 at every token
                (weight if is_turned(downs[layer]) else weight.T)[neuron] = 0
        return states

    def select_neurons(self, attributions: Tensor) -> State:
        """The neurons as rows (layer, index), strongest first, from attributions (N, L, F)."""
        largest = attributions.amax(dim=(1, 2), keepdim=True)
        shares = torch.where(largest > 0, attributions / largest, -torch.inf)
        # eq: DEPN, the neurons with Att >= r1 max(Att) in r2 of the texts or more, the top z
        counts = (shares >= self.neuron_share).sum(dim=0)  # (L, F)
        enough = (counts > 0) & (counts >= self.text_share * len(shares))
        passed = int(enough.sum())
        if not passed:
            share = f"method.neuron_share={self.neuron_share:g} of the largest attribution"
            raise SrmuError(f"no neuron has {share} in method.text_share={self.text_share:g} of the texts; lower one")
        # Ranked by the mean share, in which every text counts alike; the paper gives no order.
        mean = shares.clamp(min=-1).mean(dim=0).masked_fill(~enough, -torch.inf).flatten()
        order = mean.argsort(descending=True, stable=True)[: min(self.most, passed)]
        neurons = torch.stack([order // shares.shape[2], order % shares.shape[2]], dim=1)
        return State({"neurons": neurons}, {"neurons": len(neurons), "passed": passed})


def attribute_neurons(model: EditableModel, downs: Sequence[Any], text: Batch, points: int) -> Float[Tensor, "L F"]:
    """What each neuron adds to the mean log-likelihood of the tokens of a single text.

    `downs` are the linear maps that read the neurons of each layer. These are scaled at all positions that predict a
    counted token; attributions sum to what they add together. All points between off and on are rows of one batch.

    Behind a norm that reads the output of the MLP (Gemma 2, OLMo 2) all points but those next to `off` look alike:
    attributions still rank the neurons, but their sum is too small.
    """
    rows = text.map(lambda tensor: tensor.expand(points, -1))
    ahead = nn.functional.pad(is_predicted(rows["labels"]), (0, 1)).unsqueeze(-1)  # (m, T, 1)
    # Midpoints, whose error falls with m^2. (Public code takes left ends, whose error falls with m.)
    scales = (torch.arange(points, device=model.device) + 0.5) / points
    seen: list[Tensor] = []

    def scale(read: Tensor) -> Tensor:
        w = shape_by_token(read.detach(), *ahead.shape[:2])
        scaled = torch.where(ahead, scales[:, None, None].to(w.dtype) * w, w).requires_grad_()
        seen[:] = w, scaled
        return scaled.reshape(read.shape)

    attributions = []
    for down in downs:
        with edit_input(down, scale):
            cost = token_nll(model.logits(rows), rows["labels"]).sum()
        (slope,) = torch.autograd.grad(-cost / is_predicted(text["labels"]).sum(), seen[1])
        # eq: DEPN, Att_k = w_k / m sum_j dP/dw_k at s_j w, summed over the predicted tokens
        attributions.append((seen[0].float() * slope.float() * ahead).sum(dim=(0, 1)) / points)
    if len({len(one) for one in attributions}) > 1:
        raise SrmuError("this model's layers have MLPs of several widths; take another method, such as method.name=ssd")
    return torch.stack(attributions)
