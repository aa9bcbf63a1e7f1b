"""The attacks: an explicit table, `ATTACKS`, from name to class."""

from srmu.attacks.base import Attack, Tier
from srmu.attacks.learned_prompts import GCG, SoftPrompt
from srmu.attacks.perturbations import Noise, Quantisation
from srmu.attacks.privacy import ForgetQuality, Membership
from srmu.attacks.questions import EntangledQueries, Extraction, ForcedChoice, FormatShift, Leak, Prompts
from srmu.attacks.relearning import BenignRelearning, HeavyTuning, PartRelearning, RelearningSteps
from srmu.attacks.residual import DirectionAblation, LinearProbe, LogitLens, UnlearningDepth
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
