"""The client's cost of an attacked protection, and the classifier of plain images that the client could run alone.

The classifier is trained for the run only where no trained one serves: neither the bundle's plain classifier nor the
reference classifier, which both have the cloud's architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raypp.attacks.base import AttackError, required
from raypp.attacks.target import Target
from raypp.bundle.load import load_public
from raypp.evaluation.client_cost import (
    classifier_alone,
    describe_alone,
    measure_client,
    measure_protection,
    with_gain,
)
from raypp.experiments.attack_plan import CLIENT_CLASSIFIER, REFERENCE_CLASSIFIER, AttackPlan
from raypp.experiments.reference_classifier import (
    needs_reference_classifier,
    train_plain_classifier,
    train_reference_classifier,
)
from raypp.experiments.run_folder import read_checked
from raypp.metrics.cost import multiply_accumulates
from raypp.protections.base import Protection
from raypp.utils.errors import RayppError
from raypp.utils.progress import ProgressListener
from raypp.utils.registry import MethodConfig

Candidate = tuple[MethodConfig, int]
"""A classifier's options, and its multiply-accumulates per image."""


def needs_client_classifier(plan: AttackPlan, target: Target) -> bool:
    """Whether the client's classifier must be trained for this run."""
    if plan.suite.reference_epochs == 0 or plan.storage.exists(f"{CLIENT_CLASSIFIER}/summary.json"):
        return False
    candidate = _candidate(plan, target)
    if candidate is None:
        return False
    reference = _is_reference(candidate, target) and needs_reference_classifier(plan, target)
    return not reference and _plain_results(plan, target, candidate) is None


def train_client_classifier(plan: AttackPlan, target: Target, display: ProgressListener) -> None:
    """Train or resume the client's classifier with plain images and the suite's epochs."""
    candidate = required(_candidate(plan, target))
    train_plain_classifier(plan, target, CLIENT_CLASSIFIER, plan.suite.reference_epochs, candidate[0], display)


PLAIN_CLASSIFIERS: dict[str, Callable[[AttackPlan, Target, ProgressListener], None]] = {
    REFERENCE_CLASSIFIER: train_reference_classifier,
    CLIENT_CLASSIFIER: train_client_classifier,
}
"""Trainings of plain classifiers, by the names of their jobs and folders."""


def missing_classifiers(plan: AttackPlan, target: Target) -> list[str]:
    """Names of the plain classifiers that the run needs and has not trained."""
    needs = {REFERENCE_CLASSIFIER: needs_reference_classifier, CLIENT_CLASSIFIER: needs_client_classifier}
    return [name for name, needed in needs.items() if needed(plan, target)]


def measure_client_of(plan: AttackPlan, target: Target, failures: dict[str, str]) -> dict[str, Any] | None:
    """The client's cost, its classifier alone and the cloud gain; None for folders, whose protection is not known.

    Args:
        failures: messages of failed jobs by name.
    """
    shape, protection = target.access.shape, _protection(plan)
    if protection is None:
        return _measure_function(target)
    cost = measure_protection(protection, shape)
    test = (target.metrics or {}).get("test")
    if not test:
        return with_gain(cost, None, {})
    candidate = _candidate(plan, target)
    results = None if candidate is None else _plain_results(plan, target, candidate)
    plain, epochs = results or (None, None)
    alone = describe_alone(candidate, test, plain, epochs) | {"note": failures.get(CLIENT_CLASSIFIER, "")}
    return with_gain(cost, alone, test)


def _measure_function(target: Target) -> dict[str, Any] | None:
    protect = target.access.protect
    if protect is None:
        return None
    try:
        return with_gain(measure_client(lambda image: protect(image).cpu(), target.access.shape, None), None, {})
    except (RayppError, AttackError):  # a function may refuse a single image
        return None


def _protection(plan: AttackPlan) -> Protection | None:
    return load_public(plan.spec.bundle).protection if plan.spec.bundle is not None else None


def _candidate(plan: AttackPlan, target: Target) -> Candidate | None:
    """The largest classifier that the client can run alone; None if none fits or the budget is not known."""
    protection = _protection(plan)
    if protection is None or target.config is None:
        return None
    image = target.plain[:1].cpu().float() / 255
    budget = multiply_accumulates(protection.cpu().eval(), image)
    return classifier_alone(budget, target.config.classifier, target.access.shape, len(target.classes))


def _is_reference(candidate: Candidate, target: Target) -> bool:
    """Whether a candidate has the cloud's architecture, which a reference classifier also has."""
    return target.config is not None and candidate[0] == target.config.classifier


def _plain_results(plan: AttackPlan, target: Target, candidate: Candidate) -> tuple[dict[str, Any], int] | None:
    """Test results and epochs of a trained classifier of the candidate's architecture, or None."""
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
