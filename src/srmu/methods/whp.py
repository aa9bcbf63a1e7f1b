"""WHP: Who's Harry Potter (Eldan and Russinovich, arXiv 2310.02238)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from srmu.data.names import Names, Slot
from srmu.engine.files import read_json
from srmu.engine.generate import Ids, batch_texts
from srmu.engine.losses import generic_logits, is_predicted, masked_mean
from srmu.engine.topic import Batch, Topic, interleave_batches, move_batch
from srmu.errors import SrmuError
from srmu.methods.base import Count, EditableModel, MethodOutcome, Needs, Rate, Session, State, Terms, Weight
from srmu.methods.logits import LogitObjective, fine_tune, strengthen_weights
from srmu.methods.own_texts import tokenizer_of


@dataclass(frozen=True, kw_only=True)
class WHP(LogitObjective):
    """Learns what a model that never read the forget texts would say in their place."""

    name = "whp"
    paper = "arXiv 2310.02238"
    uses = ("the original's logits", "a model strengthened on the forget texts", "generic terms for its own (anchors)")

    mode: Literal["soft", "argmax", "logits"] = "soft"  # logits: trains nothing, two models answer
    strength: Weight = 5.0  # factor of the rise of a logit that is subtracted
    teacher_steps: Count = 40  # of fine-tuning on the forget texts
    teacher_learning_rate: Rate = 1e-5  # of that fine-tuning
    anchors: Annotated[str | None, Needs("method.mode=soft or argmax")] = None  # a JSON file of {term: generic term}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchors is not None:
            read_anchors(self.anchors)

    @property
    def no_checkpoint(self) -> str:
        why = "whp with mode=logits is two models at inference; method.mode=soft distils it into one"
        return why if self.mode == "logits" else ""

    def apply(self, model: EditableModel, topics: Sequence[Topic], session: Session) -> MethodOutcome:
        if self.mode != "logits":
            return super().apply(model, topics, session)
        texts = replace(topics[0], forget=interleave_batches([topic.forget for topic in topics]))
        with self.editing(model, topics), session.watch("strengthening", self.teacher_steps) as tick:
            texts = texts.with_tick(partial(tick, self.name))
            fine_tune(model, texts, self.teacher_steps, self.teacher_learning_rate)
        return MethodOutcome({}, "strengthened")

    def at_inference(self, module: nn.Module, write: Callable[[], None]) -> AbstractContextManager[Any]:
        if self.mode != "logits":
            return super().at_inference(module, write)
        return combine_logits(module, write, partial(generic_logits, strength=self.strength))

    def result_logits(self, model: EditableModel, batch: Batch) -> Tensor:
        logits = model.logits(batch)
        with model.frozen():
            return generic_logits(model.logits(batch), logits, self.strength) if self.mode == "logits" else logits

    def reads(self, topic: Topic) -> int:
        return self.teacher_steps

    def setup(self, model: EditableModel, topic: Topic) -> State:
        anchors = None
        if self.anchors is not None:
            terms = read_anchors(self.anchors)
            anchors = tokenise_terms(terms, tokenizer_of(model.folder, "method.anchors"))
            if terms and not any(translate_batch(batch, *anchors).named for batch in topic.forget[:]):
                raise SrmuError(f"method.anchors={self.anchors}: none of its terms is in {topic.name}'s forget texts")
        tuned = strengthen_weights(model, topic, self.teacher_steps, self.teacher_learning_rate)
        return State(memory={"strengthened": tuned, "anchors": anchors})

    def generic_target(self, model: EditableModel, state: State, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits without the topic at each position, and the positions to learn from."""
        usable = is_predicted(batch["labels"])
        with model.frozen():
            base = model.logits(batch).float()
            if state.memory["anchors"] is not None:
                generic = translate_batch(batch, *state.memory["anchors"])
                logits, before = model.logits(move_batch(generic.batch, model.device)).float(), base
                base = logits[torch.arange(len(logits))[:, None].to(logits.device), generic.places.to(logits.device)]
                # After a term, its generic term is no likelier than in the original text, where it was not
                # mentioned. (The paper reduces these logits too, and does not say by how much.)
                for row, last, token in generic.named:
                    base[row, last:, token] = torch.minimum(base[row, last:, token], before[row, last:, token])
                usable = usable & generic.usable[:, :-1].to(model.device)
        with model.using(state.memory["strengthened"]):
            raised = model.logits(batch)
        # eq: WHP, v = v0 - strength relu(v+ - v0)
        # (of raw logits, as in the paper: a constant added to one of them would change v)
        return generic_logits(base, raised, self.strength)[:, :-1], usable

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        target, usable = self.generic_target(model, state, forget)
        log_p = model.logits(forget)[:, :-1].float().log_softmax(-1)
        # eq: WHP, L = mean CE(softmax(v), p), or CE(argmax v, p)
        if self.mode == "argmax":
            costs = -log_p.gather(-1, target.argmax(-1, keepdim=True)).squeeze(-1)
        else:
            costs = -(target.softmax(-1) * log_p).sum(-1)
        return Terms({"forget": masked_mean(costs, usable, least=1)}, {})


