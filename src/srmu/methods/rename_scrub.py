"""rename_scrub: what depends on a name becomes what the model would say of any other name."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import srmu.methods.own_texts as writing
from srmu.data.names import Item, Names, Template, find_names, names_in, read_names
from srmu.engine.generate import Ids, batch_texts
from srmu.engine.losses import Mean, kl_divergence, masked_mean, token_kl
from srmu.engine.topic import move_batch
from srmu.errors import SrmuError
from srmu.methods.base import Amount, Batch, Bounds, Count, EditableModel, Share, State, Terms, Topic, Weight
from srmu.methods.logits import LogitObjective, kl_drift
from srmu.methods.own_texts import Kind, Likeness
from srmu.methods.suppressing import perturb_weights

HELD_AT_ONCE = 4  # held-out texts that are read at once


def leave_one_out(log_p: Float[Tensor, "G K L V"]) -> tuple[Float[Tensor, "G K L V"], Float[Tensor, "G K L"]]:
    """For each naming, the mean distribution under the others, and what tokens reveal of the name: KL(own || mean)."""
    p = log_p.exp()
    # eq: rename_scrub, q_k = mean over j != k of p0(. | the text in naming j)
    mean = (p.sum(dim=1, keepdim=True) - p) / (p.shape[1] - 1)
    target = mean.clamp(min=1e-30).log()
    return target, kl_divergence(log_p, target)


def count_still_told(
    log_p: Float[Tensor, "G K L V"], top: Int[Tensor, "G K L"], where: Bool[Tensor, "G K L"]
) -> tuple[float, int]:
    """How often a name's own answer (`top`, the original's) beats another name's, a tie one half, and of how many."""
    others = top.transpose(1, 2)[:, None].expand(-1, top.shape[1], -1, -1)  # (G, K, L, K)
    own, rival = log_p.gather(-1, top[..., None]), log_p.gather(-1, others)
    wins = (own > rival).float() + 0.5 * (own == rival).float()
    pairs = where[..., None] & (others != top[..., None])
    return float((wins * pairs).sum()), int(pairs.sum())


def mean_over(values: Tensor, where: Tensor) -> Mean:
    """Mean of the marked values; 0 if none is marked."""
    return masked_mean(values, where.to(values.device), least=1)


def items_of_step(items: list[Any], count: int, step: int) -> list[Any]:
    """The items of a step: `count` for each step in order, starting again at the end."""
    return [items[(step * count + i) % len(items)] for i in range(count)]


@dataclass(frozen=True)
class NamingGroup:
    """G texts under K namings each: a batch, and where each of the L items of a text ends."""

    batch: Batch
    places: Int[Tensor, "G K L"]
    follows: Bool[Tensor, "G K L"]  # whether another item follows, which can be predicted
    alike: Bool[Tensor, "G K L"]  # whether what follows is in a sentence like the forget texts

    def read(self, model: EditableModel, namings: int | None = None) -> Float[Tensor, "G k L V"]:
        """Log-probabilities of what follows each item, under the first `namings` only."""
        count, every, length = self.places.shape
        rows = torch.arange(count * every).view(count, every)[:, :namings].flatten()
        logits = model.logits(move_batch(self.batch.cut(rows), model.device))
        places = self.places.view(-1, length)[rows].to(model.device)
        logits = logits[torch.arange(len(rows), device=model.device)[:, None], places]
        return logits.float().log_softmax(-1).view(count, -1, length, logits.shape[-1])


class SlottedText(NamedTuple):
    """A text with slots for names, and which of its items are in sentences like forget texts."""

    template: Template
    alike: list[bool]


