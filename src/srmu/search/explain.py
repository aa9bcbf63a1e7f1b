"""Why an automatic search does what it does, a sentence for each choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from srmu.evals.separability import HIGH, LOW
from srmu.report.format import format_percent
from srmu.search.objective import TextYardstick, Yardstick
from srmu.search.strength import MARGIN, Entry, nearest_entry


def explain_yardstick(yardstick: Yardstick) -> list[str]:
    """By what a search measures, in sentences."""

    def named(parts: Mapping[str, Any]) -> str:
        return " and ".join(
            f"{len(part.halves['val'])} held-out {name.replace('_', ' ')}"
            if isinstance(part, TextYardstick)
            else f"{len(part.halves['val'])} questions of {name}"
            for name, part in parts.items()
        )

    said = [
        f"Forgetting is measured on {named(yardstick.forget)}, utility on "
        f"{named(yardstick.utility)}; as many others are kept back for the final result."
    ]
    if yardstick.kind == "texts":
        said.append(
            "Texts alone say little, as a model that stumbles over these words may still know: "
            "name tasks that ask for what is to go (--tasks) and for what is to stay (--utility)."
        )
    return said


def explain_entanglement(found: Mapping[str, Any]) -> list[str]:
    """What the numbers of `entanglement` mean for a search."""
    shared = found["entanglement"]
    if shared < LOW:
        means = "so little that they cannot protect neighbouring knowledge"
    elif shared > HIGH:
        means = "so much that they protect what lies near, and knowledge further off is at risk"
    else:
        means = "which protects a part of what lies near"
    apart = max(found["separability"]["layers"], key=lambda layer: layer["accuracy"])
    said = [
        f"The retain texts use {shared:.0%} of the forget texts' words, {means}: random token "
        "sequences, which protect what both leave out, are held in place beside them.",
        f"The model tells the two sets apart best at layer {apart['layer']}, in "
        f"{apart['accuracy']:.0%} of tokens where a coin would in 50%.",
    ]
    if given := found.get("contamination", {}).get("retain", {}).get("either"):
        said.append(
            f"{given:.0%} of the questions are given away by retain texts: take those texts out."
        )
    return said


def explain_names(count: int, given: str) -> str:
    """Which names are swapped: not the names themselves, which forget texts tell of."""
    if given:
        return f"The {count} names of the file are swapped: what is said of one alone is scrubbed."
    return (
        f"{count} names were found in the forget texts and are swapped: srmu inspect texts "
        "--what names lists them, and "
        "--names takes a corrected list."
    )


def explain_layer(found: Mapping[str, Any]) -> str:
    """Why this layer."""
    row = next(row for row in found["layers"] if row["layer"] == found["best"])
    others = ", ".join(str(row["layer"]) for row in found["layers"])
    return (
        f"Layer {row['layer']} is steered: of layers {others}, at one strength, it forgets most "
        f"for what it costs ({row['forgetting']:.0%} for {row['utility_loss']:.1%} of utility)."
    )


def format_trial(entry: Entry) -> str:
    """The values of a trial as one types them."""
    return " ".join(f"{key}={value}" for key, value in entry["params"].items())


def explain_trial(budget: float, chosen: Entry, found: Sequence[Entry]) -> str:
    """Why this trial."""
    limit, cost = MARGIN * budget, chosen["values"]["utility_loss"]
    known = [one["values"] for one in found if one["values"]]
    within = sum(values["utility_loss"] <= limit for values in known)
    rule = (
        f"Of {len(known)} runs {within} lose at most {limit:.2%} of utility on the half to choose "
        f"on ({MARGIN:g} of the budget, as the best of many flatters itself); of these"
        if cost <= limit
        else f"No run forgets within {limit:.2%} of utility, {MARGIN:g} of the budget, which would "
        "leave room for chance; of those within the whole budget"
    )
    return (
        f"{rule} this one forgets most, {chosen['values']['forgetting']:.0%} for {cost:.2%}: "
        f"{format_trial(chosen)}."
    )


def explain_none(budget: float, found: Sequence[Entry]) -> str:
    """Why nothing was chosen."""
    closest = nearest_entry(found)
    if closest is None:
        return f"None of {len(found)} trials forgets anything, whatever it costs."
    values = closest["values"]
    return (
        f"No trial forgets within the budget of {budget:.2%} of utility; the nearest forgets "
        f"{values['forgetting']:.0%} for {values['utility_loss']:.2%}."
    )


def explain_result(budget: float, final: Mapping[str, Any], same: bool) -> list[str]:
    """The final result against the budget and the defaults, in sentences."""
    test, usual = final["test"], final["defaults"]
    lost = test["utility_loss"]
    if lost["value"] <= budget:
        kept = "is kept"
    elif lost["low"] <= budget:
        kept = "is missed, by no more than noise"
    else:
        kept = "is missed"
    gain = test["forgetting"]["value"] - usual["forgetting"]["value"]
    against = (
        "these are the defaults: no trial did better"
        if same
        else f"{'more' if gain > 0 else 'no more'} than the defaults, which forget "
        f"{format_percent(usual['forgetting'])}% and lose {format_percent(usual['utility_loss'])}%"
    )
    return [
        f"On the half kept back it forgets {format_percent(test['forgetting'])}% of what the model "
        f"knew, {against}.",
        f"There it loses {format_percent(lost)}% of utility: the budget of {budget:.2%} {kept}.",
    ]
