"""Descriptions of all settings, read from the configuration's models: type, default, allowed values and meaning."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raypp.config.schema import REGISTRIES, Config
from raypp.utils.registry import MethodConfig

REQUIRED = "required"
TYPE_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", dict: "mapping"}
BOUNDS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


@dataclass(frozen=True)
class Setting:
    """One setting of the configuration.

    Attributes:
        key: dotted key, such as ``train.optimizer.lr``.
        method: the method that has this setting, such as ``protection: learned``; empty where all have it.
        type: type of its values in words.
        default: its default as plain data, or ``REQUIRED``.
        allowed: allowed values or bounds; empty without a restriction.
        description: its meaning.
    """

    key: str
    method: str
    type: str
    default: Any
    allowed: str
    description: str


def describe_settings(model: type[BaseModel] = Config, prefix: str = "", method: str = "") -> Iterator[Setting]:
    """Describe every setting of a model in the order of its fields, including the options of all methods."""
    for name, field in model.model_fields.items():
        key = prefix + name
        if name == "name" and issubclass(model, MethodConfig):
            continue
        nested = [choice for choice in _choices(field.annotation) if _is_model(choice)]
        if MethodConfig in nested:
            yield from _describe_methods(name, key, field, method)
        elif nested:
            yield from _describe_sections(nested, key, field, method)
        else:
            yield _describe(key, field, method)


def setting_keys() -> frozenset[str]:
    """Dotted keys of all settings of a run."""
    return frozenset(setting.key for setting in describe_settings())


def _describe_methods(name: str, key: str, field: FieldInfo, method: str) -> Iterator[Setting]:
    registry = REGISTRIES[name]
    yield Setting(key, method, "method", _default(field), ", ".join(registry), _text(field) or f"The {registry.kind}.")
    for choice in registry:
        yield from describe_settings(registry.options(choice), f"{key}.", f"{name}: {choice}")


def _describe_sections(models: list[Any], key: str, field: FieldInfo, method: str) -> Iterator[Setting]:
    """Describe a nested section, or one of several that its ``name`` selects."""
    is_optional = type(None) in _choices(field.annotation)
    if len(models) > 1 or is_optional:
        names = [str(model.model_fields["name"].default) for model in models if "name" in model.model_fields]
        allowed = ", ".join([*names, *(["null"] if is_optional else [])])
        yield Setting(key, method, "section", _default(field), allowed, _text(field))
    for model in models:
        name = model.model_fields["name"].default if "name" in model.model_fields and len(models) > 1 else None
        for setting in describe_settings(model, f"{key}.", f"{key.rpartition('.')[2]}: {name}" if name else method):
            if setting.key != f"{key}.name" or name is None:
                yield setting


def _describe(key: str, field: FieldInfo, method: str) -> Setting:
    return Setting(key, method, _type(field.annotation), _default(field), _allowed(field), _text(field))


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a type; ``Annotated`` and unions are resolved."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _choices(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(choice for argument in get_args(annotation) for choice in _choices(argument))
    return (annotation,)


def _is_model(choice: Any) -> bool:
    return isinstance(choice, type) and issubclass(choice, BaseModel)


def _type(annotation: Any) -> str:
    words = []
    for choice in _choices(annotation):
        origin = get_origin(choice)
        if choice is type(None):
            words.append("null")
        elif origin is Literal:
            words.append("choice")
        elif origin in (tuple, list):
            words.append(f"list of {_type(get_args(choice)[0])}")
        elif origin is dict:
            words.append("mapping")
        else:
            words.append(TYPE_NAMES.get(choice, "text"))
    return " or ".join(dict.fromkeys(words))


def _allowed(field: FieldInfo) -> str:
    values = [str(value) for choice in _choices(field.annotation) if get_origin(choice) is Literal
              for value in get_args(choice)]  # fmt: skip
    bounds = [
        format_bound(name, getattr(constraint, name))
        for constraint in field.metadata
        for name in BOUNDS
        if getattr(constraint, name, None) is not None
    ]
    return ", ".join(values or bounds)


def format_bound(name: str, value: float) -> str:
    """Format a bound, such as ``ge`` and 1, in words: at least 1."""
    return f"{BOUNDS[name]} {int(value) if value == int(value) else value:,}"


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return REQUIRED
    default = field.get_default(call_default_factory=True)
    return default.model_dump(mode="json") if isinstance(default, BaseModel) else default


def _text(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())
