"""One trial: a training run and its leakage, measured by the quick attack."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raypp.attacks import ATTACKS
from raypp.attacks.base import AttackerKnowledge, protect_in_batches
from raypp.attacks.target import Target
from raypp.attacks.trained import TrainedAttack, train_attack
from raypp.bundle.load import load_public
from raypp.config.schema import Config
from raypp.data.base import stratified_split
from raypp.data.splits import load_split, subsample
from raypp.evaluation.baselines import BASELINE_MATCHER, fitted_class_image
from raypp.evaluation.reidentification import select_matcher
from raypp.evaluation.scorecard import aggregate, score_images
from raypp.experiments.search import RESULT, TRIALS, Point, Search, SearchPlan, TrialRecord, attack_options, read_record
from raypp.experiments.training_run import Run, open_run, summary
from raypp.training.reporter import Reporter
from raypp.utils.device import default_device
from raypp.utils.documents import dump_json
from raypp.utils.errors import ConfigError, NonRetryableError
from raypp.utils.images import channels_first
from raypp.utils.progress import ProgressListener
from raypp.utils.storage import Storage

MAX_QUERIES = 1000  # validation images that the quick attack reconstructs


def run_trial(
    plan: SearchPlan,
    name: str,
    point: Point,
    display: ProgressListener,
    train: Callable[[Run, Any], dict[str, Any]],
    leak: Callable[..., TrialRecord] | None = None,
) -> TrialRecord:
    """Train and attack one point of the space, or resume it; returns and stores its record.

    Errors of the point itself (invalid settings, a loss that diverges) are stored in the record.

    Args:
        display: shows the training.
        train: trains a run to its end, reporting to the display, and returns its summary.
        leak: replaces :func:`proxy_leakage`, to run it in another process.
    """
    folder = plan.storage.folder(f"{TRIALS}/{name}")
    if folder.exists(RESULT):
        return read_record(folder)
    start = time.monotonic()
    record: TrialRecord = {"trial": name, "settings": point, "status": "done", "explanation": ""}
    try:
        config = plan.config_at(point)
        with open_run(config, name, resume=folder.exists("config.yaml")) as run:
            results = summary(run) or train(run, display)
        # The display shows the epochs of the training, so the attack must not report to it.
        measure = leak or proxy_leakage
        leakage = measure(folder.folder("bundle").uri, config, plan.search, folder.folder("leak"), ProgressListener())
        record |= {
            "accuracy": results["best"]["val_accuracy"],
            "test_accuracy": results["test"]["accuracy"],
            "test_interval": list(results["test"]["accuracy_interval"]),
            "epochs": sum(results["epochs"].values()),
            "warnings": list(run.warnings),
            **leakage,
        }
    except (ConfigError, NonRetryableError) as error:
        status = "diverged" if "not a finite number" in str(error) else "not possible"
        record |= {"status": status, "explanation": str(error)}
    record["seconds"] = round(time.monotonic() - start, 1)
    folder.write(RESULT, dump_json(record))
    return record


def proxy_leakage(
    bundle: str, config: Config, search: Search, folder: Storage, display: ProgressListener
) -> TrialRecord:
    """Measure what a small inverse network recovers of validation images.

    Neither the network nor the protection has learned from these images.

    Returns:
        ``leakage``, the mean polarity-invariant SSIM to the originals; ``leakage_baseline``, that of the image
        fitted to the class; ``reidentification_rate``, the share of originals nearest to their reconstruction among all
        validation images, by ``matcher``.
    """
    target = _validation_target(bundle, config, search)
    attack: TrainedAttack = ATTACKS.build(attack_options(search), target.access, seed=config.seed)
    network, _ = train_attack(attack, Reporter(folder, display, target.access.device))
    attack.load(network)
    matcher = select_matcher(attack, target).matcher
    estimates = attack.reconstruct(target.protected)
    values = score_images(estimates, target, matcher=matcher, all_matchers=False)
    scores = aggregate(values, len(target.gallery), config.seed)
    class_image = fitted_class_image(target, config.seed)
    blind = score_images(class_image, target, matcher=BASELINE_MATCHER, all_matchers=False)
    folder.delete("checkpoints")
    return {
        "leakage": scores["ssim_invariant"]["mean"],
        "leakage_interval": [scores["ssim_invariant"]["low"], scores["ssim_invariant"]["high"]],
        "leakage_baseline": round(float(blind["ssim_invariant"].double().mean()), 5),
        "reidentification_rate": scores["reidentified"]["mean"],
        "matcher": matcher,
        "psnr": scores["psnr"]["mean"],
        "num_queries": len(target.plain),
    }


def _validation_target(bundle: str, config: Config, search: Search) -> Target:
    """A bundle with validation images as queries; the attacker has the training images and can protect images."""
    device = default_device(config.cluster.gpu)
    protection = load_public(bundle).protection.to(device)

    def protect(images: Tensor) -> Tensor:
        return protection.protect(images.to(device))

    full = load_split(config, "train")
    train_indices, val_indices = stratified_split(full.labels, config.data.num_val, config.seed)
    train = subsample(full.subset(train_indices), config.data.num_train, config.seed, "data.num_train")
    if search.attack_images is not None:
        train = subsample(train, min(search.attack_images, len(train)), config.seed, "search.attack_images")
    val = full.subset(val_indices)
    images = channels_first(train.images)
    gallery = channels_first(val.images).to(device)
    labels = torch.from_numpy(val.labels).long().to(device)
    queries = gallery[:MAX_QUERIES]
    access = AttackerKnowledge(
        shape=(images.shape[1], images.shape[2], images.shape[3]),
        images=images,
        labels=torch.from_numpy(train.labels).long(),
        num_classes=len(full.classes),
        protect=protect,
        device=device,
    )
    return Target(
        name=bundle,
        label=config.protection.name,
        access=access,
        plain=queries,
        protected=protect_in_batches(protect, queries),
        labels=labels[: len(queries)],
        gallery=gallery,
        gallery_labels=labels,
        truth=torch.arange(len(queries), device=device),
        classes=tuple(full.classes),
        config=config,
    )
