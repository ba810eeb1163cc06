"""Read YAML and JSON; duplicate keys and YAML aliases that expand without bound are errors."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

MAX_NODES = 100_000  # of a document with expanded aliases
TIMESTAMP, MERGE, TEXT, INTEGER, FLOAT = (
    f"tag:yaml.org,2002:{name}" for name in ("timestamp", "merge", "str", "int", "float")
)
DECIMAL = r"(?![-+]?0[0-9_])(?!.*:)"  # prefix of the number patterns that excludes octal and base 60


class DocumentError(Exception):
    """A document cannot be read; ``syntax`` is whether it is not valid YAML or JSON."""

    def __init__(self, message: str, *, syntax: bool = False) -> None:
        super().__init__(" ".join(message.split()) if syntax else message)
        self.syntax = syntax


class _Loader(yaml.SafeLoader):
    """Safe loader that keeps dates, 010 and 1:30 as text, so that a folder may be called 2024-01-05.

    YAML 1.1 reads 010 as eight and 1:30 as ninety. A numeric setting reads the text 010 as ten, as in a flag, and
    refuses 1:30.
    """


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(DECIMAL + pattern.pattern, pattern.flags) if tag in (INTEGER, FLOAT) else pattern)
        for tag, pattern in resolvers
        if tag != TIMESTAMP
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(data: bytes | str) -> Any:
    """Read one YAML document, as UTF-8 or UTF-16 with a byte order mark; raises DocumentError with the line."""
    try:
        loader = _Loader(data)
        root = loader.get_single_node()
        if root is None:
            return None
        if _num_nodes(root, [], {}) > MAX_NODES:
            raise DocumentError(f"its aliases stand for more than {MAX_NODES:,} values")
        return loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise DocumentError(f"{position}{error.problem or error.context}", syntax=True) from error
    except yaml.reader.ReaderError as error:
        raise DocumentError(f"byte {error.position + 1} is not valid {error.encoding}", syntax=True) from error
    except RecursionError as error:
        raise DocumentError("its sections are nested too deeply", syntax=True) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid number, for example
        raise DocumentError(str(error), syntax=True) from error


def _num_nodes(node: yaml.Node, ancestors: list[yaml.Node], counts: dict[int, int]) -> int:
    """Count the values of a node with expanded aliases; raises DocumentError for keys that are not unique text."""
    if any(node is other for other in ancestors):
        raise DocumentError(f"line {node.start_mark.line + 1}: it contains itself by an alias")
    if id(node) not in counts:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        counts[id(node)] = 1 + sum(_num_nodes(child, [*ancestors, node], counts) for child in children)
    return counts[id(node)]


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (TEXT, MERGE):
            name = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise DocumentError(f"line {line}: key {name} is no text; allowed are names, or text in quotes")
        if key.value in lines:
            raise DocumentError(f"line {line}: key {key.value!r} is given twice, first in line {lines[key.value]}")
        lines[key.value] = line


def load_json(data: bytes | str) -> Any:
    """Read JSON in UTF-8; raises DocumentError, with the line if the parser knows it."""
    try:
        return json.loads(data, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise DocumentError("its objects are nested too deeply", syntax=True) from error
    except ValueError as error:  # includes UnicodeDecodeError
        raise DocumentError(str(error), syntax=True) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise DocumentError(f"key {key!r} is given twice")
        mapping[key] = value
    return mapping


def dump_json(data: Any) -> bytes:
    """Serialize JSON data as indented UTF-8 text with a final newline."""
    return (json.dumps(data, indent=2) + "\n").encode()
