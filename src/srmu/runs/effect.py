"""What a run did, measured at its end on texts that it holds: numbers, a sentence a topic, and warnings."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from srmu.engine.activation_cache import Activations
from srmu.engine.losses import Mean, average_means, is_counted, token_mean
from srmu.engine.model import EditableModel
from srmu.engine.progress import Watch
from srmu.engine.sites import Site, catch_choices, find_routers
from srmu.engine.stopping import CHECKED_BATCHES, RECENT
from srmu.engine.topic import Topic, move_batch
from srmu.methods.base import Edit, Method, State
from srmu.methods.importance import FLAT, FLAT_WORDS
from srmu.methods.misdirection import KAPPA
from srmu.runs.config import Config

# In norms of an activation and in nats of a token. On testbeds, runs below LEARNED leave most questions answered, and
# runs above SPOILT lose knowledge that they were to keep.
LEARNED = {"forget_shift": 1.0, "forget_nll": 0.5}
SPOILT = {"retain_moved": 0.5, "retain_nll": 0.5}
BROKEN = 20.0  # times SPOILT: activations of ten times their norm
CHANGED = 0.1  # of the weights' norm: runs that change more harm a model in general
MOST = 20.0  # times by which an advice changes a learning rate
FARTHEST = 1000.0  # times by which it lowers the weight of the retain loss: one estimate reaches no further
# The task whose metrics say how much a model repeats itself when it writes on, and by how much they must rise: of
# SmolLM2-135M by 0.18 to 0.70 where RMU and SRMU made it babble, by 0.09 at most where its texts stayed sound.
REPETITION, DEGENERATED = "repetition", 0.15
SPIKE = 1000.0  # times its first value, to which a retain loss must not rise in the first steps
JUMP = 10.0  # times the first loss, likewise


def measure_effect(
    config: Config,
    model: EditableModel,
    topics: Sequence[Topic],
    states: Mapping[str, State],
    steps: Sequence[Mapping[str, Any]],
    watch: Watch,
) -> dict[str, Any]:
    """What a record says of a run's effect; `steps` are the lines of its metrics. Every process must call this."""
    weights = model.measure_change()
    kept, model.activations = model.activations, Activations()  # those that are kept are the steps'
    found: dict[str, Any] = {"weights": keep_finite(weights), "topics": {}, "sentences": [], "warnings": []}
    found["broken"] = False
    with torch.no_grad(), watch("measuring the effect", len(topics)) as tick:
        for topic in topics:
            method, state = config.method.with_options(topic.options), states.get(topic.name, State())
            numbers = method.measure_effect(model, topic, state) | measure_rerouting(model, topic)
            verdict = judge_numbers(method, numbers, weights, config.train.learning_rate, option_place(topic))
            found["broken"] |= is_broken(numbers)
            own = [line for line in steps if line.get("topic") == topic.name]
            found["topics"][topic.name] = {name: keep_finite(value) for name, value in numbers.items()}
            found["sentences"].append(f"{topic.name}: {describe_numbers(numbers, weights)}: {verdict}")
            found["warnings"] += [f"{topic.name}: {text}" for text in list_warnings(method, topic, state, own)]
            tick(topic.name)
    model.activations = kept
    return found


def measure_rerouting(model: EditableModel, topic: Topic) -> dict[str, float]:
    """The share of tokens that go to other experts, from the first trained layer on; empty where there are none."""
    routers = [router for layer in model.layers[model.fixed :] for router in find_routers(layer)]
    shares: dict[str, list[Mean]] = {}
    for role in ("forget", "retain") if routers else ():
        for batch in getattr(topic, role)[:CHECKED_BATCHES]:
            batch, site = move_batch(batch, model.device), Site(len(model.layers) - 1)
            with model.frozen(), catch_choices(routers) as before:
                model.hidden(batch, site, keep=False)
            with catch_choices(routers) as after:
                model.hidden(batch, site)
            mask = is_counted(batch["labels"])
            for one, other in zip(before, after, strict=True):
                if len(one) == mask.numel():  # else it says nothing of single tokens
                    moved = (one != other).any(-1).float().reshape(mask.shape)
                    shares.setdefault(f"{role}_rerouted", []).append(token_mean(moved, mask))
    return {name: average_means(each) for name, each in shares.items()}


def describe_numbers(numbers: Mapping[str, float], weights: float) -> str:
    parts = []
    if "forget_moved" in numbers:
        way, norms, kept = (numbers[name] for name in ("forget_moved", "forget_shift", "retain_moved"))
        parts.append(
            f"forget activations moved {format_percent(way)} of the way to the target ({norms:.2g} times their norm)"
        )
        parts.append(f"retain activations {format_percent(kept)} of their norm")
    for role in ("forget", "retain"):
        if (share := numbers.get(f"{role}_rerouted")) is not None:
            parts.append(f"{format_percent(share)} of {role} tokens go to other experts")
        if (rise := rise_of(numbers, role)) is not None:
            parts.append(f"{role} tokens are {math.exp(min(-rise, 700.0)):.2g} times as likely as before")
    return ", ".join([*parts, f"the weights changed by {format_percent(weights)}"])


def option_place(topic: Topic) -> str:
    """Where a topic's strength and weight are set: a topic's own options win over the method's."""
    return f"topics.{topic.name}" if topic.options else "method"


