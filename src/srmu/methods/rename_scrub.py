"""rename_scrub: what depends on a name becomes what the model would say of any other name."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

import srmu.methods.own_texts as writing
import srmu.methods.renaming as renaming
from srmu.data.names import Names, find_names, names_in, read_names
from srmu.engine.losses import kl_divergence, token_kl
from srmu.engine.topic import move_batch
from srmu.errors import SrmuError
from srmu.methods.base import Amount, Batch, Bounds, Count, EditableModel, Share, State, Terms, Topic, Weight
from srmu.methods.logits import LogitObjective, kl_drift
from srmu.methods.suppressing import perturb_weights
from srmu.methods.whp_terms import tokenizer_of


@dataclass(frozen=True, kw_only=True)
class RenameScrub(LogitObjective):
    """Trains what depends on a name towards the model's own answer averaged over other names."""

    name = "rename_scrub"
    paper = "none"
    uses = ("retain texts", "names", "texts that the original writes")
    learning_rate = 2e-3
    schedule = "linear"

    names: str | None = None  # a .txt file with a name on each line; null: found in the texts
    goals: str | None = None  # such a file of phrases; everything about them is forgotten
    coverage: Literal["elicited", "texts"] = "elicited"  # texts to train on: own ones, forget texts
    own_texts: Count = 1500  # from forget prefixes, and as many from nothing; never written to disk
    prompt: Annotated[int, Bounds(2, 1 << 20)] = 4  # tokens of a forget text that the model continues
    own_tokens: Annotated[int, Bounds(4, 1 << 20)] = 32  # of each own text
    renamings: Annotated[int, Bounds(2, 1 << 10)] = 8  # namings of each text: its own, and random others
    renamed: bool = True  # train on other namings too, not on the own one only
    fresh: bool = True  # draw other names at each step
    positions: Literal["named", "all"] = "named"  # tokens that depend on the name, or all
    threshold: Annotated[float, Bounds(0, 1e3)] = 0.3  # nats about the name from which a token depends on it
    hold: Weight = 0.5  # weight of tokens that depend on the name in sentences to keep
    keep: Weight = 2.0  # weight of all other tokens of own texts
    keep_rows: Amount = 20  # own texts to keep a step
    retain: Weight = 1.0  # weight of the retain texts
    noise: Share = 0.0  # share of the weights that noise replaces at the start, as in UNDO
    held_out: Amount = 16  # texts left out of training, on which the stop rule is measured
    stop_at: Annotated[float, Bounds(-1, 1)] = 0.0  # what they reveal above guessing, of 1; below it training stops
    check_every: Count = 20  # steps between two such measurements

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("names", "goals"):
            if (path := getattr(self, option)) is not None:
                read_names(path, option)

    def read_at_once(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape[0] * self.renamings + self.keep_rows, self.own_tokens

    @property
    def written_tokens(self) -> int:
        return self.kinds * self.own_texts * self.own_tokens

    @property
    def kinds(self) -> int:  # of own texts: from nothing, and from forget prefixes
        return 1 + (self.coverage == "elicited")

    def reads(self, topic: Topic) -> int:
        return len(topic.forget) + len(topic.retain) + self.kinds * writing.count_chunks(self.own_texts)

    def setup(self, model: EditableModel, topic: Topic) -> State:
        own = self.write_own_texts(model, topic)
        if self.noise and not model.delta():  # once for all topics
            perturb_weights(model, topic.generator("noise", shared=True), self.noise)
        counts = {"names": own.names.tokens, "own_texts": own.texts, "held_out": own.held}
        return State({}, {name: len(counted) for name, counted in counts.items()}, {"own": own})

    def write_own_texts(self, model: EditableModel, topic: Topic) -> renaming.OwnTexts:
        """Texts by the original after the beginnings of forget texts, and from nothing.

        SrmuError if none of the names is in the forget texts, or it writes nothing new about them.
        """
        tokenizer = tokenizer_of(model.folder, "rename_scrub")
        forget, retain = writing.unpad_texts(topic.forget[:]), writing.unpad_texts(topic.retain[:])
        if self.names is None:
            found = find_names(*([str(tokenizer.decode(ids)) for ids in texts] for texts in (forget, retain)))
        else:
            found = read_names(self.names)
        names = Names.encode(found, tokenizer, read_names(self.goals, "goals") if self.goals else [])
        mentioned = {name for ids in forget for name in names_in(names.template(ids))}
        for option, kind in zip(("names", "goals"), names.kinds, strict=False):
            if mentioned.isdisjoint(kind):
                raise SrmuError(
                    f"method.{option}: none of its {len(kind)} {option} is in topic {topic.name}'s "
                    "forget texts; name what they tell of"
                )
        count, length, elicited = self.own_texts, self.own_tokens, self.coverage == "elicited"
        free_texts = writing.free_samples(model, count, length, topic.number("own texts"), topic.tick)
        starts = [forget[i % len(forget)][: self.prompt] for i in range(count if elicited else 0)]
        elicited_texts = writing.continue_texts(model, starts, length, topic.number("elicited"), topic.tick)
        likeness = writing.Likeness(forget, free_texts + retain, names, writing.Spelling.of(tokenizer))
        first = writing.first_token(model)
        written, known = (
            renaming.sentences_of(part, names, likeness, first) for part in (elicited_texts + free_texts, forget)
        )
        if elicited and not {*written["forget"]} - {*known["forget"]}:
            raise SrmuError(
                f"topic {topic.name}: what the model wrote after the beginnings of forget texts tells "
                "nothing new of the names; raise method.own_texts or method.own_tokens, or set "
                "method.coverage=texts"
            )
        if not elicited:  # all sentences of the forget texts, of whatever kind
            written["forget"] = [sentence for kind in known.values() for sentence in kind]
        texts = renaming.pack_sentences(written, length, first, topic.generator("packing"))
        held = min(self.held_out, len(texts) // 4)
        return renaming.OwnTexts(names, texts[held:], texts[:held], renaming.kept_tokens(free_texts, likeness), topic)

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        own: renaming.OwnTexts = state.memory["own"]
        logged = {}
        if own.held and step % self.check_every == 0:
            share = own.measure_held_out(model, self.renamings, self.threshold)
            logged["held_out_told"] = torch.tensor(share)
            if share <= self.stop_at:
                stop = f"what the held-out texts tell of names is {share:.3f} above guessing"
                return Terms({"forget": torch.zeros(())}, logged, stop)
        texts = renaming.items_of_step(own.texts, len(forget["input_ids"]), step)
        group = own.group(texts, self.renamings, f"{step}" if self.fresh else "fixed")
        with model.frozen(), torch.no_grad():
            before = group.read(model)
        log_p = group.read(model, None if self.renamed else 1)
        several = (*renaming.leave_one_out(before), before, group.alike, group.follows)
        target, revealed, before, alike, follows = (each[:, : log_p.shape[1]] for each in several)
        depends = follows & (revealed.cpu() > self.threshold)
        scrubbed = follows & alike if self.positions == "all" else depends & alike
        kept_named = depends & ~alike
        changed, drifted = kl_divergence(target, log_p), kl_divergence(before, log_p)
        # eq: rename_scrub, forget: mean KL(q_k || p_k) where what follows tells of the name
        losses = {"forget": renaming.mean_over(changed, scrubbed)}
        losses["hold"] = self.hold * renaming.mean_over(drifted, kept_named)
        # eq: rename_scrub, keep: mean KL(p0 || p) of all else in own texts
        kept = renaming.mean_over(drifted, follows & ~scrubbed & ~kept_named)
        if self.keep_rows and own.kept:
            batch, mark = own.draw_kept(self.keep_rows, step)
            batch = move_batch(batch, model.device)
            with model.frozen():
                wanted = model.logits(batch)
            kept = kept.pool(renaming.mean_over(token_kl(wanted, model.logits(batch)), mark))
        losses["keep"] = self.keep * kept
        # eq: rename_scrub, retain: mean KL(p0 || p) of the retain texts
        losses["retain"] = self.retain * kl_drift(model, retain)
        logged["named"] = scrubbed.sum().float()
        return Terms(losses, logged)
