"""The plain classifier that reads reconstructions, trained where the target brings none."""

from __future__ import annotations

from torch import nn

from raypp.attacks.target import Target
from raypp.bundle.load import load_private
from raypp.config.schema import Config
from raypp.experiments.attack_plan import REFERENCE_CLASSIFIER, AttackPlan
from raypp.experiments.training_run import open_run, train_locally
from raypp.utils.progress import ProgressListener

# The judge: a plain classifier that has nothing to do with the victim


def needs_reference_classifier(plan: AttackPlan, victim: Target) -> bool:
    """Whether a plain classifier has still to be trained."""
    possible = victim.plain_classifier is None and victim.config is not None and bool(victim.classes)
    return (
        possible and plan.suite.reference_epochs > 0 and not plan.storage.exists(f"{REFERENCE_CLASSIFIER}/summary.json")
    )


def reference_classifier_config(plan: AttackPlan, victim: Target) -> Config:
    """How the plain classifier is trained: on the victim's data, as its classifier was, for the suite's epochs."""
    assert victim.config is not None
    tree = victim.config.model_dump(mode="json")
    tree |= {"protection": {"name": "plain"}, "adaptation": "auto", "seed": plan.suite.seed}
    tree["train"] |= {"mode": "plain", "epochs": plan.suite.reference_epochs, "plain_epochs": None}
    if tree["train"]["schedule"]["name"] == "multistep":
        tree["train"]["schedule"] = {"name": "one_cycle"}
    tree["data"] |= {"stream": False}
    tree["cluster"] |= {"storage": plan.storage.uri}
    return Config.model_validate(tree)


def train_reference_classifier(plan: AttackPlan, victim: Target, display: ProgressListener) -> None:
    """Train the plain classifier as a run of its own, from where it was stopped."""
    config = reference_classifier_config(plan, victim)
    begun = plan.storage.exists(f"{REFERENCE_CLASSIFIER}/config.yaml")
    with open_run(config, REFERENCE_CLASSIFIER, resume=begun) as run:
        train_locally(run, display, victim.access.device)


def load_reference_classifier(plan: AttackPlan, victim: Target) -> nn.Module | None:
    """The plain classifier, or None where there is none."""
    if victim.plain_classifier is not None:
        return victim.plain_classifier
    folder = plan.storage.folder(REFERENCE_CLASSIFIER)
    if not folder.exists("summary.json"):
        return None
    return load_private(folder.folder("bundle").uri).classifier.to(victim.plain.device)
