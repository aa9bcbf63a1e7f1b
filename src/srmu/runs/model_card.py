"""A record as a person reads it: a page, and the model card of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from srmu.engine.weights import EXPORTED

ROWS = 12  # changed tensors that are listed


def render_template(name: str, filters: Mapping[str, Any] | None = None, /, **values: Any) -> str:
    """A template of this room, filled in."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("srmu.runs"), trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters or {}
    return environment.get_template(name).render(values)


def summarise_record(record: Mapping[str, Any]) -> str:
    """The record on one page of Markdown."""
    name = record["base"]["id"].replace("\\", "/").rstrip("/").rpartition("/")[2]
    changed = [*record["change"]["tensors"].items()][:ROWS]
    return render_template(
        "card.md", record=record, name=name, local=is_local(record), changed=changed, exported=EXPORTED
    )


def write_model_card(record: Mapping[str, Any]) -> str:
    """The `README.md` of an export: the hub's metadata, then the record's page."""
    facts: dict[str, Any] = {"tags": ["unlearning", record["method"]]}
    if licence := record["base"]["licence"]:
        facts["license"] = licence
    if not is_local(record):
        facts |= {"base_model": record["base"]["id"], "base_model_relation": "finetune"}
    return f"---\n{yaml.safe_dump(facts)}---\n\n{summarise_record(record)}"


def is_local(record: Mapping[str, Any]) -> bool:
    """Whether the base model was a folder, whose path stays private."""
    return Path(record["base"]["id"]).is_absolute() or Path(record["base"]["id"]).exists()
