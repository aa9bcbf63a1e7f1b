"""rename_scrub: what depends on a name becomes what the model would say of any other name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from srmu.data.names import Names, find_names, read_names
from srmu.engine.batch import Batch, move_batch
from srmu.engine.losses import kl_divergence, token_kl
from srmu.engine.model import EditableModel
from srmu.engine.progress import Watch
from srmu.engine.topic import Topic
from srmu.engine.train import Schedule, Terms, TrainOptions
from srmu.methods.base import COUNT, SHARE, WEIGHT, State
from srmu.methods.logits import LogitObjective, ignore_step, kl_drift
from srmu.methods.own_texts import count_chunks, unpad_texts
from srmu.methods.renaming import OwnTexts, items_of_step, leave_one_out, mean_over, write_own_texts
from srmu.methods.srmu import SRMU
from srmu.methods.suppressing import perturb_weights
from srmu.methods.whp_terms import tokenizer_of


@dataclass(frozen=True, kw_only=True)
class RenameScrub(LogitObjective):
    """Trains what depends on a name towards the model's own answer averaged over other names."""

    name: ClassVar[str] = "rename_scrub"
    paper: ClassVar[str] = "none"
    uses: ClassVar[tuple[str, ...]] = ("retain texts", "names", "texts that the original writes")
    learning_rate: ClassVar[float] = 2e-3
    schedule: ClassVar[Schedule] = "linear"

    names: str | None = None  # a .txt file with a name on each line; null: found in the texts
    goals: str | None = None  # such a file of phrases; everything about them is forgotten
    coverage: Literal["elicited", "texts"] = "elicited"  # texts to train on: own ones, forget texts
    own_texts: int = 1500  # from forget prefixes, and as many from nothing; never written to disk
    prompt: int = 4  # tokens of a forget text that the model continues
    own_tokens: int = 32  # of each own text
    renamings: int = 8  # namings of each text: its own, and random others
    renamed: bool = True  # train on other namings too, not on the own one only
    fresh: bool = True  # draw other names at each step
    positions: Literal["named", "all"] = "named"  # tokens that depend on the name, or all
    threshold: float = 0.3  # nats about the name from which a token depends on it
    hold: float = 0.5  # weight of tokens that depend on the name in sentences to keep
    keep: float = 2.0  # weight of all other tokens of own texts
    keep_rows: int = 20  # own texts to keep a step
    retain: float = 1.0  # weight of the retain texts
    noise: float = 0.0  # share of the weights that noise replaces at the start, as in UNDO
    held_out: int = 16  # texts left out of training, on which the stop rule is measured
    stop_at: float = 0.0  # what they reveal above guessing, of 1; below it training stops
    check_every: int = 20  # steps between two such measurements
    closing_kappa: float = 0.0  # strength of a final SRMU pass; 0: none
    closing_rate: float = 5e-5  # learning rate of that pass
    closing_steps: int = 80

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within(own_texts=COUNT, prompt=(2, 1 << 20), own_tokens=(4, 1 << 20))
        self.within(renamings=(2, 1 << 10), threshold=(0, 1e3), noise=SHARE, held_out=(0, 1 << 20))
        self.within(hold=WEIGHT, keep=WEIGHT, retain=WEIGHT, keep_rows=(0, 1 << 20))
        self.within(stop_at=(-1, 1), check_every=COUNT, closing_kappa=WEIGHT)
        for option in ("closing_rate", "closing_steps"):
            self.needs(option, self.closing_kappa > 0, "method.closing_kappa")
        if self.names is not None:
            read_names(self.names)
        if self.goals is not None:
            read_names(self.goals, "goals")

    def read_at_once(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape[0] * self.renamings + self.keep_rows, self.own_tokens

    @property
    def written_tokens(self) -> int:
        return self.kinds * self.own_texts * self.own_tokens

    @property
    def kinds(self) -> int:
        """The number of kinds of own texts: from nothing, and from forget prefixes."""
        return 1 + (self.coverage == "elicited")

    def reads(self, topic: Topic) -> int:
        looked_at = (1 + (self.names is None)) * (len(topic.forget) + len(topic.retain))
        return looked_at + self.kinds * count_chunks(self.own_texts)

    def setup(self, model: EditableModel, topic: Topic) -> State:
        tokenizer = tokenizer_of(model.folder, "rename_scrub")
        goals = read_names(self.goals, "goals") if self.goals else []
        names = Names.encode(self.list_names(tokenizer, topic), tokenizer, goals)
        own = write_own_texts(
            model, topic, names, tokenizer,
            count=self.own_texts, prompt=self.prompt, length=self.own_tokens,
            elicited=self.coverage == "elicited", held_out=self.held_out,
        )  # fmt: skip
        if self.noise and not model.delta():  # once for all topics
            perturb_weights(model, topic.generator("noise", shared=True), self.noise)
        counts = {"names": own.names.tokens, "own_texts": own.texts, "held_out": own.held}
        numbers = {name: len(counted) for name, counted in counts.items()}
        return State({}, numbers, {"own": own})

    def list_names(self, tokenizer: Any, topic: Topic) -> list[str]:
        """The names in the file, or those found in the texts."""
        if self.names is not None:
            return read_names(self.names)
        roles = (unpad_texts(topic.forget[:]), unpad_texts(topic.retain[:]))
        return find_names(*([str(tokenizer.decode(ids)) for ids in texts] for texts in roles))

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        own: OwnTexts = state.memory["own"]
        logged = {}
        if own.held and step % self.check_every == 0:
            share = own.measure_held_out(model, self.renamings, self.threshold)
            logged["held_out_told"] = torch.tensor(share)
            if share <= self.stop_at:
                stop = f"what the held-out texts tell of names is {share:.3f} above guessing"
                return Terms({"forget": torch.zeros(())}, logged, stop)
        texts = items_of_step(own.texts, len(forget["input_ids"]), step)
        group = own.group(texts, self.renamings, f"{step}" if self.fresh else "fixed")
        with model.frozen(), torch.no_grad():
            before = group.read(model)
        target, revealed = leave_one_out(before)
        log_p = group.read(model, None if self.renamed else 1)
        namings = log_p.shape[1]
        before, target, revealed = before[:, :namings], target[:, :namings], revealed[:, :namings]
        alike, follows = group.alike[:, :namings], group.follows[:, :namings]
        depends = follows & (revealed.cpu() > self.threshold)
        scrubbed = follows & alike if self.positions == "all" else depends & alike
        kept_named = depends & ~alike
        changed, drifted = kl_divergence(target, log_p), kl_divergence(before, log_p)
        # eq: rename_scrub, forget: mean KL(q_k || p_k) where what follows tells of the name
        losses = {"forget": mean_over(changed, scrubbed)}
        losses["hold"] = self.hold * mean_over(drifted, kept_named)
        # eq: rename_scrub, keep: mean KL(p0 || p) of all else in own texts
        rest = follows & ~scrubbed & ~kept_named
        kept = mean_over(drifted, rest)
        if self.keep_rows and own.kept:
            batch, mark = own.draw_kept(self.keep_rows, step)
            batch, mark = move_batch(batch, model.device), mark.to(model.device)
            with model.frozen():
                wanted = model.logits(batch)
            kept = kept.pool(mean_over(token_kl(wanted, model.logits(batch)), mark))
        losses["keep"] = self.keep * kept
        # eq: rename_scrub, retain: mean KL(p0 || p) of the retain texts
        losses["retain"] = self.retain * kl_drift(model, retain, model.logits(retain))
        logged["named"] = scrubbed.sum().float()
        return Terms(losses, logged)

    def finish(self, model: EditableModel, topics: Sequence[Topic], train: TrainOptions, watch: Watch) -> None:
        if self.closing_kappa:
            srmu = SRMU(kappa=self.closing_kappa, anchors="random").resolved(model.module.config)
            last = EditableModel(model.module, srmu.trainable)
            options = replace(
                train, learning_rate=self.closing_rate, max_steps=self.closing_steps,
                schedule=None, warmup_steps=0,
            )  # fmt: skip
            srmu.apply(last, topics, options, ignore_step, watch)
