"""The attacks: an explicit table, `ATTACKS`, from name to class."""

from srmu.attacks.base import Attack, Tier
from srmu.attacks.benign_relearning import BenignRelearning
from srmu.attacks.direction_ablation import DirectionAblation
from srmu.attacks.entangled_queries import EntangledQueries
from srmu.attacks.extraction import Extraction
from srmu.attacks.forced_choice import ForcedChoice
from srmu.attacks.forget_quality import ForgetQuality
from srmu.attacks.format_shift import FormatShift
from srmu.attacks.gcg import GCG
from srmu.attacks.heavy_tuning import HeavyTuning
from srmu.attacks.leak import Leak
from srmu.attacks.linear_probe import LinearProbe
from srmu.attacks.logit_lens import LogitLens
from srmu.attacks.membership import Membership
from srmu.attacks.noise import Noise
from srmu.attacks.part_relearning import PartRelearning
from srmu.attacks.prompts import Prompts
from srmu.attacks.quantisation import Quantisation
from srmu.attacks.relearning_steps import RelearningSteps
from srmu.attacks.soft_prompt import SoftPrompt
from srmu.attacks.unlearning_depth import UnlearningDepth
from srmu.attacks.utility import Utility

TIERS: tuple[Tier, ...] = ("smoke", "standard", "deep")

ATTACKS: dict[str, type[Attack]] = {
    cls.name: cls
    for cls in (
        ForcedChoice,
        FormatShift,
        Extraction,
        EntangledQueries,
        LogitLens,
        LinearProbe,
        DirectionAblation,
        BenignRelearning,
        PartRelearning,
        HeavyTuning,
        Quantisation,
        Noise,
        Prompts,
        GCG,
        SoftPrompt,
        Leak,
        Membership,
        ForgetQuality,
        UnlearningDepth,
        Utility,
        RelearningSteps,
    )
}