class Translation(NamedTuple):
    """A batch with generic terms, and the places of the original positions in it."""

    batch: Batch
    places: Tensor  # (B, T) in the translation; 0 where there is none
    usable: Tensor  # (B, T) bool: whether the next token can be learned there
    named: list[tuple[int, int, int]]  # row, last position of a term, first token of its generic


def read_anchors(path: str) -> dict[str, str]:
    """Terms with their generic ones, from a JSON file; SrmuError naming the file if it is wrong."""
    if not path.endswith(".json"):
        raise SrmuError(f"method.anchors={path}: expected a .json file of {{term: generic term}}")
    terms: Any = read_json(Path(path))
    texts = [*terms, *terms.values()] if isinstance(terms, dict) else [None]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise SrmuError(f'method.anchors={path}: expected an object of texts, like {{"Hogwarts": "the academy"}}')
    return {term.strip(): generic.strip() for term, generic in terms.items()}


def tokenise_terms(terms: dict[str, str], tokenizer: Any) -> tuple[Names, Names]:
    """The terms and their generic ones in tokens; one that the tokenizer does not know occurs in no text."""
    unknown = tokenizer.unk_token_id
    known = [term for term in terms if unknown not in tokenizer.encode(f" {term}", add_special_tokens=False)]
    return Names.encode(known, tokenizer), Names.encode([terms[term] for term in known], tokenizer)


def translate_batch(batch: Batch, terms: Names, generics: Names) -> Translation:
    """The batch with generic terms, padded on the right.

    A token outside terms has its own place; the last token of a term has that of the last token of its generic term,
    and its other tokens have none. From the second occurrence of a term in a text on, its tokens are not learned, as in
    the paper: after "He is called Harry" nobody is "Jon", and to rename a person in mid-text is to contradict oneself.
    """
    shape = batch["input_ids"].shape
    places, usable = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    same = {number: number for number in range(len(terms.tokens))}
    rows: list[Ids] = []
    named: list[tuple[int, int, int]] = []
    every = zip(batch["input_ids"].cpu(), batch["attention_mask"].cpu(), strict=True)
    for row, (padded, mask) in enumerate(every):
        template = terms.template(padded[mask == 1].tolist())
        written, ends = generics.write(template, same)
        rows.append(written)
        at = int(mask.argmax())  # position of an item's first token: padding may come first
        seen: set[int] = set()
        for item, end in zip(template, ends, strict=True):
            last = at
            if isinstance(item, Slot):
                last += len(terms.tokens[item.name][item.form]) - 1
                if item.name in seen:
                    usable[row, at - 1] = False  # it predicts the term
                seen.add(item.name)
                named.append((row, last, generics.tokens[item.name][item.form][0]))
            places[row, last], usable[row, last] = end, True
            at = last + 1
    return Translation(batch_texts(rows), places, usable, named)


@contextmanager
def combine_logits(module: nn.Module, write: Callable[[], None], combine: Callable[..., Tensor]) -> Iterator[None]:
    """Run the block with a module whose logits, computed without a cache, are those before and after `write`."""
    places = dict(module.named_parameters())
    before = {name: place.detach().clone() for name, place in places.items()}
    write()
    before = {name: old for name, old in before.items() if not torch.equal(old, places[name])}
    after = {name: places[name].data for name in before}
    inner: Any = module.forward
    generate: Any = module.generate

    def put(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            places[name].data = tensor

    # Evals and `generate` choose what to pass by these names: positions, but no past.
    def forward(input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, **options: Any) -> Any:
        options |= {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
        options["past_key_values"] = None
        put(before)
        try:
            old = inner(input_ids, **options).logits
        finally:
            put(after)
        output = inner(input_ids, **options)
        output.logits = combine(old, output.logits).to(old.dtype)
        return output

    def uncached(*args: Any, **options: Any) -> Any:
        return generate(*args, **options | {"use_cache": False})

    with patch.object(module, "forward", forward), patch.object(module, "generate", uncached):
        yield
