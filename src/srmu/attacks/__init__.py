"""The attacks: one function in one file each, all of the same shape."""

from collections.abc import Callable
from typing import NamedTuple

from srmu.attacks.base import AttackResult, Exam, Texts, Tier
from srmu.attacks.benign_relearning import benign_relearning
from srmu.attacks.direction_ablation import direction_ablation
from srmu.attacks.entangled_queries import entangled_queries
from srmu.attacks.extraction import extraction
from srmu.attacks.forced_choice import forced_choice
from srmu.attacks.forget_quality import forget_quality
from srmu.attacks.format_shift import format_shift
from srmu.attacks.gcg import gcg
from srmu.attacks.heavy_tuning import heavy_tuning
from srmu.attacks.leak import leak
from srmu.attacks.linear_probe import linear_probe
from srmu.attacks.logit_lens import logit_lens
from srmu.attacks.membership import membership
from srmu.attacks.noise import noise
from srmu.attacks.part_relearning import part_relearning
from srmu.attacks.prompts import prompts
from srmu.attacks.quantisation import quantisation
from srmu.attacks.relearning_steps import relearning_steps
from srmu.attacks.soft_prompt import soft_prompt
from srmu.attacks.unlearning_depth import unlearning_depth
from srmu.attacks.utility import utility
from srmu.evals.subject import Subject

Run = Callable[[Subject, Texts, Exam, Tier, int], AttackResult]
TIERS: tuple[Tier, ...] = ("smoke", "standard", "deep")


class Attack(NamedTuple):
    """An attack with its number in the literature list of docs/attacks.md, and from which tier on
    it runs; `recovers`: its right answers are to the exam, and count for K*."""

    id: str
    run: Run
    tier: Tier
    recovers: bool = True


ATTACKS: dict[str, Attack] = {
    attack.run.__name__: attack
    for attack in (
        Attack("E0", forced_choice, "smoke"),
        Attack("E1", format_shift, "smoke"),
        Attack("E2", extraction, "smoke"),
        Attack("E3", entangled_queries, "smoke"),
        Attack("E4", logit_lens, "smoke"),
        Attack("E5", linear_probe, "standard"),
        Attack("E6", direction_ablation, "smoke"),
        Attack("E7", benign_relearning, "smoke"),
        Attack("E8", part_relearning, "standard"),
        Attack("E9", heavy_tuning, "deep"),
        Attack("E10", quantisation, "smoke"),
        Attack("E11", noise, "standard"),
        Attack("E12", prompts, "standard"),
        Attack("E12", gcg, "deep"),
        Attack("E13", soft_prompt, "deep"),
        Attack("E14", leak, "standard"),
        Attack("E15", membership, "standard"),
        Attack("E16", forget_quality, "standard"),
        Attack("E17", unlearning_depth, "standard"),
        Attack("E18", utility, "smoke", recovers=False),
        Attack("E19", relearning_steps, "standard"),
    )
}
