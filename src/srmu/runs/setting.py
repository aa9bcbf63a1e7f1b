"""What a run did, to tell methods, strengths of one method, repetitions and copies apart."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from srmu.runs.config import UNDECIDING, Config
from srmu.runs.run import Run

TEXTS = {"template", "where"}  # options of texts whose values are no paths


def run_setting(config: Config) -> tuple[tuple[str, Any], ...]:
    """What a run did, whichever its seed and testbed: keys and values in a row, paths by name."""

    def leaves(value: Any, key: str) -> list[tuple[str, Any]]:
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            return [leaf for k, v in items for leaf in leaves(v, f"{key}.{k}")]
        is_path = isinstance(value, str) and not TEXTS & {*key.split(".")}
        return [(key.lstrip("."), Path(value).name if is_path else value)]

    decided = {key: value for key, value in config.to_dict().items() if key not in (*UNDECIDING, "seed", "device")}
    return tuple(leaves(decided, ""))


def setting_words(config: Config) -> dict[str, Any]:
    """The part of a setting that makes another method of it, not another strength: no numbers."""
    # None stands where a number may
    return {key: value for key, value in run_setting(config) if isinstance(value, str | bool)}


def method_label(kind: Mapping[str, Any], kinds: Iterable[Mapping[str, Any]]) -> str:
    """A method's name, and what tells it from others of that name."""
    others = [other for other in kinds if other["method.name"] == kind["method.name"]]
    apart = [
        f"{key.rpartition('.')[2]}={value}" if isinstance(value, bool) else value
        for key, value in kind.items()
        if any(other.get(key) != value for other in others)
        and not key.endswith((".split", ".column"))  # of texts whose path says more
    ]
    return kind["method.name"] + (f" ({', '.join(dict.fromkeys(apart))})" if apart else "")


def drop_copies(runs: Iterable[Run]) -> list[Run]:
    """The runs but for those that repeat an earlier one: the same settings and seed, the same model and texts."""
    first: dict[str, Run] = {}
    for run in runs:
        base = {name: file["sha256"] for name, file in run.record["base"]["files"].items()}
        texts = [facts["digest"] for sets in run.record["data"].values() for facts in sets.values()]
        first.setdefault(repr((run_setting(run.config), run.config.seed, base, texts)), run)
    return [*first.values()]
