"""rename_scrub: what depends on a name becomes what the model would say of any other name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer

from srmu.data import Topic
from srmu.elicit import ENDS, Likeness, continued, first_token, free_samples
from srmu.errors import UserError
from srmu.losses import predicted, token_kl
from srmu.methods.base import State
from srmu.methods.logits import LogitObjective
from srmu.model import Batch, EditableModel
from srmu.names import Names, Template, batch_of, read_names
from srmu.sampling import Ids
from srmu.train import Schedule, Terms, to


@dataclass(frozen=True, kw_only=True)
class RenameScrub(LogitObjective):
    """Trains what depends on a name towards the model's own answer averaged over other names."""

    name: ClassVar[str] = "rename_scrub"
    paper: ClassVar[str] = "none"
    uses: ClassVar[tuple[str, ...]] = ("retain texts", "names", "texts that the original writes")
    learning_rate: ClassVar[float] = 2e-3
    schedule: ClassVar[Schedule] = "linear"

    names: str | None = None
    coverage: Literal["elicited", "texts"] = "elicited"
    positions: Literal["named", "all"] = "named"
    renamed: bool = True  # renamed texts are taught, too, not only those with their own names
    fresh: bool = True  # other names at each step
    renamings: int = 8  # ways that each text is named, its own among them
    texts: int = 480
    start: int = 4  # tokens of a forget text that the model continues
    length: int = 32
    keep_rows: int = 12
    threshold: float = 0.3  # nats
    keep: float = 2.0
    retain: float = 2.0
    anchor_share: float = 0.5
    noise: float = 0.0
    held: int = 16
    stop_at: float = 0.0
    share: float = 0.5
    hold: float = 1.0
    mode: Literal["kl", "mi"] = "mi"
    inv: float = 1.0
    cal: float = 1.0
    check_every: int = 10

    def prepared(self, topic: Topic) -> Topic:
        return topic.anchored(self.anchor_share) if self.anchor_share else topic

    def setup(self, model: EditableModel, topic: Topic) -> State:
        import time
        t0 = time.time()
        tokenizer = AutoTokenizer.from_pretrained(model.folder)
        names = Names.tokenised(read_names(self.names), tokenizer)
        forget, kept = (texts_of(batches) for batches in (topic.forget, topic.retain))
        samples = free_samples(model, self.texts, self.length, topic.number("own texts"))
        ends = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip().endswith(ENDS)]
        like = Likeness(forget, samples + kept, ends, names.pieces)
        written = forget
        if self.coverage == "elicited":
            starts = [forget[i % len(forget)][: self.start] for i in range(self.texts)]
            written = continued(model, starts, self.length, topic.number("elicited")) + samples
        rows = packed(written, names, like, self.length, first_token(model), topic.generator("packing"), self.share)
        order = torch.randperm(len(rows), generator=topic.generator("order")).tolist()
        rows = [rows[i] for i in order]
        own = Own(names, rows[self.held :], rows[: self.held], samples, like, topic)
        print("setup", round(time.time() - t0, 1), len(rows))
        self.perturb(model, topic)
        return State(numbers={"texts": len(rows)}, memory={"own": own})

    def perturb(self, model, topic):
        if self.noise:
            gen = topic.generator("noise")
            for n, p in model.trained.items():
                if p.ndim > 1:
                    p.data.copy_((1 - self.noise) * p.data + self.noise * 0.02 * torch.randn(p.shape, generator=gen))

    def loss(
        self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int
    ) -> Terms:
        own = state.memory["own"]
        if step % self.check_every == 0:
            left = own.residual(self, model)
            print(step, "residual", round(left, 3))
            if left <= self.stop_at:
                return Terms({}, {}, "what was held out is as any other name's")
        count = len(forget["input_ids"])
        group = own.group(own.turn(own.texts, count, step), self.renamings, step if self.fresh else None)
        p0 = group.read(model, frozen=True)
        p = group.read(model, taught=None if self.renamed else 1)
        target, told = leave_one_out(p0)
        # eq: rename_scrub, L = mean KL(q_k || p_k) + ..., q_k = mean_{j != k} p0_j
        named = group.valid & group.like & (told > self.threshold if self.positions == "named" else True)
        if not self.renamed:
            p0, target, named = p0[:, :1], target[:, :1], named[:, :1]
        valid = group.valid[:, : p.shape[1]]
        rest = valid & ~named
        if self.mode == "kl":
            losses = {"forget": (kl(target, p) * named).sum() / named.sum().clamp(min=1)}
        else:
            where = named.any(1)
            mean = p.exp().mean(1).clamp(min=1e-30).log()
            mean0 = p0.exp().mean(1).clamp(min=1e-30).log()
            mi = kl(p, mean[:, None]).mean(1)
            losses = {"forget": self.inv * (mi * where).sum() / where.sum().clamp(min=1)}
            losses["cal"] = self.cal * (kl(mean0, mean) * where).sum() / where.sum().clamp(min=1)
        near = valid & ~group.like[:, : p.shape[1]] & (told[:, : p.shape[1]] > self.threshold)
        if self.hold:
            losses["hold"] = self.hold * (kl(p0, p) * near).sum() / near.sum().clamp(min=1)
            rest = rest & ~near
        held, count = (kl(p0, p) * rest).sum(), rest.sum()
        if self.keep:
            batch, mask = own.kept(self.keep_rows, step)
            batch, mask = to(batch, model.device), mask.to(model.device)
            with model.frozen(), torch.no_grad():
                before = model.logits(batch)
            k2 = token_kl(before, model.logits(batch))
            losses["keep"] = self.keep * (held + (k2 * mask).sum()) / (count + mask.sum())
        if self.retain:
            with model.frozen(), torch.no_grad():
                before = model.logits(retain)
            k3 = token_kl(before, model.logits(retain)) * predicted(retain["labels"])
            losses["retain"] = self.retain * k3.sum() / predicted(retain["labels"]).sum()
        return Terms(losses, {"named": named.sum().float() / named.shape[1]})


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def leave_one_out(p0: Tensor) -> tuple[Tensor, Tensor]:
    """Of log-probabilities (G, K, L, V): the mean of the others, and KL to it (G, K, L)."""
    p = p0.exp()
    mean = (p.sum(1, keepdim=True) - p) / (p.shape[1] - 1)
    target = mean.clamp(min=1e-30).log()
    return target, kl(p0, target)


