"""One trial: a training run and its proxy leakage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from raypp.attacks import ATTACKS
from raypp.attacks.base import AttackerKnowledge, TrainedAttack
from raypp.attacks.target import Target
from raypp.bundle.load import load_public
from raypp.config.schema import Config
from raypp.data.base import stratified_split
from raypp.data.splits import load_split, subsample
from raypp.evaluation.scorecard import aggregate, baselines, reidentification_rate, score_images
from raypp.experiments.search_records import TrialRecord, read_record
from raypp.experiments.search_settings import MOST_QUERIES, RESULT, TRIALS, Point, Search, SearchPlan, attack_options
from raypp.experiments.training_run import Run, open_run, summary
from raypp.training.optim import configure_torch
from raypp.training.reporter import LocalReporter
from raypp.training.trainer import Trainer
from raypp.utils.errors import ConfigError, NonRetryableError
from raypp.utils.progress import ProgressListener
from raypp.utils.storage import Storage

# One trial


class NullListener:
    """A display that shows nothing."""

    def note(self, message: str) -> None:
        """Nothing."""

    def step(self, info: dict[str, Any]) -> None:
        """Nothing."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def warn(self, message: str) -> None:
        """Nothing: a run's warnings are in its record."""

    def should_stop(self) -> bool:
        return False


class TrainTrial(Protocol):
    """Trains a run to its end and returns its summary."""

    def __call__(self, run: Run, display: Any) -> dict[str, Any]: ...


def run_trial(
    plan: SearchPlan,
    name: str,
    point: Point,
    display: ProgressListener,
    train: TrainTrial,
    leak: Callable[..., TrialRecord] | None = None,
) -> TrialRecord:
    """Train and attack one point of the space, from where it was stopped; returns and stores its record.

    What is wrong with the point itself (settings that do not go together, a loss that diverges) is a record too.

    Args:
        display: shows the training.
        leak: takes :func:`quick_leakage`'s place, to run it elsewhere.
    """
    folder = plan.storage.folder(f"{TRIALS}/{name}")
    if folder.exists(RESULT):
        return read_record(folder)
    began = time.monotonic()
    record: TrialRecord = {"trial": name, "settings": point, "status": "done", "explanation": ""}
    try:
        record |= _score(plan, name, point, display, train, leak or proxy_leakage)
    except (ConfigError, NonRetryableError) as error:
        word = "diverged" if "not a finite number" in str(error) else "not possible"
        record |= {"status": word, "explanation": str(error)}
    record["seconds"] = round(time.monotonic() - began, 1)
    folder.write(RESULT, (json.dumps(record, indent=2) + "\n").encode())
    return record


def _score(
    plan: SearchPlan,
    name: str,
    point: Point,
    display: ProgressListener,
    train: TrainTrial,
    leak: Callable[..., TrialRecord],
) -> TrialRecord:
    config = plan.config_at(point)
    run_folder = Storage(config.cluster.storage).folder(name)
    with open_run(config, name, resume=run_folder.exists("config.yaml")) as run:
        found = summary(run) or train(run, display)
        warnings = list(run.warnings)
    # The display is the training's: an attack's epochs are others.
    leakage = leak(run_folder.folder("bundle").uri, config, plan.search, run_folder.folder("leak"), NullListener())
    return {
        "accuracy": found["best"]["val_accuracy"],
        "test_accuracy": found["test"]["accuracy"],
        "test_interval": list(found["test"]["accuracy_interval"]),
        "epochs": sum(found["epochs"].values()),
        "warnings": warnings,
        **leakage,
    }


def proxy_leakage(
    bundle: str, config: Config, search: Search, folder: Storage, display: ProgressListener
) -> TrialRecord:
    """What a small inverse network recovers of validation images, none of which it or the protection learned from.

    Returns ``leakage``, the mean polarity-invariant SSIM to the originals; ``leakage_null``, that of the class mean;
    ``found``, the share of originals that are nearest to their reconstruction among all validation images.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    public = load_public(bundle)
    protection = public.protection.to(device)

    def protect(images: torch.Tensor) -> torch.Tensor:
        return protection.protect(images.to(device))

    full = load_split(config, "train")
    train_at, val_at = stratified_split(full.labels, config.data.num_val, config.seed)
    train = subsample(full.subset(train_at), config.data.num_train, config.seed, "data.num_train")
    if search.attack_images is not None:
        train = subsample(train, min(search.attack_images, len(train)), config.seed, "search.attack_images")
    val = full.subset(val_at)
    images, queries = (torch.from_numpy(part.images).permute(0, 3, 1, 2).contiguous() for part in (train, val))
    queries = queries[:MOST_QUERIES].to(device)
    labels = torch.from_numpy(val.labels).long().to(device)
    access = AttackerKnowledge(
        shape=(images.shape[1], images.shape[2], images.shape[3]),
        images=images,
        labels=torch.from_numpy(train.labels).long(),
        num_classes=len(full.classes),
        protect=protect,
        device=device,
    )
    gallery = torch.from_numpy(val.images).permute(0, 3, 1, 2).contiguous().to(device)
    victim = Target(
        name=bundle,
        label=config.protection.name,
        access=access,
        plain=queries,
        protected=torch.cat([protect(part) for part in queries.split(500)]),
        labels=labels[: len(queries)],
        gallery=gallery,
        gallery_labels=labels,
        truth=torch.arange(len(queries), device=device),
        classes=tuple(full.classes),
        config=config,
    )
    attack: TrainedAttack = ATTACKS.build(attack_options(search), access, seed=config.seed)
    task = attack.task()
    task.share(0, 1)
    configure_torch(task.train)
    done = Trainer(task, LocalReporter(folder, display, device)).run()
    attack.load(attack.state(done.trainee))
    scores = aggregate(score_images(attack.reconstruct(victim.protected), victim), config.seed)
    null = baselines(victim, config.seed)["class mean"]
    beside = aggregate(score_images(null, victim), config.seed)
    folder.delete("checkpoints")
    return {
        "leakage": scores["ssim_invariant"]["mean"],
        "leakage_interval": [scores["ssim_invariant"]["low"], scores["ssim_invariant"]["high"]],
        "leakage_baseline": beside["ssim_invariant"]["mean"],
        "reidentification_rate": reidentification_rate(scores),
        "psnr": scores["psnr"]["mean"],
        "num_queries": len(queries),
    }
