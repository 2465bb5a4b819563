"""Recipes: TOML and command-line overrides to a ``RunConfig``, and back to TOML.

Precedence: the schema's defaults < the recipe < the overrides. Recipes are whole files; none
inherits from another.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from phi1_megatron.config.schema import RunConfig
from phi1_megatron.errors import RecipeError


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe and lay ``section.field=value`` overrides over it.

    Raises:
        RecipeError: the file is missing or not TOML, a key is unknown, a value has the wrong type
            or is impossible; the message names the dotted path and the nearest known name.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"there is no recipe {path}; examples/recipes/ holds ready ones{_nearby(path)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"the recipe {path} is not valid TOML: {error}") from None
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, source=str(path))


def parse_config(tree: Mapping[str, Any], source: str) -> RunConfig:
    """Validate a tree of sections; ``source`` is what an error calls it."""
    try:
        return RunConfig.model_validate(dict(tree))
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    except ValidationError as error:
        sentences = [_sentence(detail, source) for detail in error.errors(include_url=False)]
        raise RecipeError("\n".join(sentences)) from None


def to_toml(config: RunConfig) -> str:
    """The whole configuration as TOML that ``load_recipe`` reads back to an equal one."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or len(keys) != 2 or not all(keys):
        raise RecipeError(
            f"the override {override!r} is not of the form section.field=value, "
            "for example training.train_steps=100"
        )
    section, field = keys
    sections = tree.setdefault(section, {})
    if not isinstance(sections, dict):
        raise RecipeError(f"the override {override!r} sets a field of {section!r}, not a section")
    value = _parse_value(text.strip())
    # TOML has no word for "not set"; some fields have a choice called none.
    sections[field] = None if value == "none" and _may_be_unset(section, field) else value


def _may_be_unset(section: str, field: str) -> bool:
    """Does the type of this field allow None?"""
    known = RunConfig.model_fields.get(section)
    fields = getattr(known.annotation, "model_fields", {}) if known else {}
    return field in fields and type(None) in get_args(fields[field].annotation)


def _parse_value(text: str) -> Any:
    """A TOML value; bare words are strings, so that ``precision=bf16`` needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _sentence(detail: Any, source: str) -> str:
    """One readable sentence for one of pydantic's errors."""
    location = [part for part in detail["loc"] if not isinstance(part, int)]
    dotted = ".".join(str(part) for part in location)
    kind = detail["type"]
    if kind == "extra_forbidden":
        known = _known_names(location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        elsewhere = _sections_with(str(location[-1]))
        if close:
            hint = f"did you mean {'.'.join([*map(str, location[:-1]), close[0]])}?"
        elif elsewhere:
            hint = f"did you mean {elsewhere[0]}?"
        else:
            hint = f"known here: {', '.join(known)}"
        return f"{source}: there is no {dotted}; {hint}"
    if kind == "missing":
        return f"{source}: {dotted} is missing, and it has no default"
    message = detail["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{source}: {dotted}: {message}" if dotted else f"{source}: {message}"
    message = message[0].lower() + message[1:]
    return f"{source}: {dotted} = {detail['input']!r}: {message}"


def _known_names(location: list[Any]) -> list[str]:
    """The names a section (or the top) has."""
    model: type[BaseModel] = RunConfig
    for part in location:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ["prefix", "weight"] if "blend" in str(part) else []
        model = annotation
    return list(model.model_fields)


def _sections_with(name: str) -> list[str]:
    """Dotted paths of the sections that do have a field of this name, or a close one."""
    paths = {
        field: f"{section}.{field}"
        for section in RunConfig.model_fields
        for field in _known_names([section])
    }
    return [paths[match] for match in difflib.get_close_matches(name, list(paths), n=1)]


def _nearby(path: Path) -> str:
    """A hint where the folder holds a recipe of a similar name."""
    names = [entry.name for entry in path.parent.glob("*.toml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.with_name(close[0])}?" if close else ""