@dataclass
class OwnTexts:
    """Texts by the original: those that mention names, those held out, and those to keep."""

    names: Names
    texts: list[SlottedText]
    held: list[SlottedText]
    kept: list[tuple[Ids, list[bool]]]  # tokens, and which of them to hold
    topic: Topic

    def group(self, texts: list[SlottedText], namings: int, draw: str) -> NamingGroup:
        """The texts under that many namings; `draw` names the random stream."""
        generator = self.topic.generator(f"namings {draw}")
        rows: list[Ids] = []
        marks: list[list[Tensor]] = []  # places, follows, alike of each row
        for template, alike in texts:
            for naming in self.names.draw_namings(template, namings, generator):
                ids, last = self.names.write(template, naming)
                rows.append(ids)
                follows = torch.arange(len(last)) < len(last) - 1
                marks.append([torch.tensor(last), follows, torch.tensor([*alike[1:], False])])
        padded = (pad_sequence([*part], batch_first=True) for part in zip(*marks, strict=True))
        return NamingGroup(batch_texts(rows), *(part.view(len(texts), namings, -1) for part in padded))

    @torch.no_grad()
    def measure_held_out(self, model: EditableModel, namings: int, threshold: float) -> float:
        """What held-out texts still reveal of names, 1 all, 0 no more than of others; 1 if they never revealed any."""
        wins, pairs = 0.0, 0
        for start in range(0, len(self.held), HELD_AT_ONCE):
            group = self.group(self.held[start : start + HELD_AT_ONCE], namings, "held out")
            with model.frozen():
                before = group.read(model)
            _, revealed = leave_one_out(before)
            where = group.follows & group.alike & (revealed.cpu() > threshold)
            result = count_still_told(group.read(model), before.argmax(-1), where.to(model.device))
            wins, pairs = wins + result[0], pairs + result[1]
        return 2 * wins / pairs - 1 if pairs else 1.0


def kept_tokens(texts: list[Ids], like: Likeness) -> list[tuple[Ids, list[bool]]]:
    """Texts of two tokens or more, with marks on the tokens that are to stay."""
    kept = []
    for ids in texts:
        mark = [kind == "keep" for start, end, kind in like.sentences(ids) for _ in range(start, end)]
        if len(ids) > 1 and any(mark[1:]):
            kept.append((ids, mark))
    return kept


def sentences_of(texts: list[Ids], names: Names, like: Likeness, first: int) -> dict[Kind, list[Template]]:
    """The sentences that mention names, by kind; `first` is the token that begins texts."""
    kinds: dict[Kind, dict[Template, None]] = {"forget": {}, "keep": {}, "neither": {}}
    for ids in texts:
        whole = names.template(ids)
        for start, end, kind in like.sentences(whole):
            sentence = tuple(item for item in whole[start:end] if item != first)
            if names_in(sentence):
                kinds[kind][sentence] = None
    return {kind: [*sentences] for kind, sentences in kinds.items()}


def pack_sentences(
    sentences: dict[Kind, list[Template]], length: int, first: int, generator: torch.Generator
) -> list[SlottedText]:
    """Each sentence to forget and as many to keep, in texts of about `length` that hold both, to be told apart."""
    forget, keep = sentences["forget"], sentences["keep"]
    marked = [(sentence, True) for sentence in forget]
    marked += [(keep[i % len(keep)], False) for i in range(len(forget) if keep else 0)]
    texts: list[tuple[list[Item], list[bool]]] = [([first], [False])]
    for i in torch.randperm(len(marked), generator=generator).tolist():
        sentence, forgets = marked[i]
        if len(texts[-1][0]) > max(1, length - len(sentence)):
            texts.append(([first], [False]))
        items, alike = texts[-1]
        items += sentence
        alike += [forgets] * len(sentence)
    return [SlottedText(tuple(items), alike) for items, alike in texts if len(items) > 1]


