"""Why an automatic search does what it does: a sentence for each choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from srmu.evals.separability import HIGH, LOW
from srmu.report.format import format_percent
from srmu.search.objective import MARGIN, Entry, TextYardstick, Yardstick, cheapest_entry


def explain_yardstick(yardstick: Yardstick) -> list[str]:
    """What a search measures by."""

    def list_parts(parts: Mapping[str, Any]) -> str:
        return " and ".join(
            f"{len(part.halves['val'])} held-out {name.replace('_', ' ')}"
            if isinstance(part, TextYardstick)
            else f"{len(part.halves['val'])} questions of {name}"
            for name, part in parts.items()
        )

    sentences = [
        f"Forgetting is measured on {list_parts(yardstick.forget)}, utility on "
        f"{list_parts(yardstick.utility)}; as many others are kept back for the final result."
    ]
    if yardstick.kind == "texts":
        sentences.append(
            "Texts alone say little, as a model that stumbles over these words may still know: "
            "name tasks that ask for what is to go (--tasks) and for what is to stay (--utility)."
        )
    return sentences


def explain_entanglement(numbers: Mapping[str, Any]) -> list[str]:
    """What the numbers of `measure_entanglement` mean for a search."""
    shared = numbers["entanglement"]
    if shared < LOW:
        meaning = "so little that they cannot protect neighbouring knowledge"
    elif shared > HIGH:
        meaning = "so much that they protect what lies near, and knowledge further off is at risk"
    else:
        meaning = "which protects a part of what lies near"
    best = max(numbers["separability"]["layers"], key=lambda layer: layer["accuracy"])
    sentences = [
        f"The retain texts use {shared:.0%} of the forget texts' words, {meaning}: random token "
        "sequences, which protect what both leave out, are held in place beside them.",
        f"The model tells the two sets apart best at layer {best['layer']}, in "
        f"{best['accuracy']:.0%} of tokens where a coin would in 50%.",
    ]
    if share := numbers.get("contamination", {}).get("retain", {}).get("either"):
        sentences.append(f"{share:.0%} of the questions are given away by retain texts: take those texts out.")
    return sentences


def explain_names(count: int, file: str) -> str:
    """Which names are swapped; not the names themselves, as forget texts tell of them."""
    if file:
        return f"The {count} names of the file are swapped: what is said of one alone is scrubbed."
    return (
        f"{count} names were found in the forget texts and are swapped: srmu inspect texts "
        "--what names lists them, and "
        "--names takes a corrected list."
    )


def explain_layer(scan: Mapping[str, Any]) -> str:
    """Why this layer."""
    best = next(row for row in scan["layers"] if row["layer"] == scan["best"])
    layers = ", ".join(str(row["layer"]) for row in scan["layers"])
    return (
        f"Layer {best['layer']} is steered: of layers {layers}, at one strength, it forgets most "
        f"for what it costs ({best['forgetting']:.0%} for {best['utility_loss']:.1%} of utility)."
    )


def explain_trial(budget: float, chosen: Entry, trials: Sequence[Entry]) -> str:
    """Why this trial, with its values as one types them."""
    limit, cost = MARGIN * budget, chosen["values"]["utility_loss"]
    measured = [trial["values"] for trial in trials if trial["values"]]
    within = sum(values["utility_loss"] <= limit for values in measured)
    rule = (
        f"Of {len(measured)} runs {within} lose at most {limit:.2%} of utility on the half to "
        f"choose on ({MARGIN:g} of the budget, as the best of many flatters itself); of these"
        if cost <= limit
        else f"No run forgets within {limit:.2%} of utility, {MARGIN:g} of the budget, which would "
        "leave room for chance; of those within the whole budget"
    )
    return (
        f"{rule} this one forgets most, {chosen['values']['forgetting']:.0%} for {cost:.2%}: "
        f"{' '.join(f'{key}={value}' for key, value in chosen['params'].items())}."
    )


def explain_none(budget: float, trials: Sequence[Entry]) -> str:
    """Why nothing was chosen."""
    cheapest = cheapest_entry(trials)
    if cheapest is None:
        return f"None of {len(trials)} trials forgets anything, whatever it costs."
    values = cheapest["values"]
    return (
        f"No trial forgets within the budget of {budget:.2%} of utility; the nearest forgets "
        f"{values['forgetting']:.0%} for {values['utility_loss']:.2%}."
    )


def explain_result(budget: float, final: Mapping[str, Any], is_default: bool) -> list[str]:
    """The final result beside the budget and the defaults."""
    test, usual = final["test"], final["defaults"]
    lost = test["utility_loss"]
    if lost["value"] <= budget:
        verdict = "is kept"
    elif lost["low"] <= budget:
        verdict = "is missed, by no more than noise"
    else:
        verdict = "is missed"
    gain = test["forgetting"]["value"] - usual["forgetting"]["value"]
    against = (
        "these are the defaults: no trial did better"
        if is_default
        else f"{'more' if gain > 0 else 'no more'} than the defaults, which forget "
        f"{format_percent(usual['forgetting'])}% and lose {format_percent(usual['utility_loss'])}%"
    )
    return [
        f"On the half kept back it forgets {format_percent(test['forgetting'])}% of what the model knew, {against}.",
        f"There it loses {format_percent(lost)}% of utility: the budget of {budget:.2%} {verdict}.",
    ]
