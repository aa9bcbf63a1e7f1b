"""What a run did, to tell methods, strengths of one method and repetitions apart."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from srmu.runs.config import UNDECIDING, Config

TEXTS = {"template", "where"}  # options of texts whose values are no paths


def run_setting(config: Config) -> tuple[tuple[str, Any], ...]:
    """What a run did, whichever its seed and testbed: keys and values in a row, paths by name."""
    tree = config.to_dict()
    for key in (*UNDECIDING, "seed", "device"):
        tree.pop(key)

    def leaves(value: Any, key: str) -> list[tuple[str, Any]]:
        if isinstance(value, dict):
            return [leaf for k, v in value.items() for leaf in leaves(v, f"{key}.{k}")]
        if isinstance(value, list):
            return [leaf for i, v in enumerate(value) for leaf in leaves(v, f"{key}.{i}")]
        is_path = isinstance(value, str) and not TEXTS & {*key.split(".")}
        return [(key.lstrip("."), Path(value).name if is_path else value)]

    return tuple(leaves(tree, ""))


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
