"""The reference classifier: a plain classifier that reads reconstructions, trained where the target has none.

It shares no training with the target.
"""

from __future__ import annotations

from torch import nn

from raypp.attacks.base import required
from raypp.attacks.target import Target
from raypp.bundle.load import load_private
from raypp.config.schema import Config
from raypp.evaluation.client_cost import cloud_epochs
from raypp.experiments.attack_plan import REFERENCE_CLASSIFIER, AttackPlan
from raypp.utils.registry import MethodConfig


def needs_reference_classifier(plan: AttackPlan, target: Target) -> bool:
    """Whether the reference classifier can be trained and is not trained yet."""
    can_train = target.plain_classifier is None and target.config is not None and bool(target.classes)
    is_trained = plan.storage.exists(f"{REFERENCE_CLASSIFIER}/summary.json")
    return can_train and plan.suite.reference_epochs != 0 and not is_trained


def reference_config(plan: AttackPlan, target: Target) -> Config:
    """The configuration of the reference classifier, which has the target's architecture."""
    return plain_config(plan, target, required(target.config).classifier)


def plain_config(plan: AttackPlan, target: Target, classifier: MethodConfig) -> Config:
    """The configuration of a classifier of plain images, with the target's data and optimizer.

    It trains as many epochs as the suite states; null stands for those of the target's training.
    """
    config, epochs = required(target.config), plan.suite.reference_epochs
    if epochs is None:
        epochs = cloud_epochs(config)
    tree = config.model_dump(mode="json")
    tree |= {"protection": {"name": "plain"}, "adaptation": "auto", "seed": plan.suite.seed}
    tree["classifier"] = classifier.model_dump(mode="json")
    tree["train"] |= {"mode": "plain", "epochs": epochs, "plain_epochs": None}
    is_multistep = tree["train"]["schedule"]["name"] == "multistep"
    if is_multistep and epochs != config.train.epochs:  # the milestones are those of another length
        tree["train"]["schedule"] = {"name": "one_cycle"}
    tree["data"] |= {"stream": False}
    tree["cluster"] |= {"storage": plan.storage.uri}
    return Config.model_validate(tree)


def load_reference_classifier(plan: AttackPlan, target: Target) -> nn.Module | None:
    """The target's plain classifier or the one trained for this run; None if there is neither."""
    if target.plain_classifier is not None:
        return target.plain_classifier
    folder = plan.storage.folder(REFERENCE_CLASSIFIER)
    if not folder.exists("summary.json"):
        return None
    return load_private(folder.folder("bundle").uri).classifier.to(target.plain.device)
