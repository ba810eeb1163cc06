"""YAML and JSON as every file of raypp is read: no key twice, and nothing that grows without end."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

MAX_NODES = 100_000  # of a document with its aliases written out
TIMESTAMP, MERGE, TEXT = (f"tag:yaml.org,2002:{name}" for name in ("timestamp", "merge", "str"))


NUMBERS = tuple(f"tag:yaml.org,2002:{name}" for name in ("int", "float"))
DECIMAL = r"(?![-+]?0[0-9_])(?!.*:)"  # begins the pattern of a number: no octal one, none of base 60


class DocumentError(ValueError):
    """A document cannot be read; the message names the line where there is one.

    Attributes:
        syntax: whether it is no YAML or JSON at all.
    """

    def __init__(self, message: str, *, syntax: bool = False) -> None:
        super().__init__(message)
        self.syntax = syntax


class _Loader(yaml.SafeLoader):
    """Safe, and without dates: no setting is one, and a folder may be called 2024-01-05.

    Nor does it read 010 as eight or 1:30 as ninety, as YAML 1.1 has it. They stay text: a setting that is a number
    reads 010 as ten, as in a flag, and refuses 1:30.
    """


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(DECIMAL + pattern.pattern, pattern.flags) if tag in NUMBERS else pattern)
        for tag, pattern in resolvers
        if tag != TIMESTAMP
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(data: bytes | str) -> Any:
    """Read one YAML document; bytes are UTF-8, or UTF-16 with a byte order mark.

    Raises:
        DocumentError: what is wrong, and in which line.
    """
    try:
        loader = _Loader(data)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            if _num_nodes(root, [], {}) > MAX_NODES:
                raise DocumentError(f"its aliases stand for more than {MAX_NODES:,} values")
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise DocumentError(where + " ".join(str(error.problem or error.context).split()), syntax=True) from error
    except yaml.reader.ReaderError as error:
        raise DocumentError(f"at byte {error.position + 1} it is no text in {error.encoding}", syntax=True) from error
    except RecursionError as error:
        raise DocumentError("its sections are nested too deeply", syntax=True) from error
    except DocumentError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number that is none, say
        raise DocumentError(" ".join(str(error).split()), syntax=True) from error


def _num_nodes(node: yaml.Node, above: list[yaml.Node], counts: dict[int, int]) -> int:
    """How many values a node stands for with aliases written out; refuses keys that are given twice or are no text."""
    if any(node is other for other in above):
        raise DocumentError(f"line {_line(node)}: it contains itself by an alias")
    if id(node) not in counts:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        counts[id(node)] = 1 + sum(_num_nodes(child, [*above, node], counts) for child in children)
    return counts[id(node)]


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (TEXT, MERGE):
            shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise DocumentError(f"line {_line(key)}: key {shown} is no text; allowed are names, or text in quotes")
        if key.value in lines:
            first = lines[key.value]
            raise DocumentError(f"line {_line(key)}: key {key.value!r} is given twice, first in line {first}")
        lines[key.value] = _line(key)


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line
    return line + 1


def load_json(data: bytes | str) -> Any:
    """Read JSON in UTF-8.

    Raises:
        DocumentError: what is wrong, and in which line where the parser knows.
    """
    try:
        return json.loads(data, object_pairs_hook=_object)
    except DocumentError:
        raise
    except RecursionError as error:
        raise DocumentError("its objects are nested too deeply", syntax=True) from error
    except ValueError as error:  # a UnicodeDecodeError too
        raise DocumentError(" ".join(str(error).split()), syntax=True) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None) if len(set(keys)) < len(keys) else None
    if twice is not None:
        raise DocumentError(f"key {twice!r} is given twice")
    return dict(pairs)
