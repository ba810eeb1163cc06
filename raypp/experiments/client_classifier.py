"""The client's cost of an attacked protection, and the classifier of plain images that the client could run alone.

The classifier is trained for the run only where no trained one serves: neither the bundle's plain classifier nor the
reference classifier, which both have the cloud's architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from raypp.attacks.array_target import ArrayTarget
from raypp.attacks.base import Shape, required
from raypp.attacks.target import Target
from raypp.attacks.user_function import user_function
from raypp.bundle.load import load_private, load_public
from raypp.config.overrides import flatten_dict
from raypp.config.schema import Config
from raypp.config.validation import validate
from raypp.data.base import ImageDataset
from raypp.evaluation.client_cost import (
    classifier_alone,
    cloud_epochs,
    describe_alone,
    measure_client,
    measure_protection,
    with_gain,
)
from raypp.experiments.attack_plan import CLIENT_CLASSIFIER, REFERENCE_CLASSIFIER, AttackPlan
from raypp.experiments.reference_classifier import needs_reference_classifier, plain_config, reference_config
from raypp.experiments.run_folder import read_checked
from raypp.experiments.training_run import open_run, train_locally
from raypp.metrics.cost import multiply_accumulates
from raypp.utils.progress import ProgressListener
from raypp.utils.registry import MethodConfig

Candidate = tuple[MethodConfig, int]
"""A classifier's options, and its multiply-accumulates per image."""
READING = {"root", "path", "download", "stream", "shuffle_buffer", "stream_mib_per_worker"}
"""Settings of ``data`` that state where and how images are read, and leave the images as they are."""


def needs_client_classifier(plan: AttackPlan, target: Target) -> bool:
    """Whether the client's classifier must be trained for this run."""
    if plan.suite.reference_epochs == 0 or plan.storage.exists(f"{CLIENT_CLASSIFIER}/summary.json"):
        return False
    candidate = _candidate(plan, target)
    if candidate is None:
        return False
    reference = _is_reference(candidate, target) and needs_reference_classifier(plan, target)
    return not reference and _plain_results(plan, target, candidate) is None and _has_data_of_bundle(plan, target)


def client_config(plan: AttackPlan, target: Target) -> Config:
    """The configuration of the client's classifier."""
    return plain_config(plan, target, required(_candidate(plan, target))[0])


PLAIN_CLASSIFIERS: dict[str, Callable[[AttackPlan, Target], Config]] = {
    REFERENCE_CLASSIFIER: reference_config,
    CLIENT_CLASSIFIER: client_config,
}
"""Configurations of plain classifiers, by the names of their jobs and folders."""


def train_plain_classifier(plan: AttackPlan, target: Target, name: str, display: ProgressListener) -> None:
    """Train or resume one of :data:`PLAIN_CLASSIFIERS` as a run in the plan's folder."""
    resume = plan.storage.exists(f"{name}/config.yaml")
    with open_run(PLAIN_CLASSIFIERS[name](plan, target), name, resume=resume) as run:
        train_locally(run, display, target.access.device)


def missing_classifiers(plan: AttackPlan, target: Target) -> list[str]:
    """Names of the plain classifiers that the run needs and has not trained."""
    needs = {REFERENCE_CLASSIFIER: needs_reference_classifier, CLIENT_CLASSIFIER: needs_client_classifier}
    return [name for name, needed in needs.items() if needed(plan, target)]


def measure_client_of(plan: AttackPlan, target: Target, failures: dict[str, str]) -> tuple[dict[str, Any] | None, str]:
    """The client's cost, its classifier alone and the cloud gain; None if they cannot be measured.

    Args:
        failures: messages of failed jobs by name.

    Returns:
        The section ``client`` of the scorecard, and why it is None; "" for folders, whose protection is not known.
    """
    if plan.spec.bundle is not None:
        return _measure_bundle(plan.spec.bundle, plan, target, failures), ""
    if target.access.protect is None:
        return None, ""
    try:
        return with_gain(_measure_users_protection(plan, target.access.shape), None, {}), ""
    except Exception as error:  # a user's code may refuse a single image, the CPU or a copy, and raise anything
        return None, " ".join(f"{type(error).__name__}: {error}".split())


def _measure_bundle(bundle: str, plan: AttackPlan, target: Target, failures: dict[str, str]) -> dict[str, Any]:
    cost = measure_protection(load_public(bundle).protection, target.access.shape)
    test = (target.metrics or {}).get("test")
    if not test or target.config is None:
        return with_gain(cost, None, {})
    candidate = _candidate(plan, target)
    results = None if candidate is None else _plain_results(plan, target, candidate)
    plain, epochs = results or (None, None)
    alone = describe_alone(candidate, test, plain, epochs, cloud_epochs(target.config))
    is_missing = candidate is not None and results is None
    return with_gain(cost, alone | {"note": _reason(plan, target, candidate, failures) if is_missing else ""}, test)


