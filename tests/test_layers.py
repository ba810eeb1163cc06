"""The floors: a file imports only from floors below, and Ray stays on its own."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import Trained, tiny_flags

import raypp
from raypp.utils.images import write_png

ROOT = Path(raypp.__file__).parent
# From top to bottom; a package stands on one layer.
LAYERS = [
    "cli", "api", "results", "loaded_bundle", "result", "dispatch", "catalog", "serve", "cluster", "client",
    "experiments", "evaluation", "attacks", "bundle", "training", "config", "data", "protections", "models", "metrics",
    "utils",
]  # fmt: skip
RAY = {"raypp.cluster", "raypp.data.streaming", "raypp.serve.deployments", "raypp.serve.server"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer(name: str) -> int:
    """The number of a module's layer from the top; the package's own file belongs to the lowest."""
    package = name.split(".")[1] if "." in name else ""
    assert package in {"", *LAYERS}, f"{name} has no layer: add its package here and in ARCHITECTURE.md"
    return LAYERS.index(package or "utils")


@cache
def imports(name: str) -> tuple[tuple[str, int, bool], ...]:
    """What a module imports, except for type checking: name, line, and whether it stands in a function."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}:{child.lineno} is a relative import"
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    yield (full if full in MODULES else str(child.module)), child.lineno, inside
            else:
                yield from visit(
                    child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                )

    return tuple(visit(ast.parse(MODULES[name].read_text()), False))


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    for target, line, _ in imports(name):
        if within(target, "raypp"):
            assert layer(target) >= layer(name), f"{name}:{line} imports {target} from a layer above"


def reachable(name: str) -> set[str]:
    """Modules of raypp that a module imports at its top, directly or through others."""
    seen: set[str] = set()
    left = [name]
    while left:
        current = left.pop()
        if current not in seen:
            seen.add(current)
            left += [target for target, _, inside in imports(current) if not inside and within(target, "raypp")]
    return seen


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("raypp.client.offline", "raypp.training"),
        ("raypp.client.http", "raypp.training"),
        ("raypp.evaluation.evaluate", "raypp.training"),
    ],
)
def test_clients_and_evaluation_import_no_trainer(name: str, package: str) -> None:
    assert not [target for target in reachable(name) if within(target, package)]


def test_there_is_no_circle() -> None:
    graph = {
        name: {target for target, _, _ in imports(name) if within(target, "raypp") and target != name}
        for name in MODULES
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_registry_entries_stand_no_higher_than_their_registry() -> None:
    from raypp.attacks import ATTACKS
    from raypp.data import SOURCES
    from raypp.models import ADAPTATIONS, CLASSIFIERS, FEATURES
    from raypp.protections import PROTECTIONS

    for registry, package in (
        (SOURCES, "raypp.data"),
        (CLASSIFIERS, "raypp.models"),
        (FEATURES, "raypp.models"),
        (ADAPTATIONS, "raypp.models"),
        (PROTECTIONS, "raypp.protections"),
        (ATTACKS, "raypp.attacks"),
    ):
        for name in registry:
            assert within(registry.get(name).__module__, package)


@pytest.mark.parametrize("name", MODULES)
def test_ray_stays_on_its_floor(name: str) -> None:
    if any(within(name, allowed) for allowed in RAY):
        return
    for target, line, inside in imports(name):
        assert not within(target, "ray"), f"{name}:{line} imports {target}"
        if any(within(target, allowed) for allowed in RAY):
            assert within(name, "raypp.cli"), f"{name}:{line} imports {target}"
            assert inside, f"{name}:{line} imports {target} before a command asks for it"


def test_one_function_chooses_the_device() -> None:
    """What torch sees is not what Ray has assigned: only raypp.utils.device asks torch."""
    for name, path in MODULES.items():
        if name != "raypp.utils.device":
            for call in ("cuda.is_available", "cuda.device_count", "mps.is_available"):
                assert call not in path.read_text(), f"{name} calls torch.{call}"


HEAVY = {"torch", "torchvision", "ray", "pyarrow", "pandas", "matplotlib"}


def test_the_command_line_imports_nothing_heavy_at_its_top() -> None:
    """Nor does anything that it imports there."""
    seen, left = set(), ["raypp.cli.main"]
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        for target, line, inside in imports(name):
            if not inside:
                assert target.partition(".")[0] not in HEAVY, f"{name}:{line} imports {target}"
                if within(target, "raypp"):
                    left.append(target)


def test_no_name_of_a_method_decides_anything_outside_its_package() -> None:
    """Adding a method is one file and one line; ``if name == ...`` elsewhere would make it two."""
    from raypp.data import SOURCES
    from raypp.models import ADAPTATIONS, CLASSIFIERS, FEATURES
    from raypp.protections import PROTECTIONS

    names = {*SOURCES, *CLASSIFIERS, *FEATURES, *ADAPTATIONS, *PROTECTIONS} - {
        "plain"
    }  # plain is a mode of training too
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                compared = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                assert not names & {value for value in compared if isinstance(value, str)}, f"{module}:{node.lineno}"


WITHOUT_RAY = """
import socket
import sys
from importlib.abc import MetaPathFinder

class NoRay(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r}", name="ray")

def refuse(*_, **__):
    raise AssertionError("a connection was opened")

sys.meta_path.insert(0, NoRay())
socket.socket.connect = socket.getaddrinfo = refuse
from raypp.cli.main import main

bundle, *flags = sys.argv[1:]
main(["protect", bundle, "image.png", "protected.png"])
heavy = {"ray", "torchvision", "matplotlib", "torch._dynamo"} & set(sys.modules)
assert not heavy, f"a client imports {heavy}"
main(["train", "quickstart", "--name", "run", "--quiet", *flags])
main(["evaluate", "runs/run/bundle", "--output", "numbers.json"])
assert "ray" not in sys.modules
main(["train", "quickstart", "--name", "other", "--ray", *flags])
"""


@pytest.mark.slow
def test_without_ray_and_network_everything_but_the_cluster_works(trained: Trained, tmp_path: Path) -> None:
    write_png(tmp_path / "image.png", np.zeros((16, 16, 3), dtype=np.uint8))
    flags = tiny_flags(tmp_path / "runs", train__epochs=1)
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, str(trained.bundle / "public"), *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    lines = result.stderr.splitlines()
    assert [line for line in lines if not line.startswith("error: accuracy on")] == [  # one epoch teaches nothing
        "protected 1 image at 16 x 16: protected.png",
        "raypp: Ray is not installed here; without it, work runs in this process (--local)",
    ], result.stderr
    assert result.returncode == 2
    assert (tmp_path / "numbers.json").exists()
    assert (tmp_path / "protected.png").exists()
