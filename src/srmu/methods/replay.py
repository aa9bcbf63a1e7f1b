"""Anchors that the original model writes itself, less those that sound like the forget texts."""

from srmu.engine.generate import Ids
from srmu.engine.model import EditableModel
from srmu.engine.topic import Topic
from srmu.errors import SrmuError
from srmu.methods.own_texts import free_samples, typical_tokens, unpad_texts


def own_anchors(
    model: EditableModel, topic: Topic, count: int, ratio: float
) -> tuple[list[Ids], int]:
    """Texts of the original without a token that is typical of the forget texts; how many had one.

    Without that filter they teach again what is to be forgotten. They stay in memory.
    """
    length = max(batch["input_ids"].shape[1] for batch in topic.retain)
    own = free_samples(model, count, length, topic.number("own anchors"))
    own = [row for row in own if len(row) > 1]
    forget = unpad_texts(topic.forget)
    # of short texts, special tokens are typical, too
    refused = {*typical_tokens(forget, own, ratio).tolist()} & {*topic.vocabulary.tolist()}
    kept = [row for row in own if not refused & {*row}]
    if not kept:
        raise SrmuError(
            f"anchors=self: each of {len(own)} texts that the model wrote has a token typical of "
            f"topic {topic.name}'s forget texts; raise method.own_texts, or set "
            "method.anchors=random"
        )
    return kept, len(own) - len(kept)
