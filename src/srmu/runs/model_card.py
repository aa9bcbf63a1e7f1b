"""A record as a person reads it: a page, and the model card of an export."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from srmu.engine.weights import EXPORTED
from srmu.runs.effect import REPETITION, explain_repetition
from srmu.runs.prices import describe_prices, describe_search
from srmu.runs.reach import explain_reach

ROWS = 12  # changed tensors that are listed


def render_template(name: str, /, filters: dict[str, Any] | None = None, **values: Any) -> str:
    """A template of this room, filled in."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("srmu.runs"), trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters or {}
    return environment.get_template(name).render(values)


def summarise_record(record: dict[str, Any], rounded: str = "", unstated: Sequence[str] = ()) -> str:
    """The record on one page of Markdown, of a model `rounded` so or not; of a folder it names no path.

    `unstated` are entries of its purpose that the page says are missing.
    """
    base, changed = Path(record["base"]["id"]), [*record["change"]["tensors"].items()][:ROWS]
    source = Path(record["base"].get("gguf", {}).get("file", ""))
    # a folder made of a GGUF file may have any name
    name = source.stem if source.stem and not base.name.endswith(".gguf") else base.name
    named: dict[str, Any] = {"name": name, "local": base.is_absolute(), "exported": EXPORTED}
    named |= {"reach": explain_reach(record["reach"]), "repetition": explain_repetition(record["results"])}
    tried = record["attacks"].get("tried", {})
    named["prices"] = [line for one in tried.values() for line in describe_prices(one.get("price", ()))]
    named["prices"] += describe_search(tried)
    named["unstated"] = [name.replace("_", " ") for name in unstated]
    return render_template("card.md", record=record, changed=changed, rounded=rounded, **named)


def write_model_card(record: dict[str, Any], rounded: str = "") -> str:
    """The `README.md` of an export: the hub's metadata, then the record's page; see `summarise_record`."""
    base = Path(record["base"]["id"])
    results = []
    for name, entry in {} if rounded else record["results"].get("after", {}).items():  # of the model as it is here
        task, _, metric = name.partition("/")
        kind = "text-generation" if task == REPETITION else "multiple-choice"
        results.append(EvalResult(kind, task, task, metric, entry["value"]))
    on_hub: dict[str, Any] = (
        {} if base.is_absolute() else {"base_model": base.as_posix(), "base_model_relation": "finetune"}
    )
    facts = ModelCardData(
        model_name=f"{base.name}-{record['method']}",
        license=record["base"]["licence"],
        tags=["unlearning", record["method"]],
        eval_results=results or None,
        **on_hub,
    )
    return f"---\n{facts.to_yaml().strip()}\n---\n\n{summarise_record(record, rounded)}"
