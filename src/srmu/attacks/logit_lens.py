"""E4: answers read off early, from the residual between the blocks."""

from srmu.attacks.base import AttackResult, Exam, Texts, Tier, ask_exam
from srmu.attacks.layers import cut_blocks, decoder_blocks
from srmu.evals.subject import Subject


def logit_lens(model: Subject, texts: Texts, exam: Exam, tier: Tier, seed: int) -> AttackResult:
    """Final norm and unembedding on what each block puts out (nostalgebraist, 2020).

    The model is cut above the block, so that norm, head and whatever its architecture does with
    logits are its own. With L blocks this takes the exam (L + 1) / 2 times.
    """
    ways = []
    for layer in range(len(decoder_blocks(model))):
        with cut_blocks(model, layer + 1):
            ways.append(ask_exam(model, exam, f"layer {layer}"))
    return AttackResult(tuple(ways), budget={"layers": len(ways)})