@dataclass(frozen=True, kw_only=True)
class RenameScrub(LogitObjective):
    """Trains what depends on a name towards the model's own answer averaged over other names."""

    name = "rename_scrub"
    uses = ("retain texts", "names", "texts that the original writes")
    learning_rate = 2e-3 * 640 / 14336  # found on the testbed
    scales = True
    schedule = "linear"
    selective = True  # what depends on names

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

    @property
    def written_tokens(self) -> int:
        """The number of tokens that the model writes for a topic before the first step."""
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

    def write_own_texts(self, model: EditableModel, topic: Topic) -> OwnTexts:
        """Texts by the original; SrmuError if forget texts have none of the names, or it tells nothing new of them."""
        tokenizer = writing.tokenizer_of(model.folder, "rename_scrub")
        forget, retain = writing.unpad_texts(topic.forget[:]), writing.unpad_texts(topic.retain[:])
        if self.names is None:
            found = find_names(*([str(tokenizer.decode(ids)) for ids in texts] for texts in (forget, retain)))
        else:
            found = read_names(self.names)
        names = Names.encode(found, tokenizer, read_names(self.goals, "goals") if self.goals else [])
        mentioned = {name for ids in forget for name in names_in(names.template(ids))}
        for option, kind in zip(("names", "goals"), names.kinds, strict=False):
            if mentioned.isdisjoint(kind):
                why = f"none of its {len(kind)} {option} is in topic {topic.name}'s forget texts"
                raise SrmuError(f"method.{option}: {why}; list those that the texts tell about")
        count, length, elicited = self.own_texts, self.own_tokens, self.coverage == "elicited"
        free_texts = writing.free_samples(model, topic, count, length, "own texts")
        starts = [forget[i % len(forget)][: self.prompt] for i in range(count if elicited else 0)]
        elicited_texts = writing.continue_texts(model, topic, starts, length, "elicited")
        likeness = writing.Likeness(forget, free_texts + retain, names, writing.Spelling.of(tokenizer))
        first = writing.first_token(model)
        written, known = (sentences_of(part, names, likeness, first) for part in (elicited_texts + free_texts, forget))
        if elicited and not {*written["forget"]} - {*known["forget"]}:
            why = f"topic {topic.name}: what the model wrote on from forget texts tells nothing new of the names"
            raise SrmuError(f"{why}; raise method.own_texts or method.own_tokens, or set method.coverage=texts")
        if not elicited:  # all sentences of the forget texts, of whatever kind
            written["forget"] = [sentence for kind in known.values() for sentence in kind]
        texts = pack_sentences(written, length, first, topic.generator("packing"))
        held = min(self.held_out, len(texts) // 4)
        return OwnTexts(names, texts[held:], texts[:held], kept_tokens(free_texts, likeness), topic)

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
        log_p = group.read(model, None if self.renamed else 1)
        several = (*leave_one_out(before), before, group.alike, group.follows)
        target, revealed, before, alike, follows = (each[:, : log_p.shape[1]] for each in several)
        depends = follows & (revealed.cpu() > self.threshold)
        scrubbed = follows & alike if self.positions == "all" else depends & alike
        kept_named = depends & ~alike
        changed, drifted = kl_divergence(target, log_p), kl_divergence(before, log_p)
        # eq: rename_scrub, forget: mean KL(q_k || p_k) where what follows tells of the name
        losses = {"forget": mean_over(changed, scrubbed)}
        losses["hold"] = self.hold * mean_over(drifted, kept_named)
        # eq: rename_scrub, keep: mean KL(p0 || p) of all else in own texts
        kept = mean_over(drifted, follows & ~scrubbed & ~kept_named)
        if self.keep_rows and own.kept:
            rows = items_of_step(own.kept, self.keep_rows, step)
            batch = move_batch(batch_texts([ids for ids, _ in rows]), model.device)
            mark = pad_sequence([torch.tensor(marks[1:]) for _, marks in rows], batch_first=True)  # (B, T - 1)
            with model.frozen():
                wanted = model.logits(batch)
            kept = kept.pool(mean_over(token_kl(wanted, model.logits(batch)), mark))
        losses["keep"] = self.keep * kept
        # eq: rename_scrub, retain: mean KL(p0 || p) of the retain texts
        losses["retain"] = self.retain * kl_drift(model, retain)
        logged["named"] = scrubbed.sum().float()
        return Terms(losses, logged)
