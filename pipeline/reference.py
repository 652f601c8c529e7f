"""The reference of all keys, made from the schema: python -m pipeline.reference > configs/REFERENCE.md"""

import json
from typing import Any

from model.objective import RECIPES
from pipeline.config import Config
from pipeline.keys import NUMERICS, SCIENCE

COMMAND = "python -m pipeline.reference > configs/REFERENCE.md"

_HEAD = f"""# Every key of a config

Made from the schema by `{COMMAND}`; do not edit. How a file is read
stands in [README.md](README.md).

The sections `data`, `model` (`model: {{}}` will do), `train` and `optimizer` must be there; the others may be left out.

The last column says what a change does to a run that exists already:

- **science** of a stage: the result changes. Under a name that has outputs of that stage it is refused, and the
  message names the ways on.
- **numerics**: rounding and random draws change. It is recorded and announced.
- **execution**: weights and scores stay.

Files and folders that are science count by their content; where they lie does not matter.

A default of "by size" follows from `model.size`, "by recipe" from `recipe`; "required" has none. A key of
`evaluate` that is null follows from the task's file, else from the model's size. `data.corpora[].KEY` is a key of each
element of the list.
"""
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_BY_RECIPE = {f"objective.{name}" for name in RECIPES["fixed"]}
_BY_CONTENT = ("data.corpora[].path", "tokenizer.path", "train.initial_", "evaluate.checkpoint")


def make_reference() -> str:
    """The page as Markdown: a table for each section, one row for each key."""
    schema = Config.model_json_schema()
    top = [_row(name, about, {}) for name, about in schema["properties"].items() if not _section(about, schema)]
    parts = [_HEAD, _table("One run", "Keys without a section.", top)]
    for name, about in schema["properties"].items():
        if section := _section(about, schema):
            parts.append(_table(name, _one_line(section["description"]), _rows(f"{name}.", section, schema)))
    return "\n".join(parts)


def kind_of(key: str) -> str:
    """What a change of the key does, in the words of ``pipeline.keys``."""
    if key == "data.corpora[].weight":  # belongs to the stage that mixes the corpora
        return "science of pretrain; of tokenize where several corpora train a tokenizer"
    if key in NUMERICS:
        return "numerics"
    listed = key.partition("[]")[0]
    stage = next((stage for stage, keys in SCIENCE.items() if listed in keys), None)
    if stage is None:
        return "execution"
    return f"science of {stage}{', by content' if key.startswith(_BY_CONTENT) else ''}"


def _section(about: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any] | None:
    return schema["$defs"].get(str(about.get("$ref", "")).rpartition("/")[2])


def _table(title: str, about: str, rows: list[str]) -> str:
    head = "| key | values | default | meaning | a change |\n|---|---|---|---|---|\n"
    return f"## {title}\n\n{about}\n\n{head}" + "\n".join(rows) + "\n"


def _rows(prefix: str, section: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    rows = []
    for name, about in section["properties"].items():
        rows.append(_row(prefix + name, about, section))
        if element := _section(about.get("items", {}), schema):
            rows += _rows(f"{prefix}{name}[].", element, schema)
    return rows


def _row(key: str, about: dict[str, Any], section: dict[str, Any]) -> str:
    meaning = _one_line(about.get("description", ""))
    return f"| `{key}` | {_values(about)} | {_default(key, about, section)} | {meaning} | {kind_of(key)} |"


def _default(key: str, about: dict[str, Any], section: dict[str, Any]) -> str:
    if key in _BY_RECIPE:
        return "by recipe"
    if key.rpartition(".")[2] in section.get("required", []):
        return "by size" if key.startswith("model.") else "required"
    return f"`{json.dumps(about['default'])}`"


def _values(about: dict[str, Any]) -> str:
    choices = about.get("anyOf") or about.get("oneOf") or [about]
    return " or ".join(dict.fromkeys(_value(choice) for choice in choices))


def _value(about: dict[str, Any]) -> str:
    if "enum" in about:
        return ", ".join(f"`{choice}`" for choice in about["enum"])
    if "const" in about:
        return f"`{about['const']}`"
    kind = about.get("type", "mappings")
    if kind == "array":
        inner = about.get("prefixItems") or [about.get("items", {})]
        count = f"{len(inner)} of " if "prefixItems" in about else "list of "
        return count + _values(inner[0])
    name = {"number": "number", "string": about.get("format", "text")}.get(kind, kind)
    bounds = [f"{sign} {about[bound]:,}" for bound, sign in _BOUNDS.items() if bound in about]
    return " ".join([name, ", ".join(bounds)]).strip()


def _one_line(text: str) -> str:
    """The first paragraph as one cell of a table."""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`").replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(make_reference(), end="")
