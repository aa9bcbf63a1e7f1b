"""For the docs: the fields of a class, each with its default and its comment, as a table below its docstring."""

from typing import Any

import griffe


class FieldComments(griffe.Extension):
    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        fields = [one for one in cls.attributes.values() if one.name[0] != "_" and one.annotation and one.lineno]
        told = {field: describe_field(field) for field in fields if "property" not in field.labels}
        if cls.docstring and any(told.values()):
            rows = [f"    {field.name} ({name_type(field)}): {text or '-'}" for field, text in told.items()]
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(rows)


def describe_field(field: griffe.Attribute) -> str:
    """Its default and its comment, beside it or in the line above."""
    comment = field.source.partition("  # ")[2]
    if not comment:
        above = field.lines_collection[field.filepath][field.lineno - 2].strip()
        comment = above.removeprefix("# ") if above.startswith("# ") else ""
    default = "" if field.value is None or "field(" in str(field.value) else f"default `{field.value}`"
    return "; ".join(filter(None, (default, comment)))


def name_type(field: griffe.Attribute) -> str:
    """Its type, without what checks it."""
    kind = str(field.annotation)
    if not kind.startswith("Annotated["):
        return kind
    return kind.removeprefix("Annotated[").partition(", ")[0].removeprefix("InstanceOf[").removesuffix("]")
