"""The reference classifier: a plain classifier that reads reconstructions, trained where the target has none.

It shares no training with the target.
"""

from __future__ import annotations

from torch import nn

from raypp.attacks.base import required
from raypp.attacks.target import Target
from raypp.bundle.load import load_private
from raypp.config.schema import Config
from raypp.experiments.attack_plan import REFERENCE_CLASSIFIER, AttackPlan
from raypp.experiments.training_run import open_run, train_locally
from raypp.utils.progress import ProgressListener
from raypp.utils.registry import MethodConfig


def needs_reference_classifier(plan: AttackPlan, target: Target) -> bool:
    """Whether the reference classifier can be trained and is not trained yet."""
    can_train = target.plain_classifier is None and target.config is not None and bool(target.classes)
    is_trained = plan.storage.exists(f"{REFERENCE_CLASSIFIER}/summary.json")
    return can_train and plan.suite.reference_epochs > 0 and not is_trained


def train_reference_classifier(plan: AttackPlan, target: Target, display: ProgressListener) -> None:
    """Train or resume a separate run of the target's classifier, with plain images and the suite's epochs."""
    config = required(target.config)
    train_plain_classifier(plan, target, REFERENCE_CLASSIFIER, plan.suite.reference_epochs, config.classifier, display)


def train_plain_classifier(
    plan: AttackPlan, target: Target, name: str, epochs: int, classifier: MethodConfig, display: ProgressListener
) -> None:
    """Train or resume a classifier of plain images as a run ``name``, with the target's data and optimizer."""
    tree = required(target.config).model_dump(mode="json")
    tree |= {"protection": {"name": "plain"}, "adaptation": "auto", "seed": plan.suite.seed}
    tree["classifier"] = classifier.model_dump(mode="json")
    tree["train"] |= {"mode": "plain", "epochs": epochs, "plain_epochs": None}
    if tree["train"]["schedule"]["name"] == "multistep":
        tree["train"]["schedule"] = {"name": "one_cycle"}
    tree["data"] |= {"stream": False}
    tree["cluster"] |= {"storage": plan.storage.uri}
    resume = plan.storage.exists(f"{name}/config.yaml")
    with open_run(Config.model_validate(tree), name, resume=resume) as run:
        train_locally(run, display, target.access.device)


def load_reference_classifier(plan: AttackPlan, target: Target) -> nn.Module | None:
    """The target's plain classifier or the one trained for this run; None if there is neither."""
    if target.plain_classifier is not None:
        return target.plain_classifier
    folder = plan.storage.folder(REFERENCE_CLASSIFIER)
    if not folder.exists("summary.json"):
        return None
    return load_private(folder.folder("bundle").uri).classifier.to(target.plain.device)
