"""A record as a person reads it: a page, and the model card of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srmu.engine.weights import EXPORTED

ROWS = 12  # changed tensors that are listed


def render_template(name: str, filters: Mapping[str, Any] | None = None, **values: Any) -> str:
    """A template of this room, filled in."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("srmu.runs"), trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters or {}
    return environment.get_template(name).render(values)


def summarise_record(record: Mapping[str, Any]) -> str:
    """The record on one page of Markdown."""
    return render_template(
        "card.md",
        record=record,
        title=f"{base_name(record)}, unlearned with {record['method']}",
        local=is_local(record),
        changed=[*record["change"]["tensors"].items()][:ROWS],
        exported=EXPORTED,
        number=lambda entry: f"{entry['value']:.3f}" if entry else "",
        percent=lambda entry: f"{entry['value']:.1%}" if entry else "",
    )


def write_model_card(record: Mapping[str, Any]) -> str:
    """The `README.md` of an export: the hub's metadata, then the record's page."""
    from huggingface_hub import EvalResult, ModelCardData

    after = record["results"].get("after", {})
    results = [
        EvalResult(
            task_type="multiple-choice",
            dataset_type=name.partition("/")[0],
            dataset_name=name.partition("/")[0],
            metric_type=name.partition("/")[2],
            metric_value=entry["value"],
        )
        for name, entry in after.items()
    ]
    relation: dict[str, Any] = {} if is_local(record) else {"base_model_relation": "finetune"}
    facts = ModelCardData(
        model_name=f"{base_name(record)}-{record['method']}",
        base_model=None if is_local(record) else record["base"]["id"],
        license=record["base"]["licence"],
        tags=["unlearning", record["method"]],
        eval_results=results or None,
        ignore_metadata_errors=True,
        **relation,
    )
    return f"---\n{facts.to_yaml().strip()}\n---\n\n{summarise_record(record)}"


def is_local(record: Mapping[str, Any]) -> bool:
    """Whether the base model was a folder, whose path stays private."""
    return Path(record["base"]["id"]).is_absolute() or Path(record["base"]["id"]).exists()


def base_name(record: Mapping[str, Any]) -> str:
    return str(record["base"]["id"]).replace("\\", "/").rstrip("/").rpartition("/")[2]