def _reason(plan: AttackPlan, target: Target, candidate: Candidate | None, failures: dict[str, str]) -> str:
    """Why the candidate has no accuracy."""
    if not _has_data_of_bundle(plan, target):
        return "the images differ from those of the bundle's training and test"
    if plan.suite.reference_epochs == 0:
        return "reference_epochs is 0"
    is_reference = candidate is not None and _is_reference(candidate, target)
    return failures.get(CLIENT_CLASSIFIER) or (failures.get(REFERENCE_CLASSIFIER, "") if is_reference else "")


def _measure_users_protection(plan: AttackPlan, shape: Shape) -> dict[str, Any]:
    """The cost of a copy of a module on the CPU, or of a function where it runs."""
    cpu, arrays = torch.device("cpu"), plan.arrays
    if arrays is None:
        return measure_client(user_function(required(plan.spec.function), cpu, plan.spec.search), shape, None)
    if not isinstance(arrays.protection, nn.Module):
        return measure_client(arrays.protect_with(None, cpu), shape, None)
    on_cpu = replace(arrays, protection=copy.deepcopy(arrays.protection).cpu().eval())
    return measure_client(on_cpu.protect_with(None, cpu), shape, _float_map(on_cpu))


def _float_map(arrays: ArrayTarget) -> Callable[[Tensor], Tensor]:
    """A module under the target's key, from and to float images."""
    module: Callable[..., Tensor] = arrays.protection
    return module if arrays.key_generator is None else lambda images: module(images, arrays.keys[None])


def _candidate(plan: AttackPlan, target: Target) -> Candidate | None:
    """The largest classifier that the client can run alone; None if none fits or the budget is not known."""
    if plan.spec.bundle is None or target.config is None:
        return None
    classifier, num_classes = target.config.classifier, len(target.classes)
    return _largest_classifier(plan.spec.bundle, target.source, classifier, target.access.shape, num_classes)


@lru_cache(maxsize=8)
def _largest_classifier(
    bundle: str, _source: str | None, classifier: MethodConfig, shape: Shape, num_classes: int
) -> Candidate | None:
    """Load a bundle and count once; ``_source``, the hash of its public part, tells its versions apart."""
    budget = multiply_accumulates(load_public(bundle).protection, torch.zeros(1, *shape))
    return classifier_alone(budget, classifier, shape, num_classes)


def _is_reference(candidate: Candidate, target: Target) -> bool:
    """Whether a candidate has the cloud's architecture, which a reference classifier also has."""
    return target.config is not None and candidate[0] == target.config.classifier


def _plain_results(plan: AttackPlan, target: Target, candidate: Candidate) -> tuple[dict[str, Any], int] | None:
    """Test results and epochs of a trained classifier of the candidate's architecture, or None.

    None serves where the attack uses other images than the bundle, whose cost and accuracies differ.
    """
    if not _has_data_of_bundle(plan, target):
        return None
    names = [CLIENT_CLASSIFIER]
    if _is_reference(candidate, target):
        metrics = target.metrics or {}
        if metrics.get("plain_test"):
            return metrics["plain_test"], metrics["epochs"]["plain"]
        names.append(REFERENCE_CLASSIFIER)
    for name in names:
        folder = plan.storage.folder(name)
        if folder.exists("summary.json"):
            summary = read_checked(folder, "summary.json", "test", "epochs")
            return summary["test"], summary["epochs"]["plain"]
    return None


def _has_data_of_bundle(plan: AttackPlan, target: Target) -> bool:
    """Whether the attack's images are those of the bundle: the same settings and the same test split."""
    if plan.spec.config:
        own = validate(load_private(required(plan.spec.bundle)).config)
        if _image_settings(own) != _image_settings(required(target.config)):
            return False
    pixels = target.gallery.permute(0, 2, 3, 1).cpu().numpy()
    test = ImageDataset(pixels, target.gallery_labels.cpu().numpy(), target.classes)
    return test.fingerprint() == (target.metrics or {}).get("test_fingerprint")


def _image_settings(config: Config) -> dict[str, Any]:
    settings = flatten_dict(config.data.model_dump(mode="json"))
    return {key: value for key, value in settings.items() if key.rpartition(".")[2] not in READING}
