"""Loads a user's Python function as a protection, from a module or from a file that runs like a script."""

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
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from raypp.attacks.base import ImageMap
from raypp.utils.errors import ConfigError
from raypp.utils.registry import suggest

_loaded: dict[str, tuple[str, ModuleType]] = {}
"""Loaded modules by file path, with the SHA-256 of the file, so that each file runs once."""


def user_function(name: str, device: torch.device, search: str | None = None) -> ImageMap:
    """Load ``module:name`` or ``file.py:name`` as a map of uint8 tensors (N, C, H, W), with its ``noise_std``.

    Args:
        search: first folder to search for a module.

    Raises:
        ConfigError: the function cannot be loaded; later, it fails or does not return uint8 (N, H', W', C').
    """
    module, _, attribute = name.rpartition(":")
    if not module or not attribute:
        raise ConfigError(f"function {name!r} is not understood; allowed is MODULE:NAME or FILE.py:NAME")
    file = Path(module) if module.endswith(".py") else None
    folder, last = (str(file.parent), _is_name_taken(file)) if file is not None else (search, False)
    with _script_environment(str(file or module), folder, last=last):
        loaded = _import(name, module, file)
        function = _get_function(name, loaded, attribute)

    def call(images: np.ndarray) -> Any:
        with _script_environment(str(file or module), folder, last=last):
            return function(images)

    protect = checked_map(call, name, device, loaded)
    cast(Any, protect).noise_std = getattr(function, "noise_std", None)
    return protect


def checked_map(
    function: Callable[[np.ndarray], Any], name: str, device: torch.device, source: ModuleType | Path | None = None
) -> ImageMap:
    """A function on NumPy uint8 (N, H, W, C) as a map of uint8 tensors (N, C, H, W) that checks each result.

    Args:
        source: where the function was loaded from, to name the line of an error.
    """
    sizes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def protect(images: Tensor) -> Tensor:
        array = images.permute(0, 2, 3, 1).cpu().numpy().copy()  # the function may change it in place
        shape = array.shape
        try:
            protected = function(array)
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            raise ConfigError(f"function {name!r} failed: {_reason(error, source)}") from error
        _check_result(name, protected, shape)
        size = sizes.setdefault(shape[1:], protected.shape[1:])
        if protected.shape[1:] != size:
            raise ConfigError(
                f"function {name!r} gave images {protected.shape[1:]} after images {size}; all must have one size"
            )
        # A copy, because the function may reuse its array for the next images.
        return torch.from_numpy(np.array(protected)).permute(0, 3, 1, 2).to(device)

    return protect


def _check_result(name: str, protected: Any, shape: tuple[int, ...]) -> None:
    """Raise ConfigError unless the result for images uint8 of ``shape`` is uint8 (N, H', W', C')."""
    if not (
        isinstance(protected, np.ndarray)
        and protected.dtype == np.uint8
        and protected.ndim == 4
        and len(protected) == shape[0]
        and protected.shape[3] in (1, 3)
        and protected.size
    ):
        raise ConfigError(
            f"function {name!r} gave {_describe(protected)} for uint8 {shape}; it must give a NumPy array uint8 "
            f"(N, H, W, C) with N = {shape[0]} and 1 or 3 channels"
        )


def source_of(name: str) -> str | None:
    """The SHA-256 of a loaded function's file, or None if it has no file."""
    module = name.rpartition(":")[0]
    file = module if module.endswith(".py") else getattr(sys.modules.get(module), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def _import(name: str, module: str, file: Path | None) -> ModuleType:
    if file is None and ("/" in module or module.endswith((".ipynb", ".pyc"))):
        raise ConfigError(
            f"function {name!r} names a file that is not a .py file; allowed is MODULE:NAME or FILE.py:NAME"
        )
    if file is not None and not file.is_file():
        raise ConfigError(f"function {name!r} cannot be loaded: there is no file {str(file)!r}")
    try:
        return _run_file(file) if file is not None else importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ConfigError(f"function {name!r} cannot be loaded: {_reason(error, file)}") from error


class _Source(SourceFileLoader):
    """Compiles the current content of a file, and writes no bytecode."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


def _run_file(file: Path) -> ModuleType:
    """Execute a file as the module of its name, which dataclasses and pickle need."""
    path, digest = str(file.absolute()), hashlib.sha256(file.read_bytes()).hexdigest()
    loaded = _loaded.get(path)
    if loaded is not None and loaded[0] == digest:
        return loaded[1]
    if loaded is not None:
        name = loaded[1].__name__
    elif not file.stem.isidentifier() or file.stem in sys.modules or _is_name_taken(file):
        name = f"{file.stem}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"  # the other module keeps its name
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


def _is_name_taken(file: Path) -> bool:
    """Whether Python or a package has a module of the file's name, which the file must not replace."""
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
def _script_environment(name: str, folder: str | None, *, last: bool) -> Iterator[None]:
    """Set ``sys.argv`` and ``sys.path`` as for a script; ``last`` appends the folder if the file's name is taken."""
    arguments, sys.argv = sys.argv, [name]
    if folder is not None:
        sys.path.insert(len(sys.path) if last else 0, folder)
    try:
        yield
    finally:
        sys.argv = arguments
        if folder in sys.path:
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder) if last else sys.path.index(folder)]


def _get_function(name: str, module: ModuleType, attribute: str) -> Callable[[Any], Any]:
    """Get a function from a module; raises ConfigError if it does not exist or cannot take images."""
    call: Any = module
    for part in attribute.split("."):
        try:
            call = getattr(call, part)
        except AttributeError as error:
            names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise ConfigError(
                f"function {name!r} cannot be loaded: AttributeError: there is no {part!r}{suggest(part, names)}"
            ) from error
        except Exception as error:  # a module's __getattr__ may raise anything
            raise ConfigError(f"function {name!r} cannot be loaded: {_reason(error, module)}") from error
    allowed = "allowed is a function from and to NumPy uint8 (N, H, W, C)"
    if isinstance(call, type):
        raise ConfigError(f"function {name!r} is a class; {allowed}, or an instance that can be called like one")
    if not callable(call):
        raise ConfigError(f"function {name!r} is of type {type(call).__name__}, which cannot be called; {allowed}")
    if inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None)):  # noqa: B004
        raise ConfigError(f"function {name!r} is asynchronous; {allowed}")
    try:
        inspect.signature(call).bind(None)
    except TypeError as error:
        raise ConfigError(f"function {name!r} does not take one argument, the images: {error}; {allowed}") from error
    except ValueError:  # builtins have no signature
        pass
    function: Callable[[Any], Any] = call
    return function


def _describe(value: Any) -> str:
    """Type and shape of a function's result in words."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def _reason(error: BaseException, source: ModuleType | Path | None) -> str:
    """A user's error in one line, with the line of the user's code that raised it."""
    message = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    if isinstance(error, SyntaxError):
        return message  # it has file and line
    file = str(source.absolute()) if isinstance(source, Path) else getattr(source, "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if file and frame.filename == file]
    return f"{message} ({Path(str(file)).name}, line {lines[-1]})" if lines else message
