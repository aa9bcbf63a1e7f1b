"""SSD: selective synaptic dampening (Foster, Schoepf and Brintrup, arXiv 2308.07707)."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from srmu.engine import distributed
from srmu.errors import SrmuError
from srmu.methods.base import Count, EditableModel, State, Topic, Watch, Weight
from srmu.methods.edits import Tensors, WholeEdit, batch_nlls, gradient_sums, pool_topics, split_batches


@dataclass(frozen=True, kw_only=True)
class SSD(WholeEdit):
    """Dampens, once, the weights that matter far more to forget texts than to others."""

    name = "ssd"
    paper = "arXiv 2308.07707"
    spreads = True
    uses = ("retain texts",)

    alpha: Weight = 10.0  # times as important to forget texts a weight must be
    lam: Weight = 1.0  # factor of the remaining weight
    # `all`, as in the paper: retain and forget texts together. With as many of both, no ratio is then above 2.
    reference: Literal["all", "retain"] = "retain"  # texts to compare importance with
    exclude: tuple[str, ...] = ()  # globs of tensors to leave as they are, such as *norm*
    samples: Count = 64  # texts of each kind, at most

    def edit(self, model: EditableModel, topics: Sequence[Topic], watch: Watch) -> dict[str, State]:
        pool = pool_topics(self.name, topics)
        method = self.with_options(pool.options)
        i_f, i_d = method.importances(model, pool, watch)
        selected, total = 0, 0.0
        for name in i_f:
            factor = dampening_factors(i_f[name], i_d[name], method.alpha, method.lam)
            with torch.no_grad():
                model.trained[name].copy_(model.trained[name].float() * factor)
            factors = distributed.gather_tensor(factor)
            selected += int((factors < 1).sum())
            total += float(factors[factors < 1].sum())
        if not selected:
            advice = "lower method.alpha" + ", or method.reference=retain" * (method.reference == "all")
            raise SrmuError(f"no weight is over {method.alpha:g} times as important to the forget texts; {advice}")
        count = sum(p.numel() for p in model.trained.values())
        numbers = {"dampened_share": selected / count, "mean_factor": total / selected}
        return {topic.name: State(numbers=numbers) for topic in topics}

    def importances(self, model: EditableModel, topic: Topic, watch: Watch) -> tuple[Tensors, Tensors]:
        """The importance of each weight, to the forget texts and to the reference."""
        left_out = {n for n in model.trained for glob in self.exclude if fnmatchcase(n, glob)}
        if self.exclude and not left_out:
            raise SrmuError(f"method.exclude={self.exclude}: matches no tensor that is edited")
        forget, retain = split_batches(topic.forget), split_batches(topic.retain)
        count = min(self.samples, len(forget), len(retain))
        chosen = {name: p for name, p in model.trained.items() if name not in left_out}
        with watch("measuring importances", 2 * count) as tick, model.only([*chosen]):
            # eq: SSD, I_i = E_x (d nll(x) / d theta_i)^2, over single texts
            # (Public code squares the mean gradient of a batch, which depends on its size.) Only ratios are used.
            sums = []
            for texts in (forget[:count], retain[:count]):
                # The gradient of a sharded tensor is a mean over processes: then each of them reads all texts.
                if not any(map(distributed.is_sharded, chosen.values())):
                    texts = texts[distributed.get_rank() :: distributed.get_size()]
                part = gradient_sums(chosen, batch_nlls(model, texts, tick), 2)
                sums.append({k: t if distributed.is_sharded(t) else distributed.sum_values(t) for k, t in part.items()})
        i_f, i_d = sums
        if self.reference == "all":
            for name in i_d:
                i_d[name].lerp_(i_f[name], len(forget) / (len(forget) + len(retain)))
        return i_f, i_d


def dampening_factors(i_f: Tensor, i_d: Tensor, alpha: float, lam: float) -> Tensor:
    """The factor of each weight, from its importance to forget texts and to the reference."""
    # eq: SSD, theta_i <- theta_i min(lambda I_D,i / I_f,i, 1) where I_f,i > alpha I_D,i
    return torch.where(i_f > alpha * i_d, (lam * i_d / i_f).clamp(max=1), 1.0)
