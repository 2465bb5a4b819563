"""Print docs/configuration.md from the fields of phi1_megatron/config/schema.py.

python tools/docs/configuration.py > docs/configuration.md
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from phi1_megatron.config.schema import BlendPart, RunConfig

HEAD = """\
# Configuration

<!-- Made by `python tools/docs/configuration.py > docs/configuration.md`; edit the docstrings in
     phi1_megatron/config/schema.py instead. A test compares the two. -->

A recipe is a TOML file with these sections. A key that is not here, or a value of another type, is
refused with its dotted path and the nearest known name. Defaults come first, then the recipe, then
`section.field=value` on the command line; `none` there unsets a field that has no value by default.
Lists and tables are TOML values: `'data.blend=["data/mine_text_document"]'`.

In the texts, `P` is the phi-1 paper (Gunasekar et al., "Textbooks Are All You Need", arXiv
2306.11644), `HF` is transformers' `models/phi`, and `CFG` is the training configurations of a later
Microsoft SDK, seen in a third-party copy.
"""


def document() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        parts.append(f"## [{name}]\n\n{_prose(section)}\n\n" + "\n".join(_table(section)) + "\n")
        if name == "data":
            parts.append(
                f"### A part of data.blend\n\n{_prose(BlendPart)}\n\n"
                + "\n".join(_table(BlendPart))
                + "\n"
            )
    return "\n".join(parts)


def _prose(section: type[BaseModel]) -> str:
    return _markdown(section.__doc__ or "")


def _table(section: type[BaseModel]) -> Iterator[str]:
    yield "| field | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        kind = _type(field.annotation) + _limits(field)
        yield f"| `{name}` | {kind} | {_default(field)} | {_markdown(field.description or '')} |"


def _markdown(text: str) -> str:
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


def _type(annotation: Any) -> str:
    """A type in a TOML writer's words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f'`"{choice}"`' for choice in arguments)
    if origin in (types.UnionType,):
        return " or ".join(_type(part) for part in arguments if part is not type(None))
    if origin is list:
        return f"list of {_type(arguments[0])}s"
    words = {int: "integer", float: "float", bool: "boolean", str: "string"}
    return words.get(annotation, "part" if annotation is BlendPart else str(annotation))


def _limits(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in signs.items()
        if hasattr(limit, name)
    ]
    return " " + ", ".join(found) if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return "none"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f'`"{field.default}"`' if isinstance(field.default, str) else f"`{field.default}`"


if __name__ == "__main__":
    sys.stdout.write(document())
