"""Validation: one sentence for an error of pydantic, with field, value and what is allowed."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from raypp.config.schema import REGISTRIES, Config, Data, MultiStep, OptimizationConfig
from raypp.utils.errors import ConfigError
from raypp.utils.registry import MethodConfig


def validate(tree: dict[str, Any]) -> Config:
    """Validate a merged tree; raises ConfigError with one sentence for the first thing that is wrong."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(format_validation_error(error, tree)) from None


def check_milestones(train: OptimizationConfig, section: str) -> None:
    """Refuse milestones that training ends before; raises ConfigError.

    A check of what users write: stored configurations of earlier versions may hold such milestones.

    Args:
        section: where ``train`` stands, for the message.
    """
    if not isinstance(train.schedule, MultiStep):
        return
    late = [milestone for milestone in train.schedule.milestones if milestone >= train.epochs]
    if late:
        raise ConfigError(
            f"{section}.schedule.milestones is {list(train.schedule.milestones)}, but training ends after "
            f"{section}.epochs {train.epochs}; allowed are milestones less than {train.epochs}"
        )


def validate_data(tree: dict[str, Any]) -> Data:
    """Validate a ``data`` section by itself; raises ConfigError as :func:`validate` does."""
    try:
        return Data.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(format_validation_error(error, {"data": tree}, ("data",))) from None


def format_validation_error(
    error: ValidationError, tree: dict[str, Any], within: tuple[str, ...] = (), root: type[BaseModel] | None = None
) -> str:
    """The first error as one sentence; pydantic's own wording, with the key spelled as the user wrote it.

    Args:
        within: the section that was validated by itself.
        root: the model that was validated; by default a :class:`Config`.
    """
    # An unknown key explains other errors (a missing required one, say), so it comes first.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    loc = [*within, *(str(part) for part in first["loc"])]
    # pydantic puts a discriminated union's tag into the path; the user never wrote it.
    if loc[:2] == ["train", "schedule"] and len(loc) > 2:
        del loc[2]
    key = ".".join(loc)
    if first["type"] == "extra_forbidden":
        siblings = _allowed_keys(loc[:-1], tree, root or Config)
        close = difflib.get_close_matches(loc[-1], siblings, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"unknown key {key!r}{hint}; allowed there: {', '.join(siblings)}{_owners(loc, tree)}"
    if first["type"] == "missing":
        return f"{key} is missing; it has no default"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {reason}" if key else reason
    value = first["input"]
    shown = value if isinstance(value, str) and re.fullmatch(r"[-+.\d][-+.\deE]*", value) else repr(value)
    return f"{key} is {shown}: {reason[0].lower()}{reason[1:]}"


def _owners(loc: list[str], tree: dict[str, Any]) -> str:
    """Which methods have a key that the chosen one lacks; an empty string if none has it."""
    *above, key = loc
    registry = REGISTRIES.get(above[-1]) if above else None
    owners = [name for name in registry or () if registry and key in registry.options(name).model_fields]
    if not owners:
        return ""
    node: Any = tree
    for part in above:
        node = node.get(part, {}) if isinstance(node, dict) else {}
    name = node.get("name") if isinstance(node, dict) else node
    return f"; {'.'.join(above)} is {name!r}, and only {' or '.join(map(repr, owners))} has that key"


def _allowed_keys(loc: list[str], tree: dict[str, Any], model: type[BaseModel]) -> list[str]:
    """Keys allowed in the section at ``loc``, given what the user's tree selects there."""
    node: Any = tree
    for part in loc:
        node = node.get(part, {}) if isinstance(node, dict) else {}
        annotation = model.model_fields[part].annotation
        choices = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        name = node.get("name") if isinstance(node, dict) else None
        if MethodConfig in choices:
            model = REGISTRIES[part].options(str(name))
        else:
            named = [m for m in choices if "name" in m.model_fields and m.model_fields["name"].default == name]
            model = (named or choices)[0]
    return list(model.model_fields)
