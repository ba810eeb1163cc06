"""A user's Python function as a protection, loaded from a module, or from a file as Python runs a script."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raypp.attacks.base import ImageMap
from raypp.utils.errors import ConfigError
from raypp.utils.registry import suggest

_loaded: dict[str, tuple[str, ModuleType]] = {}
"""Modules of files by path, each with the SHA-256 of what it was made of: a file is executed once."""


def user_function(name: str, device: torch.device, search: str | None = None) -> ImageMap:
    """Load ``module:name`` or ``file.py:name`` as a map of uint8 tensors (N, C, H, W).

    Args:
        search: folder in which a module is looked for first.

    Raises:
        ConfigError: it cannot be loaded; later, it fails or gives something else than uint8 (N, H', W', C').
    """
    module, _, attribute = name.rpartition(":")
    if not module or not attribute:
        raise ConfigError(f"function {name!r} is not understood; allowed is MODULE:NAME or FILE.py:NAME")
    file = Path(module) if module.endswith(".py") else None
    folder, last = (str(file.parent), _is_taken(file)) if file is not None else (search, False)
    with _as_script(str(file or module), folder, last=last):
        loaded = _import(name, module, file)
        call = _callable(name, loaded, attribute)
    sizes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def protect(images: Tensor) -> Tensor:
        given = images.permute(0, 2, 3, 1).cpu().numpy().copy()  # a function may work in place
        shape = given.shape
        try:
            with _as_script(str(file or module), folder, last=last):
                protected = call(given)
        except (Exception, SystemExit) as error:  # whatever a user's function may raise
            raise ConfigError(f"function {name!r} failed: {_reason(error, loaded)}") from error
        if not (
            isinstance(protected, np.ndarray)
            and protected.dtype == np.uint8
            and protected.ndim == 4
            and len(protected) == len(images)
            and protected.shape[3] in (1, 3)
            and protected.size
        ):
            raise ConfigError(
                f"function {name!r} gave {_described(protected)} for uint8 {shape}; it must give a NumPy array uint8 "
                f"(N, H, W, C) with N = {len(images)} and 1 or 3 channels"
            )
        before = sizes.setdefault(shape[1:], protected.shape[1:])
        if protected.shape[1:] != before:
            raise ConfigError(
                f"function {name!r} gave images {protected.shape[1:]} after images {before}; it must give one size for "
                "all"
            )
        # A copy: the function may give the same array again, with other images in it.
        return torch.from_numpy(np.array(protected)).permute(0, 3, 1, 2).to(device)

    return protect


def source_of(name: str) -> str | None:
    """The SHA-256 of the file that a loaded function comes from, or None where there is none."""
    module = name.rpartition(":")[0]
    file = module if module.endswith(".py") else getattr(sys.modules.get(module), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def _import(name: str, module: str, file: Path | None) -> ModuleType:
    if file is None and ("/" in module or module.endswith((".ipynb", ".pyc"))):
        raise ConfigError(f"function {name!r} names a file that is no .py; allowed is MODULE:NAME or FILE.py:NAME")
    if file is not None and not file.is_file():
        raise ConfigError(f"function {name!r} cannot be loaded: there is no file {str(file)!r}")
    try:
        return _run_file(file) if file is not None else importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's module may raise
        raise ConfigError(f"function {name!r} cannot be loaded: {_reason(error, file)}") from error


class _Source(SourceFileLoader):
    """Compiles a file as it is now, and writes no bytecode."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


def _run_file(file: Path) -> ModuleType:
    """Execute a file as the module of its name, so that its classes are found there (dataclasses, pickle)."""
    path, digest = str(file.absolute()), hashlib.sha256(file.read_bytes()).hexdigest()
    before = _loaded.get(path)
    if before is not None and before[0] == digest:
        return before[1]
    if before is not None:
        name = before[1].__name__
    elif not file.stem.isidentifier() or file.stem in sys.modules or _is_taken(file):
        name = f"{file.stem}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"  # another module keeps its own name
    else:
        name = file.stem
    spec = importlib.util.spec_from_file_location(name, path, loader=_Source(name, path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    replaced = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if replaced is None:
            del sys.modules[name]
        else:
            sys.modules[name] = replaced
        raise
    _loaded[path] = digest, module
    return module


def _is_taken(file: Path) -> bool:
    """Whether Python or a package has a module of the file's name, whose place the file must not take."""
    name = file.stem
    if name in sys.stdlib_module_names:
        return True
    if any(module.__name__ == name for _, module in _loaded.values()):
        return False
    try:
        spec = importlib.util.find_spec(name)
        return spec is not None and spec.origin != str(file.absolute())
    except (ImportError, ValueError):
        return False


@contextmanager
def _as_script(name: str, folder: str | None, *, last: bool) -> Iterator[None]:
    """Give a user's code what Python gives a script: no arguments but its name, and imports that look into a folder
    first; ``last`` where the file's own name is taken."""
    arguments, sys.argv = sys.argv, [name]
    if folder is not None:
        sys.path.insert(len(sys.path) if last else 0, folder)
    try:
        yield
    finally:
        sys.argv = arguments
        if folder in sys.path:
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder) if last else sys.path.index(folder)]


def _callable(name: str, module: ModuleType, attribute: str) -> Callable[[Any], Any]:
    """What ``attribute`` names in a module; raises ConfigError where it is nothing to call with images."""
    call: Any = module
    for part in attribute.split("."):
        try:
            call = getattr(call, part)
        except AttributeError as error:
            known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise ConfigError(
                f"function {name!r} cannot be loaded: AttributeError: there is no {part!r}{suggest(part, known)}"
            ) from error
        except Exception as error:  # a module may make its attributes when they are asked for
            raise ConfigError(f"function {name!r} cannot be loaded: {_reason(error, module)}") from error
    wanted = "allowed is a function from and to NumPy uint8 (N, H, W, C)"
    if isinstance(call, type):
        raise ConfigError(f"function {name!r} is a class; {wanted}, or an instance that can be called like one")
    if not callable(call):
        raise ConfigError(f"function {name!r} is of type {type(call).__name__}, which cannot be called; {wanted}")
    if inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None)):  # noqa: B004
        raise ConfigError(f"function {name!r} is asynchronous; {wanted}")
    try:
        inspect.signature(call).bind(None)
    except TypeError as error:
        raise ConfigError(f"function {name!r} does not take one argument, the images: {error}; {wanted}") from error
    except ValueError:  # of builtins Python knows no signature
        pass
    function: Callable[[Any], Any] = call
    return function


def _described(value: Any) -> str:
    """What a function gave, in a few words."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def _reason(error: BaseException, source: ModuleType | Path | None) -> str:
    """A user's error in one line, with where in the user's own code it arose."""
    words = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    if isinstance(error, SyntaxError):
        return words  # which names file and line
    file = str(source.absolute()) if isinstance(source, Path) else getattr(source, "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if file and frame.filename == file]
    return f"{words} ({Path(str(file)).name}, line {lines[-1]})" if lines else words