def texts_of(batches: Sequence[Batch]) -> list[Ids]:
    return [
        ids[mask == 1].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def packed(texts, names, like, length, first, generator, share=0.5):
    """Sentences with names, joined to texts of about `length` tokens; items and which are like."""
    found = {"forget": {}, "keep": {}}
    for text in texts:
        items = names.template(text).items
        for start, end, kind in like.sentences(items):
            t = tuple(i for i in items[start:end] if i != first)
            if kind in found and Template(t).names:
                found[kind][t] = None
    pools = {}
    for kind, ts in found.items():
        ts = list(ts)
        pools[kind] = [ts[i] for i in torch.randperm(len(ts), generator=generator).tolist()]
    print({k: len(v) for k, v in pools.items()})
    rows, row, flags = [], [first], [False]
    nk = len(pools["forget"]) * share / (1 - share) if pools["keep"] else 0
    order = [("forget", t) for t in pools["forget"]]
    order += [("keep", pools["keep"][i % len(pools["keep"])]) for i in range(round(nk))]
    for i in torch.randperm(len(order), generator=generator).tolist():
        kind, t = order[i]
        if len(row) + len(t) > length and len(row) > 1:
            rows.append((Template(tuple(row)), flags))
            row, flags = [first], [False]
        row += t; flags = flags + [kind == "forget"] * len(t)
    return rows


@dataclass
class Group:
    batch: Batch
    places: Tensor  # (G, K, L)
    valid: Tensor  # (G, K, L)
    like: Tensor

    def read(self, model, frozen=False, taught=None):
        g, k, l = self.places.shape
        places = self.places
        batch = self.batch
        if taught:
            rows = torch.arange(g * k).view(g, k)[:, :taught].flatten()
            batch = {n: t[rows] for n, t in batch.items()}
            places = places[:, :taught]
        batch = to(batch, model.device)
        if frozen:
            with model.frozen(), torch.no_grad():
                logits = model.logits(batch)
        else:
            logits = model.logits(batch)
        flat = places.reshape(-1, l).to(model.device)
        v = logits[torch.arange(len(flat), device=flat.device)[:, None], flat]
        return v.float().log_softmax(-1).view(g, -1, l, v.shape[-1])


class Own:
    def __init__(self, names, texts, held, samples, like, topic):
        self.names, self.texts, self.held, self.samples, self.topic = names, texts, held, samples, topic
        self.masks = []; self.like = like
        for s in samples:
            m = torch.zeros(len(s), dtype=torch.bool)
            for a, b, alike in like.sentences(s):
                m[a:b] = alike == "keep"
            self.masks.append(m[1:])
        self.known = None

    def state_dict(self): return {}
    def load_state_dict(self, s): pass

    def turn(self, items, count, step):
        return [items[(step * count + i) % len(items)] for i in range(count)]

    def kept(self, count, step):
        idx = self.turn(range(len(self.samples)), count, step)
        batch = batch_of([self.samples[i] for i in idx])
        mask = torch.nn.utils.rnn.pad_sequence([self.masks[i] for i in idx], batch_first=True)
        return batch, mask

    def group(self, templates, count, step):
        gen = self.topic.generator(f"renamings {step}")
        rows, places = [], []
        flags = []
        for t, like in templates:
            flags += [torch.tensor(like[1:] + [False])] * count
            for way in self.names.renamed(t, count, gen):
                ids, last = self.names.written(t, way)
                rows.append(ids); places.append(torch.tensor(last))
        pl = torch.nn.utils.rnn.pad_sequence(places, batch_first=True)
        valid = torch.nn.utils.rnn.pad_sequence([torch.ones(len(p) - 1, dtype=torch.bool) for p in places], batch_first=True)
        valid = torch.cat([valid, torch.zeros(len(valid), 1, dtype=torch.bool)], 1)
        g = len(templates)
        fl = torch.nn.utils.rnn.pad_sequence(flags, batch_first=True)
        return Group(batch_of(rows), pl.view(g, count, -1), valid.view(g, count, -1), fl.view(g, count, -1))

    @torch.no_grad()
    def residual(self, method, model):
        if self.known is None:
            self.known = []
            for i in range(0, len(self.held), 4):
                gr = self.group(self.held[i : i + 4], 8, None)
                p0 = gr.read(model, frozen=True)
                _, told = leave_one_out(p0)
                self.known.append((gr, p0.argmax(-1), gr.valid & gr.like & (told > method.threshold)))
        num = n = 0.0
        for gr, top, named in self.known:
            p = gr.read(model)
            own = p.gather(-1, top[..., None])  # G K L 1
            tops = top.transpose(1, 2)[:, None].expand(-1, p.shape[1], -1, -1)  # G K L K
            others = p.gather(-1, tops)
            w = (own > others).float() + 0.5 * (own == others).float()
            sel = named[..., None] & (tops != top[..., None])
            num += float((w * sel).sum()); n += float(sel.sum())
        return 2 * num / max(1, n) - 1
