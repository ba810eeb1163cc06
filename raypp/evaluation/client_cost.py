"""The client's cost of a protection, and the largest classifier that the client could run alone at that cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raypp.attacks.base import ImageMap, Shape
from raypp.config.schema import Config
from raypp.metrics.cost import cloud_gain, multiply_accumulates, time_per_image
from raypp.metrics.statistics import wilson_interval
from raypp.models import CLASSIFIERS
from raypp.protections.base import Protection
from raypp.training.protected_classifier import phases
from raypp.utils.registry import MethodConfig

SMALL_CLASSIFIERS: tuple[dict[str, Any], ...] = (
    {"name": "resnet20", "width": 12},
    {"name": "resnet20", "width": 8},
    {"name": "convnet", "width": 64, "depth": 3},
    {"name": "convnet", "width": 32, "depth": 3},
    {"name": "convnet", "width": 32, "depth": 2},
    {"name": "convnet", "width": 16, "depth": 2},
    {"name": "convnet", "width": 8, "depth": 2},
    {"name": "convnet", "width": 4, "depth": 2},
    {"name": "convnet", "depth": 0, "grid": 8},
    {"name": "convnet", "depth": 0, "grid": 4},
)
"""Classifiers for clients with a smaller budget than the cloud's classifier needs.

Their order by multiply-accumulates depends on the images and on the number of classes."""


def measure_client(protect: ImageMap, shape: Shape, network: Callable[[Tensor], Tensor] | None) -> dict[str, Any]:
    """Measure the client's cost for one image on the CPU; a function may use another device.

    Args:
        protect: from and to uint8 (1, C, H, W) on the CPU.
        shape: (C, H, W) of plain images.
        network: the same from float images; None for a function, whose multiply-accumulates are not counted.

    Returns:
        ``macs``; ``milliseconds`` with quartiles, see :func:`~raypp.metrics.cost.time_per_image`; ``bytes`` of an
        upload, one for each value.
    """
    image = torch.randint(256, (1, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {
        "macs": None if network is None else multiply_accumulates(network, image.float() / 255),
        "milliseconds": time_per_image(protect, image),
        "bytes": protect(image).numel(),
    }


def measure_protection(protection: Protection, shape: Shape) -> dict[str, Any]:
    """Measure a copy of a protection on the CPU, see :func:`measure_client`."""
    on_cpu = copy.deepcopy(protection).cpu().eval()
    return measure_client(on_cpu.protect, shape, on_cpu)


def classifier_alone(
    budget: int, cloud: MethodConfig, shape: Shape, num_classes: int
) -> tuple[MethodConfig, int] | None:
    """The largest classifier of plain images within a budget of multiply-accumulates per image.

    The candidates are the cloud's classifier and :data:`SMALL_CLASSIFIERS`. A client with a larger budget could run a
    more accurate one, but its training would take longer than the cloud's; the gain is then an upper bound.

    Args:
        budget: multiply-accumulates of the protection.
        cloud: options of the cloud's classifier.
        shape: (C, H, W) of plain images.

    Returns:
        Its options and multiply-accumulates; None if none fits.
    """
    if budget == 0:
        return None
    limit = min(budget, _macs(cloud, shape, num_classes))
    small = (CLASSIFIERS.options(options["name"]).model_validate(options) for options in SMALL_CLASSIFIERS)
    usable = (options for options in (cloud, *small) if CLASSIFIERS.get(options.name).least_side <= min(shape[1:]))
    affordable = [(options, macs) for options in usable if (macs := _macs(options, shape, num_classes)) <= limit]
    return max(affordable, key=lambda candidate: candidate[1], default=None)


def cloud_epochs(config: Config) -> int:
    """Epochs of the training behind the cloud's accuracy; the mode ``frozen`` counts its longer phase."""
    return max(phase.epochs for phase in phases(config)) if config.train.mode == "frozen" else config.train.epochs


def _macs(options: MethodConfig, shape: Shape, num_classes: int) -> int:
    with torch.device("meta"):  # counts without computing
        network: nn.Module = CLASSIFIERS.build(options, num_classes=num_classes, channels=shape[0]).eval()
        return multiply_accumulates(network, torch.zeros(1, *shape))


def describe_alone(
    candidate: tuple[MethodConfig, int] | None,
    test: dict[str, Any],
    plain: dict[str, Any] | None,
    epochs: int | None,
    cloud_epochs: int,
) -> dict[str, Any]:
    """The client's classifier with its accuracy on plain test images.

    Args:
        candidate: from :func:`classifier_alone`; None leaves the most frequent class.
        test: the protection's test results, with ``chance`` and ``num_images``.
        plain: test results of the candidate; None if it was not trained.
        epochs: of its training.
        cloud_epochs: of the training of the cloud's classifier.
    """
    epochs = None if candidate is None or plain is None else epochs
    trainings = {"epochs": epochs, "cloud_epochs": cloud_epochs}
    if candidate is None:
        chance, num = test["chance"], test["num_images"]
        guess = {"accuracy": chance, "accuracy_interval": list(wilson_interval(round(chance * num), num))}
        return {"classifier": None, "macs": 0} | trainings | guess
    options = candidate[0].model_dump(exclude={"name"})
    settings = ", ".join(f"{key} {value}" for key, value in options.items())
    name = f"{candidate[0].name} ({settings})" if settings else candidate[0].name
    measured = {key: None if plain is None else plain[key] for key in ("accuracy", "accuracy_interval")}
    return {"classifier": name, "macs": candidate[1]} | trainings | measured


def with_gain(cost: dict[str, Any], alone: dict[str, Any] | None, test: dict[str, Any]) -> dict[str, Any]:
    """The client's section of a scorecard: cost, classifier alone and cloud gain."""
    return cost | {"alone": alone} | cloud_gain(test, alone, cost["macs"])


def client_of_run(
    config: Config,
    protection: Protection,
    shape: Shape,
    test: dict[str, Any],
    plain_test: dict[str, Any] | None,
    num_classes: int,
) -> dict[str, Any]:
    """The client's section of a training run; the run's plain classifier serves as the classifier alone if it fits.

    Args:
        test, plain_test: results of the protection and, where the run has it, of the plain classifier.
    """
    cost = measure_protection(protection, shape)
    candidate = classifier_alone(cost["macs"], config.classifier, shape, num_classes)
    fits = candidate is not None and candidate[0] == config.classifier
    epochs = config.train.plain_epochs or config.train.epochs
    alone = describe_alone(candidate, test, plain_test if fits else None, epochs, cloud_epochs(config))
    return with_gain(cost, alone, test)
