"""AltPO: alternative answers preferred to the true ones (Mekala et al., arXiv 2409.13474)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from srmu.engine.generate import Ids, sample_continuations
from srmu.errors import SrmuError
from srmu.methods.answers import Answering, encode_answer, fit_answers, list_questions, preference_loss
from srmu.methods.base import Batch, Bounds, Count, EditableModel, State, Terms, Topic
from srmu.methods.own_texts import tokenizer_of

REQUEST = "\nAnother answer, as plausible, in which all facts are changed:"


@dataclass(frozen=True, kw_only=True)
class AltPO(Answering):
    """Prefers answers that the original makes up when it is asked for other facts; a plain text keeps its beginning."""

    name = "altpo"
    paper = "arXiv 2409.13474"
    spreads = False  # the original writes
    uses = ("answers that the original writes", "retain texts (retain)")

    beta: Annotated[float, Bounds(1e-6, 1e6)] = 0.1
    alternatives: Count = 5  # made up for each text
    response: Count = 64  # tokens of an alternative, at most; in public code 200
    request: str = REQUEST  # what the original reads after the true answer, before it writes another
    retain: Literal["none", "nll", "kl"] = "nll"

    def reads(self, topic: Topic) -> int:
        return self.alternatives

    def write_texts(self, model: EditableModel, topic: Topic, state: State) -> Sequence[Sequence[int]]:
        tokenizer, questions = tokenizer_of(model.folder, "method altpo"), list_questions(topic)
        request = tokenizer.encode(self.request, add_special_tokens=False)
        starts = [question.asked + question.answer + request for question in questions]
        found: list[Ids] = []
        for number in range(self.alternatives):
            with model.frozen():
                seed = topic.number(f"alternatives {number}")
                rows = sample_continuations(model.module, starts, self.response, seed)
            texts = [str(tokenizer.decode(row, skip_special_tokens=True)).strip().partition("\n")[0] for row in rows]
            pairs = zip(questions, texts, strict=True)
            answers = [(question, encode_answer(tokenizer, text, question)) for question, text in pairs]
            found += fit_answers(model, questions, ([] if ids == q.answer else ids for q, ids in answers))
            topic.tick()
        state.numbers["alternatives"] = sum(map(bool, found))
        if not any(found):
            raise SrmuError(f"topic {topic.name}: the model made up no other answer; change method.request")
        return found

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        # eq: AltPO, L = -(2/beta) E log sigmoid(beta (log p/p0(y') - log p/p0(y))) + alpha R(x_r)
        return Terms({"forget": preference_loss(model, forget, self.beta), **self.retain_loss(model, retain)}, {})