def judge_numbers(
    method: Method, numbers: Mapping[str, float], weights: float, rate: float | None, place: str = "method"
) -> str:
    """What the numbers mean, and what to type next; `place` holds the method's options."""
    reached, spoilt = (share_limits(numbers, limits) for limits in (LEARNED, SPOILT))
    at_once = isinstance(method, Edit) or bool(method.no_checkpoint)
    alpha: float = getattr(method, "alpha", 0.0)

    def advise(factor: float) -> str:
        if at_once or rate is None:
            return f"see its options: srmu info methods {method.name}"
        if factor > 1 and weights > CHANGED:
            # what moved the weights was the retain loss
            lower = f"try {place}.alpha={write_short(alpha / 10)}; " if alpha else ""
            return f"a higher learning rate would only do harm; {lower}srmu auto looks for other settings"
        return f"try train.learning_rate={rate * factor:.1g}" + ", or srmu auto" * (factor > 1)

    if is_broken(numbers):
        return f"the model is broken; {advise(1 / MOST)}"
    if spoilt and max(spoilt) > 1:
        return f"the retain texts suffered; {advise(1 / min(MOST, 2 * max(spoilt)))}"
    if reached and min(reached) < 1 and not method.selective:
        if not at_once and spoilt and max(spoilt) > max(0.5, min(reached)):
            return "the retain texts suffer before the forget texts do; srmu auto looks for other settings"
        if numbers.get("forget_moved", 0.0) > 0.5:
            return f"little was asked for; try {place}.kappa={KAPPA:g}"
        if lower := find_alpha(alpha, numbers):
            return f"the retain loss holds the forget activations back; try {place}.alpha={write_short(lower)}"
        return f"little was learned; {advise(min(MOST, 2 / max(min(reached), 1e-9)))}"
    return "srmu eval and srmu attack say what is left of the knowledge"


def share_limits(numbers: Mapping[str, float], limits: Mapping[str, float]) -> list[float]:
    """The numbers that there are limits of, as multiples of them."""
    rises = {f"{role}_nll": rise for role in ("forget", "retain") if (rise := rise_of(numbers, role)) is not None}
    known = {**numbers, **rises}
    return [known[name] / limit for name, limit in limits.items() if name in known]


def is_broken(numbers: Mapping[str, float]) -> bool:
    """Whether a model answers nothing any more: numbers that are not finite, or far beyond what spoils it."""
    spoilt = share_limits(numbers, SPOILT)
    return not all(map(math.isfinite, [*share_limits(numbers, LEARNED), *spoilt])) or max(spoilt, default=0.0) > BROKEN


def write_short(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def find_alpha(alpha: float, numbers: Mapping[str, float]) -> float | None:
    """The weight of the retain loss that would let forget activations move, where the present one holds them."""
    moved, shift, kept = (numbers.get(name, 0.0) for name in ("forget_moved", "forget_shift", "retain_moved"))
    aim = 2 * LEARNED["forget_shift"]
    if min(moved, shift, kept) <= 0 or (way := shift / moved) <= aim:
        return None
    # Where what moves is shared, (way - x)^2 + alpha r^2 is least at x = way / (1 + alpha (r / x)^2); the retain
    # loss is then half of what the forget loss fell. A third of that half tells it from a run that is on its way.
    held = alpha * kept**2 > (way**2 - (way - shift) ** 2) / 6
    return max((way / aim - 1) * (shift / kept) ** 2, alpha / FARTHEST) if held else None


def rise_of(numbers: Mapping[str, float], role: str) -> float | None:
    """By how many nats a token of these texts became more costly."""
    after = numbers.get(f"{role}_nll_after")
    return None if after is None else after - numbers[f"{role}_nll_before"]


def keep_finite(value: float) -> float | None:
    """The value for JSON, which has no infinity."""
    return value if math.isfinite(value) else None


def format_percent(share: float) -> str:
    return f"{100 * share:.0f} %" if abs(share) >= 0.1 else f"{100 * share:.2g} %"


def list_warnings(method: Method, topic: Topic, state: State, steps: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What makes a topic's run worth little whatever it reached."""
    if 0 in (getattr(method, "kappa", None), getattr(method, "coeff", None)):
        advice = f"set {option_place(topic)}.kappa={KAPPA:g}"
        yield f"the strength is 0: the target is zero, so forget activations only shrink; {advice}"
    forget = topic.counts.get("forget", {})
    if shared := forget.get("shared"):
        total = forget["documents"] + forget["too_short"]
        yield f"{shared} of {total} forget texts are retain texts, too, and pull both ways; take them out of one set"
    if forget.get("documents") == 1:
        yield "one forget document: its wording may be unlearned rather than what it says; add texts that say the same"
    for numbers in (state.numbers, *state.numbers.values()):  # of several layers: by layer
        map_ = numbers.get("importance") if isinstance(numbers, dict) else None
        if map_ and map_["sd"] < FLAT and getattr(method, "importance", "") != "uniform":
            yield f"the map is {FLAT_WORDS}; try method.importance=difference"
    retain = [abs(line["retain"]) for line in steps[:RECENT] if "retain" in line]
    if retain:
        first = abs(steps[0].get("forget", 0.0)) + retain[0]
        usual = next((value for value in retain if value > 1e-6 * first), math.inf)  # not of rounding
        if max(retain) > min(JUMP * first, max(SPIKE * usual, first)):
            rise = f"the retain loss rose to {max(retain):.3g} in the first {len(retain)} steps"
            yield f"{rise}; lower train.learning_rate"


def explain_repetition(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Whether a model degenerated, from its metrics before and after a run: a sentence for each kind of prompts."""
    sentences = []
    for kind, meaning in {"forget": "", "neutral": ", which is damage: try a weaker setting"}.items():
        before, after = (results.get(when, {}).get(f"{REPETITION}/{kind}") for when in ("before", "after"))
        if before and after and after["value"] - before["value"] > DEGENERATED:
            shares = f"{after['value']:.0%} of its four-token sequences, {before['value']:.0%} before"
            sentences.append(f"after {kind} prompts the model repeats itself: {shares.replace('%', ' %')}{meaning}")
    return sentences
