"""Validation: pydantic's errors as one sentence with the field, its value and the allowed values."""

from __future__ import annotations

import re
from functools import reduce
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from raypp.config.describe import format_bound
from raypp.config.schema import REGISTRIES, Config, ConfigModel, Data, MultiStep, OptimizationConfig
from raypp.utils.errors import ConfigError
from raypp.utils.registry import MethodConfig, suggest

EXPECTED = {
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "int_type": "expected a whole number",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "tuple_type": "expected a list, such as '[32, 32]'",
    "string_type": "expected text",
    "dict_type": "expected a section of settings",
    "model_type": "expected a section of settings",
}
"""Messages for pydantic's types of errors."""
OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
"""Pydantic's types of errors with a bound as their only context."""


def validate(tree: dict[str, Any]) -> Config:
    """Validate a merged tree; raises ConfigError for the first error."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(format_validation_error(error, tree)) from None


class _DataConfig(ConfigModel):
    data: Data


def validate_data(section: dict[str, Any]) -> Data:
    """Validate a ``data`` section alone; raises ConfigError as :func:`validate` does."""
    tree = {"data": section}
    try:
        return _DataConfig.model_validate(tree).data
    except ValidationError as error:
        raise ConfigError(format_validation_error(error, tree, _DataConfig)) from None


def check_milestones(train: OptimizationConfig, section: str) -> None:
    """Raise ConfigError for milestones after the end of training; the message names ``section``, the key of ``train``.

    Only for configurations that users write: stored ones of earlier versions may have such milestones.
    """
    milestones = train.schedule.milestones if isinstance(train.schedule, MultiStep) else ()
    if any(milestone >= train.epochs for milestone in milestones):
        raise ConfigError(
            f"{section}.schedule.milestones is {list(milestones)}, but training ends after {section}.epochs "
            f"{train.epochs}; allowed are milestones less than {train.epochs}"
        )


def format_validation_error(error: ValidationError, tree: dict[str, Any], root: type[BaseModel] = Config) -> str:
    """Format the first error of ``tree``, validated with ``root``, as one sentence.

    It has the key as the user wrote it, then the allowed bound or pydantic's message.
    """
    # Report unknown keys first; they usually cause the other errors.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    loc = [str(part) for part in first["loc"]]
    # pydantic adds a discriminated union's tag to the path.
    if loc[:2] == ["train", "schedule"] and len(loc) > 2:
        del loc[2]
    key = ".".join(loc)
    if first["type"] == "extra_forbidden":
        siblings = _allowed_keys(loc[:-1], tree, root)
        allowed = ", ".join(siblings) + _methods_with_key(loc, tree)
        return f"unknown key {key!r}{suggest(loc[-1], siblings)}; allowed there: {allowed}"
    if first["type"] == "missing":
        return f"{key} is missing; it has no default"
    reason = EXPECTED.get(first["type"], first["msg"].removeprefix("Value error, "))
    if first["type"] == "value_error":
        return f"{key}: {reason}" if key else reason
    value = first["input"]
    shown = value if isinstance(value, str) and re.fullmatch(r"[-+.\d][-+.\deE]*", value) else repr(value)
    if first["type"] in OUT_OF_RANGE:
        return f"{key} is {shown}; allowed is {format_bound(*first['ctx'].popitem())}"
    return f"{key} is {shown}: {reason[0].lower()}{reason[1:]}"


def _methods_with_key(loc: list[str], tree: dict[str, Any]) -> str:
    """Name the other methods that have the unknown key at ``loc``; an empty string if none has it."""
    *section, key = loc
    registry = REGISTRIES.get(section[-1]) if section else None
    methods = [name for name in registry or () if registry and key in registry.options(name).model_fields]
    if not methods:
        return ""
    node = reduce(_child, section, tree)
    name = node.get("name") if isinstance(node, dict) else node
    return f"; {'.'.join(section)} is {name!r}, and only {' or '.join(map(repr, methods))} has that key"


def _allowed_keys(loc: list[str], tree: dict[str, Any], model: type[BaseModel]) -> list[str]:
    """Keys allowed in the section at ``loc``, which depend on the methods that ``tree`` selects."""
    node: Any = tree
    for part in loc:
        node = _child(node, part)
        annotation = model.model_fields[part].annotation
        choices = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        name = node.get("name") if isinstance(node, dict) else None
        if MethodConfig in choices:
            model = REGISTRIES[part].options(str(name))
        else:
            named = [m for m in choices if "name" in m.model_fields and m.model_fields["name"].default == name]
            model = (named or choices)[0]
    return list(model.model_fields)


def _child(node: Any, key: str) -> Any:
    return node.get(key, {}) if isinstance(node, dict) else {}
