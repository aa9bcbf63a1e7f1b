"""E4: answers read off early, from the residual between the blocks."""

from dataclasses import dataclass

from srmu.attacks.base import Attack, AttackResult, Exam, Texts, ask_exam
from srmu.engine.hooks import cut_blocks, decoder_blocks
from srmu.evals.subject import Subject


@dataclass(frozen=True, kw_only=True)
class LogitLens(Attack):
    """Final norm and unembedding on what each block puts out (nostalgebraist, 2020).

    The model is cut above the block, so that norm, head and whatever its architecture does with
    logits are its own. With L blocks this takes the exam (L + 1) / 2 times.
    """

    id = "E4"
    name = "logit_lens"
    tier = "smoke"

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        ways = []
        for layer in range(len(decoder_blocks(model.module))):
            with cut_blocks(model.module, layer + 1):
                ways.append(ask_exam(model, exam, f"layer {layer}"))
        return AttackResult(tuple(ways), budget={"layers": len(ways)})
