"""The attacks: an explicit table, `ATTACKS`, from name to class."""

from srmu.attacks import learned_prompts, measures, perturbations, questions, relearning, residual, tuned_relearning
from srmu.attacks.base import Attack, Tier

TIERS: tuple[Tier, ...] = ("smoke", "standard", "deep")

ATTACKS: dict[str, type[Attack]] = {
    cls.name: cls
    for cls in (
        questions.ForcedChoice,
        questions.FormatShift,
        questions.Extraction,
        questions.EntangledQueries,
        residual.LogitLens,
        residual.LinearProbe,
        residual.DirectionAblation,
        relearning.BenignRelearning,
        relearning.PartRelearning,
        relearning.HeavyTuning,
        perturbations.Quantisation,
        perturbations.Noise,
        questions.Prompts,
        learned_prompts.GCG,
        learned_prompts.SoftPrompt,
        learned_prompts.Latent,
        questions.Leak,
        measures.Membership,
        measures.ForgetQuality,
        measures.Memorisation,
        residual.UnlearningDepth,
        measures.Utility,
        relearning.RelearningSteps,
        tuned_relearning.TunedRelearning,
    )
}
