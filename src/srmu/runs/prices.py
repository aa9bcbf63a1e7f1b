"""What it takes to bring knowledge back, in words: of what attacks found, as a record and a report keep it."""

from collections.abc import Mapping, Sequence
from typing import Any

GPU_SPEED = 0.4 * 989e12  # FLOPs a second: an H100 at 40 % of its bfloat16 peak
TUNED, USUAL = "tuned_relearning", {"trials": 24, "steps": 100}  # the attacker that has a price, and how much it tries


def describe_search(attacks: Mapping[str, Any]) -> list[str]:
    """How much less than by default the tuned attacker tried, if so: what it did not find says little then."""
    budget = attacks.get(TUNED, {}).get("budget", {})
    if all(budget.get(key, usual) >= usual for key, usual in USUAL.items()):
        return []
    tried = f"{budget['trials']} trainings of at most {budget['steps']} steps"
    return [f"{TUNED} tried {tried}, where {USUAL['trials']} of {USUAL['steps']} are usual: it may find more"]


def describe_prices(prices: Sequence[Mapping[str, Any]]) -> list[str]:
    """What an attacker pays for shares of the original's knowledge, in words."""
    lines = []
    for price in prices:
        share, steps = f"{price['share']:.0%} of the knowledge", price["steps"]
        if steps is None and not price["tried"]:
            lines.append(f"{share} did not come back: no training that was tried did better than none")
        elif steps is None:
            lines.append(f"{share} did not come back in the {price['tried']} steps of the best training found")
        elif not steps:
            lines.append(f"{share} is there without any training")
        else:
            ends = [
                f"more than {price['tried']}" if price[end] is None else f"{price[end]:.0f}" for end in ("low", "high")
            ]
            count = f"{max(steps, 1):.0f} step{'s' * (steps > 1.5)}"
            minutes = price["flop"] / GPU_SPEED / 60
            lines.append(
                f"{share} is back after {count} (95 % interval {' to '.join(ends)}): "
                f"{price['tokens']:,.0f} tokens, {price['flop']:.1e} FLOPs, {minutes:.2g} GPU-minutes"
            )
    return lines
