"""A search: which configurations are tried, how each is scored, and what is handed over in the end.

NAME/search.yaml          what was asked for
NAME/trials/TRIAL/        a training run each, leak/ with its quick attack, trial.json with its scores
NAME/trials.csv, .parquet every trial, rewritten whenever one ends
NAME/front.png, parallel.png, importance.png
NAME/best/                bundles of the best accuracy, the best privacy and the knee between them
NAME/attacks/, report/    the full attacks on them, and their report
NAME/search.json          written last
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from raypp import bundle as bundles
from raypp.attacks import ATTACKS
from raypp.attacks.base import Access, TrainedAttack
from raypp.attacks.target import Victim
from raypp.config import Config, Section, check_milestones, load_tree, merge, nest, sentence, validate
from raypp.data.base import stratified_split
from raypp.data.splits import limit, load_split
from raypp.evaluation.plotting import as_png, new_figure
from raypp.evaluation.scorecard import measure, nulls, share_found, summarise
from raypp.experiments.training_run import Run, checked_name, lock, open_run, refuse_foreign, stored, summary
from raypp.training.protection_task import check_features
from raypp.training.reporter import LocalSink
from raypp.training.trainer import Loop, set_up_torch
from raypp.utils.errors import ConfigError, RayppError, StoppedError, StorageError
from raypp.utils.progress import Shows
from raypp.utils.storage import Storage

FILE, TRIALS, RESULT, SUMMARY = "search.yaml", "trials", "trial.json", "search.json"
BASELINE = "plain"  # the run whose accuracy a constraint may name
WORST_LEAKAGE = 1.0  # what the sampler is told of a trial that was stopped before it was attacked
MOST_QUERIES = 1000
MID_TRAINING = ("train.optimizer.lr",)
"""Settings that population based training may change while a trial runs: others lie in the optimiser's state, or change
the loss that epochs are compared by."""

Record = dict[str, Any]
Point = dict[str, Any]


class Range(Section):
    """Numbers from ``low`` to ``high``; whole ones where both are."""

    low: int | float
    high: int | float
    log: bool = False
    """Draw uniformly on a logarithmic scale."""

    @model_validator(mode="after")
    def _not_empty(self) -> Range:
        if not self.low < self.high:
            raise ValueError(
                f"low {self.low:g} and high {self.high:g} leave an empty range; low must be less than high"
            )
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low:g}; on a logarithmic scale it must be greater than 0")
        return self

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


def _space(value: Any) -> Any:
    """Flatten nested sections, and keep what describes values: a mapping with low and high, or a list of choices."""

    allowed = "allowed is a range {low, high, log} or a list of choices"

    def walk(node: Any, key: str) -> Iterator[tuple[str, Any]]:
        if node is None or isinstance(node, Range):  # null takes a setting of the preset's space out of it
            yield key, node
        elif isinstance(node, dict) and {"low", "high"} & set(node):
            try:
                yield key, Range.model_validate(node)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join((key, *map(str, first["loc"])))
                raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
        elif isinstance(node, dict) and node:
            for name, inner in node.items():
                yield from walk(inner, f"{key}.{name}" if key else str(name))
        elif isinstance(node, list | tuple) and node:
            yield key, tuple(node)
        else:
            raise ValueError(f"{key or 'it'} is {node!r}; {allowed}")

    if not isinstance(value, dict):
        return value
    return {key: node for key, node in dict(walk(value, "")).items() if node is not None}


def _least(value: Any) -> Any:
    """A share in [0, 1], or how far below plain images."""
    if value is None:
        return None
    words = "".join(str(value).split())
    share = words.removeprefix("plain-")
    try:
        if 0 <= float(share) <= 1:
            return float(share) if share == words else f"plain - {float(share)!r}"
    except ValueError:
        pass
    raise ValueError(f"{value!r} is not understood; allowed is a share from 0 to 1, or as in 'plain - 0.01'")


class Search(Section):
    """What is searched, how each trial is scored, and when the search ends."""

    space: Annotated[dict[str, Range | tuple[Any, ...]], BeforeValidator(_space)] = Field(min_length=1)
    """Settings to vary, as ``train.alpha: {low: 0.001, high: 0.1, log: true}`` or ``protection.width: [8, 16]``."""
    objective: Literal["both", "accuracy", "leakage"] = "both"
    """``both`` looks for the Pareto front of validation accuracy (after 8-bit rounding) and leakage."""
    min_accuracy: Annotated[float | str | None, BeforeValidator(_least)] = None
    """What a trial has to reach: a share such as 0.7, or ``plain - 0.01``: that much below plain images."""
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    """Optuna's; all three search for one objective or for both."""
    scheduler: Literal["none", "asha", "median", "pbt"] = "none"
    """Stops (``pbt``: redirects) trials by the accuracy of protected images. Privacy matures late: give it time."""
    grace_epochs: int = Field(2, ge=1)
    """Epochs, the plain phase's included, before the scheduler judges a trial."""
    num_trials: int = Field(20, ge=1)
    max_concurrent: int | None = Field(None, ge=1)
    """Trials at once; null takes as many as the cluster has room for at the start. Give it for one that grows."""
    max_minutes: float | None = Field(None, gt=0)
    """Start no trial and stop those that run after so many minutes; null sets no limit."""
    patience: int | None = Field(None, ge=1)
    """End after so many finished trials in a row that did not improve front or objective; null never does."""
    attack: dict[str, Any] = Field(
        default_factory=lambda: {"width": 16, "depth": 2, "patch": 2, "train": {"epochs": 2}}
    )
    """Options of the ``inverse`` attack that measures leakage in every trial."""
    attack_images: int | None = Field(None, ge=40)
    """Images that this attack learns from; null gives it the training images."""
    suite: str | None = "small"
    """Attack suite against the bundles that are handed over; null leaves them as they are."""
    num_attacked: int = Field(3, ge=0)
    """Bundles to attack with it: best accuracy, best privacy and knee, then others of the front."""
    gpus_per_trial: float = Field(1, gt=0, le=1)
    """Of a trial of one worker, where the cluster has GPUs; less than 1 packs several on one."""

    @model_validator(mode="after")
    def _fits_together(self) -> Search:
        if self.scheduler == "pbt":
            if self.objective != "accuracy":
                raise ValueError("scheduler 'pbt' passes on what is read best; set objective to 'accuracy'")
            for key, values in self.space.items():
                if key not in MID_TRAINING or not isinstance(values, Range):
                    raise ValueError(
                        f"scheduler 'pbt' changes settings while a trial runs, which {key} does not allow so; "
                        f"allowed in its space: a range of {', '.join(MID_TRAINING)}"
                    )
        return self

    @property
    def margin(self) -> float | None:
        """How far below plain images a trial may be, where ``min_accuracy`` says so."""
        return float(self.min_accuracy.partition("-")[2]) if isinstance(self.min_accuracy, str) else None


class _Root(Section):
    search: Search


@dataclass(frozen=True)
class Plan:
    """A preset's settings, a search over them, and the folder of what comes of it."""

    tree: dict[str, Any]
    search: Search
    storage: Storage

    @property
    def config(self) -> Config:
        """Of a trial, with everything that is not searched."""
        return self.config_at({})

    def config_at(self, point: Point) -> Config:
        """The configuration of one point of the space; raises ConfigError where its settings do not go together."""
        settings: dict[str, Any] = {"cluster": {"storage": self.storage.folder(TRIALS).uri}}
        for key, value in point.items():
            settings = merge(settings, nest(key.split("."), value))
        config = validate(merge(self.tree, settings))
        check_milestones(config.train, "train")
        return config

    def corners(self) -> list[Point]:
        """Each setting of the space at its ends or choices, all others as in the preset."""
        return [
            {key: value}
            for key, values in self.search.space.items()
            for value in ((values.low, values.high) if isinstance(values, Range) else values)
        ]

    def dump(self) -> dict[str, Any]:
        """As plain data, from which :func:`restore` makes it again in another process."""
        return {"settings": self.tree, "search": self.search.model_dump(mode="json"), "storage": self.storage.uri}


def restore(dumped: dict[str, Any]) -> Plan:
    """The plan that ``Plan.dump`` described."""
    return Plan(dumped["settings"], Search.model_validate(dumped["search"]), Storage(dumped["storage"]))


def make_plan(
    preset: str, file: str | None = None, flags: Sequence[str] = (), *, storage: str = "runs", name: str
) -> Plan:
    """Merge a preset, a file and flags, and check the search space at its ends and choices.

    Raises:
        ConfigError: one sentence about the first thing that is not allowed.
    """
    tree = load_tree(preset, file, flags, more=("search",))
    given = tree.pop("search", None)
    if given is None:
        raise ConfigError(
            f"preset {preset!r} has no section search; give one in a file (--config) or flags such as --search.space "
            "'{train.alpha: {low: 0.001, high: 0.1, log: true}}'"
        )
    search = validate_search(given)
    base = validate(tree)  # before the space, whose faults are then its own
    check_milestones(base.train, "train")
    plan = Plan(base.model_dump(mode="json"), search, Storage(storage).folder(checked_name(name)))
    for point in plan.corners():
        try:
            plan.config_at(point)
        except ConfigError as error:
            raise ConfigError(f"search.space.{next(iter(point))}: {error}") from None
    if base.data.stream:
        raise ConfigError("data.stream is True; a search holds its images in memory, for the attack in every trial")
    if search.scheduler == "pbt" and (base.cluster.num_workers or 1) > 1:
        raise ConfigError("search.scheduler 'pbt' needs trials of one worker; leave cluster.num_workers out")
    return plan


def validate_search(tree: Any) -> Search:
    """Validate a ``search`` section; raises ConfigError with one sentence for the first thing that is wrong."""
    if not isinstance(tree, dict):
        raise ConfigError(f"search is {tree!r}; allowed is a mapping of its settings")
    try:
        search = _Root.model_validate({"search": tree}).search
    except ValidationError as error:
        raise ConfigError(sentence(error, {"search": tree}, root=_Root)) from None
    try:
        check_milestones(attack_options(search).train, "search.attack.train")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(("search.attack", *map(str, first["loc"])))
        raise ConfigError(f"{where} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    return search


def attack_options(search: Search) -> Any:
    """Options of the quick attack."""
    return ATTACKS.options("inverse").model_validate({"name": "inverse", **search.attack})


@contextmanager
def open_search(plan: Plan, *, resume: bool) -> Iterator[bool]:
    """Hold a search's folder, a new one or with ``resume`` one of the same settings; gives whether it had begun.

    Raises:
        StorageError: it exists already, or with ``resume`` does not, or was asked for other things.
    """
    storage = plan.storage
    if not storage.exists(FILE):
        if resume:
            raise StorageError(f"{storage.uri} is no search to resume; leave out --resume to start it")
        refuse_foreign(storage, "a search")
    if not storage.exists(SUMMARY):
        check_features(plan.config_at(point) for point in ({}, *plan.corners()))
    storage.create()
    with lock(storage, f"the search {storage.uri}"):
        begun = storage.exists(FILE)
        if begun and not resume:
            raise StorageError(f"{storage.uri} exists already; --resume continues it, another --name starts anew")
        now = plan.dump()
        if begun:
            before = stored(storage, FILE, "settings", "search")
            with contextlib.suppress(ConfigError):  # settings that have come since then have their default
                before["settings"] = validate(before["settings"]).model_dump(mode="json")
            # A run that has begun keeps its feature network, so that this may change.
            before["settings"], now["settings"] = map(_without_fallback, (before["settings"], now["settings"]))
            for part in ("settings", "search"):
                for key in sorted({*before[part], *now[part]}):
                    if key != "cluster" and before[part].get(key) != now[part].get(key):
                        name = key if part == "settings" else f"search.{key}"
                        raise StorageError(
                            f"{storage.uri} was started with another {name}; resume it with the same, or take another "
                            "--name"
                        )
        else:
            storage.write(FILE, yaml.safe_dump(now, sort_keys=False).encode())
        yield begun


def _without_fallback(settings: dict[str, Any]) -> dict[str, Any]:
    features = {key: value for key, value in settings["features"].items() if key != "fallback"}
    return settings | {"features": features}


# One trial


class Silent:
    """A display that shows nothing."""

    def note(self, message: str) -> None:
        """Nothing."""

    def step(self, info: dict[str, Any]) -> None:
        """Nothing."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def warn(self, message: str) -> None:
        """Nothing: a run's warnings are in its record."""

    def told_to_stop(self) -> bool:
        return False


class TrainsTrial(Protocol):
    """Trains a run to its end and returns its summary."""

    def __call__(self, run: Run, display: Any) -> dict[str, Any]: ...


def run_trial(
    plan: Plan, name: str, point: Point, display: Shows, train: TrainsTrial, leak: Callable[..., Record] | None = None
) -> Record:
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
    record: Record = {"trial": name, "settings": point, "status": "done", "explanation": ""}
    try:
        record |= _score(plan, name, point, display, train, leak or quick_leakage)
    except (ConfigError, StoppedError) as error:
        word = "diverged" if "not a finite number" in str(error) else "not possible"
        record |= {"status": word, "explanation": str(error)}
    record["seconds"] = round(time.monotonic() - began, 1)
    folder.write(RESULT, (json.dumps(record, indent=2) + "\n").encode())
    return record


def read_record(folder: Storage) -> Record:
    """What :func:`run_trial` stored; raises StorageError where it is damaged."""
    try:
        found: Record = json.loads(folder.read(RESULT))
    except ValueError as error:
        raise StorageError(f"{folder.uri}/{RESULT} is damaged: {error}") from error
    return found


def _score(
    plan: Plan, name: str, point: Point, display: Shows, train: TrainsTrial, leak: Callable[..., Record]
) -> Record:
    config = plan.config_at(point)
    run_folder = Storage(config.cluster.storage).folder(name)
    with open_run(config, name, resume=run_folder.exists("config.yaml")) as run:
        found = summary(run) or train(run, display)
        warnings = list(run.warnings)
    # The display is the training's: an attack's epochs are others.
    leakage = leak(run_folder.folder("bundle").uri, config, plan.search, run_folder.folder("leak"), Silent())
    return {
        "accuracy": found["best"]["val_accuracy"],
        "test_accuracy": found["test"]["accuracy"],
        "test_interval": list(found["test"]["accuracy_interval"]),
        "epochs": sum(found["epochs"].values()),
        "warnings": warnings,
        **leakage,
    }


def quick_leakage(bundle: str, config: Config, search: Search, folder: Storage, display: Shows) -> Record:
    """What a small inverse network recovers of validation images, none of which it or the protection learned from.

    Returns ``leakage``, the mean polarity-invariant SSIM to the originals; ``leakage_null``, that of the class mean;
    ``found``, the share of originals that are nearest to their reconstruction among all validation images.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    public = bundles.load_public(bundle)
    protection = public.protection.to(device)

    def protect(images: torch.Tensor) -> torch.Tensor:
        return protection.protect(images.to(device))

    full = load_split(config, "train")
    train_at, val_at = stratified_split(full.labels, config.data.num_val, config.seed)
    train = limit(full.subset(train_at), config.data.num_train, config.seed, "data.num_train")
    if search.attack_images is not None:
        train = limit(train, min(search.attack_images, len(train)), config.seed, "search.attack_images")
    val = full.subset(val_at)
    images, queries = (torch.from_numpy(part.images).permute(0, 3, 1, 2).contiguous() for part in (train, val))
    queries = queries[:MOST_QUERIES].to(device)
    labels = torch.from_numpy(val.labels).long().to(device)
    access = Access(
        shape=(images.shape[1], images.shape[2], images.shape[3]),
        images=images,
        labels=torch.from_numpy(train.labels).long(),
        num_classes=len(full.classes),
        protect=protect,
        device=device,
    )
    gallery = torch.from_numpy(val.images).permute(0, 3, 1, 2).contiguous().to(device)
    victim = Victim(
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
    set_up_torch(task.train)
    done = Loop(task, LocalSink(folder, display, device)).run()
    attack.load(attack.state(done.trainee))
    scores = summarise(measure(attack.reconstruct(victim.protected), victim), config.seed)
    null = nulls(victim, config.seed)["class mean"]
    beside = summarise(measure(null, victim), config.seed)
    folder.delete("checkpoints")
    return {
        "leakage": scores["ssim_invariant"]["mean"],
        "leakage_interval": [scores["ssim_invariant"]["low"], scores["ssim_invariant"]["high"]],
        "leakage_null": beside["ssim_invariant"]["mean"],
        "found": share_found(scores),
        "psnr": scores["psnr"]["mean"],
        "num_queries": len(queries),
    }


# All of them


def feasible(record: Record, least: float | None) -> bool:
    """Whether a trial has reached its end and the accuracy that is asked for."""
    return record["status"] == "done" and (least is None or record["accuracy"] >= least)


def objectives(accuracy: float, leakage: float, search: Search, least: float | None) -> dict[str, float]:
    """What the sampler is told. Trials that miss the constraint are worse than all that keep it, by how far they miss.

    Source: the feasibility rules of Deb 2000, "An efficient constraint handling method for genetic algorithms".
    """
    missing = max(0.0, least - accuracy) if least is not None else 0.0
    told_leakage = WORST_LEAKAGE + missing if missing else leakage
    score = accuracy if search.objective == "accuracy" else -told_leakage
    return {"told_accuracy": accuracy, "told_leakage": told_leakage, "told_score": score}


def pareto(records: Sequence[Record], least: float | None = None) -> list[Record]:
    """Finished trials that no other one equals or beats in both accuracy and leakage; by accuracy, highest first."""
    front: list[Record] = []
    done = [r for r in records if feasible(r, least)]
    for record in sorted(done, key=lambda r: (-r["accuracy"], r["leakage"])):
        if not front or record["leakage"] < front[-1]["leakage"]:
            front.append(record)
    return front


def hypervolume(records: Sequence[Record], least: float | None = None) -> float:
    """Area between the front and the worst corner, accuracy 0 and leakage 1; in [0, 1]."""
    area, before = 0.0, WORST_LEAKAGE
    for record in pareto(records, least):
        leakage = max(0.0, record["leakage"])
        area += record["accuracy"] * max(0.0, before - leakage)
        before = min(before, leakage)
    return area


def knee(front: Sequence[Record]) -> Record:
    """The point between a front's ends that is farthest out from their line, both objectives scaled to [0, 1]."""
    if len(front) < 3:
        return front[0]
    points = np.array([[r["accuracy"], -r["leakage"]] for r in front])
    scaled = (points - points.min(0)) / np.ptp(points, axis=0)
    # Its ends lie at (1, 0) and (0, 1): the distance from their line is x + y - 1, up to a factor.
    inner = scaled[1:-1].sum(axis=1)
    return front[1 + int(np.argmax(inner))]


def chosen(records: Sequence[Record], search: Search, least: float | None) -> dict[str, Record]:
    """What is handed over, by its name below ``best/``."""
    front = pareto(records, least)
    if not front:
        return {}
    if search.objective == "accuracy":
        return {"accuracy": front[0]}
    if search.objective == "leakage":
        return {"privacy": front[-1]}
    return {"accuracy": front[0], "privacy": front[-1], "knee": knee(front)}


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's, of at least three pairs that are not all tied; else None."""
    if len(pairs) < 3:
        return None
    ranks = [np.array([sum(y < x for y in column) + sum(y == x for y in column) / 2 for x in column])
             for column in zip(*pairs, strict=True)]  # fmt: skip
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(np.stack(ranks))[0, 1])


def records_of(plan: Plan) -> list[Record]:
    """Stored records of a search's trials, in the order of their names."""
    folder = plan.storage.folder(TRIALS)
    return [read_record(folder.folder(name)) for name in folder.folders() if folder.folder(name).exists(RESULT)]


COLUMNS = ("trial", "status", "accuracy", "leakage", "leakage_null", "found", "psnr", "test_accuracy", "epochs",
           "seconds", "on_front", "explanation")  # fmt: skip


def write_table(storage: Storage, records: Sequence[Record], least: float | None) -> None:
    """Write ``trials.csv`` and ``trials.parquet``, a row per trial."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    front = {record["trial"] for record in pareto(records, least)}
    keys = sorted({key for record in records for key in record["settings"]})
    rows = [
        {name: record.get(name) for name in COLUMNS}
        | {"on_front": record["trial"] in front}
        | {key: label(record["settings"].get(key)) for key in keys}
        for record in records
    ]
    if not rows:
        return
    table = pa.table({name: _column([row[name] for row in rows]) for name in rows[0]})
    for name, write in (("trials.csv", pyarrow.csv.write_csv), ("trials.parquet", pyarrow.parquet.write_table)):
        file = io.BytesIO()
        write(table, file)
        storage.write(name, file.getvalue())


def _column(values: list[Any]) -> list[Any]:
    """Values of one type: of choices of several kinds their text."""
    kinds = {bool if isinstance(v, bool) else float if isinstance(v, int | float) else type(v)
             for v in values if v is not None}  # fmt: skip
    if kinds == {float}:
        return [None if v is None else float(v) for v in values]
    return values if len(kinds) <= 1 else [None if v is None else str(v) for v in values]


def label(value: Any) -> Any:
    """A setting's value as a scalar: a mapping as ``one_cycle (warmup 0.25)``, a list as its JSON."""
    if isinstance(value, dict) and "name" in value:
        rest = ", ".join(f"{key} {json.dumps(inner)}" for key, inner in value.items() if key != "name")
        return f"{value['name']} ({rest})" if rest else value["name"]
    return json.dumps(value) if isinstance(value, dict | list | tuple) else value


# Pictures


def front_figure(searches: dict[str, Sequence[Record]], least: float | None = None) -> bytes:
    """Leakage against accuracy of every finished trial, with the front of each search, as a PNG."""
    canvas, panel = _panel(7.2, 5.0)
    colours = ("#1f6fb2", "#d1602b", "#3a8f4f", "#8a5fb0")
    null = [r["leakage_null"] for records in searches.values() for r in records if r["status"] == "done"]
    for (name, records), colour in zip(searches.items(), colours, strict=False):
        done = [r for r in records if r["status"] == "done"]
        missed = [r for r in done if not feasible(r, least)]
        front = pareto(records, least)
        kept = [r for r in done if r not in missed]
        panel.plot([100 * r["accuracy"] for r in kept], [r["leakage"] for r in kept], "o", color=colour, alpha=0.4)
        panel.plot([100 * r["accuracy"] for r in missed], [r["leakage"] for r in missed], "x", color=colour, alpha=0.4)
        panel.step(
            [100 * r["accuracy"] for r in front],
            [r["leakage"] for r in front],
            "o-",
            where="post",  # with so much accuracy no trial leaks less
            color=colour,
            label=f"{name}: front of {len(front)} among {len(done)} trials",
        )
    if null:
        panel.axhline(float(np.mean(null)), color="#555555", ls=":", lw=1.2, label="class mean (null)")
    if least is not None:
        panel.axvline(100 * least, color="#555555", ls="--", lw=1.2, label=f"least accuracy, {least:.1%}")
    panel.set_xlabel("validation accuracy after 8-bit rounding, % (better to the right)")
    panel.set_ylabel("leakage: SSIM of the quick attack (better below)")
    panel.legend(frameon=False, fontsize=8)
    return as_png(canvas)


def parallel_figure(records: Sequence[Record], least: float | None = None) -> bytes | None:
    """Every finished trial as a line through its settings and scores; those of the front are drawn in colour."""
    done = [r for r in records if r["status"] == "done"]
    if not done:
        return None
    keys = sorted({key for r in done for key in r["settings"]})
    axes = [*keys, "accuracy", "leakage"]
    columns = {key: [label(r["settings"].get(key)) for r in done] for key in keys}
    columns |= {key: [r[key] for r in done] for key in ("accuracy", "leakage")}
    canvas, panel = _panel(2.2 + 1.5 * len(axes), 4.6)
    heights = []
    for x, key in enumerate(axes):
        values = columns[key]
        numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if numeric:
            low, high = float(min(values)), float(max(values))
            logarithmic = low > 0 and high / low >= 20
            at = [math.log(v) if logarithmic else float(v) for v in values]
            ends = (math.log(low), math.log(high)) if logarithmic else (low, high)
            ticks = {0.0: f"{low:.3g}", 1.0: f"{high:.3g}"}
        else:
            kinds = sorted({str(v) for v in values})
            at, ends = [float(kinds.index(str(v))) for v in values], (0.0, float(len(kinds) - 1))
            ticks = {i / max(1, len(kinds) - 1): kind[:24] for i, kind in enumerate(kinds)}
        span = ends[1] - ends[0]
        heights.append([(v - ends[0]) / span if span else 0.5 for v in at])
        panel.axvline(x, color="#bbbbbb", lw=1, zorder=0)
        for y, text in ticks.items():
            panel.text(x, y, f" {text}", fontsize=7, va="bottom" if y < 1 else "top", color="#333333")
    front = {r["trial"] for r in pareto(records, least)}
    for i, record in enumerate(done):
        best = record["trial"] in front
        panel.plot(range(len(axes)), [column[i] for column in heights], color="#1f6fb2" if best else "#c9c9c9",
                   lw=1.8 if best else 0.9, zorder=2 if best else 1)  # fmt: skip
    panel.set_xticks(range(len(axes)), [key.replace(".", ".\n") for key in axes], fontsize=8)
    panel.set_yticks([])
    panel.set_xlim(-0.3, len(axes) - 0.3)
    panel.set_title("trials through their settings and scores; blue: on the front", fontsize=10)
    return as_png(canvas)


def importance_figure(records: Sequence[Record], search: Search) -> bytes | None:
    """How much each setting says about accuracy and leakage; None for fewer than six finished trials.

    Source: fANOVA, Hutter, Hoos, Leyton-Brown 2014, as Optuna has it.
    """
    import optuna
    from optuna.importance import FanovaImportanceEvaluator

    done = [r for r in records if r["status"] == "done"]
    if len(done) < 6:
        return None
    spaces = {key: distribution(values) for key, values in search.space.items()}
    found = {}
    for what in ("accuracy", "leakage"):
        study = optuna.create_study(direction="maximize" if what == "accuracy" else "minimize")
        for r in done:
            params = {key: label(r["settings"][key]) for key in spaces}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=r[what]))
        try:
            shares = optuna.importance.get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
        except (ValueError, RuntimeError):  # of values that are all alike nothing can be said
            continue
        found[what] = shares
    if not found:
        return None
    keys = sorted(spaces, key=lambda key: sum(shares.get(key, 0) for shares in found.values()))
    canvas, panel = _panel(7.0, 1.6 + 0.5 * len(keys))
    for shift, (what, colour) in zip((0.18, -0.18), (("accuracy", "#1f6fb2"), ("leakage", "#d1602b")), strict=True):
        if what in found:
            values = [found[what].get(key, 0.0) for key in keys]
            panel.barh([y + shift for y in range(len(keys))], values, height=0.34, color=colour, label=what)
    panel.set_yticks(range(len(keys)), keys)
    panel.set_xlabel("importance (fANOVA), shares of 1")
    panel.legend(frameon=False)
    return as_png(canvas)


def distribution(values: Range | tuple[Any, ...]) -> Any:
    from optuna import distributions

    if isinstance(values, tuple):
        return distributions.CategoricalDistribution([label(value) for value in values])
    if values.whole:
        return distributions.IntDistribution(int(values.low), int(values.high), log=values.log)
    return distributions.FloatDistribution(float(values.low), float(values.high), log=values.log)


def _panel(width: float, height: float) -> tuple[Any, Any]:
    canvas = new_figure(width, height)
    panel = canvas.subplots()
    panel.spines[["top", "right"]].set_visible(False)
    return canvas, panel


# The end


def hand_over(
    plan: Plan, records: Sequence[Record], least: float | None, attack: Callable[[str, str, str], dict[str, Any]]
) -> dict[str, Any]:
    """Attack and copy the best bundles, draw the pictures, and write the search's summary; returns it.

    Args:
        least: the accuracy that is asked for, or None.
        attack: runs a suite against a bundle under a name, and returns its scorecard.
    """
    from raypp.evaluation.report import write_report

    storage, search = plan.storage, plan.search
    write_table(storage, records, least)
    storage.write("front.png", front_figure({"search": records}, least))
    for name, picture in (
        ("parallel.png", parallel_figure(records, least)),
        ("importance.png", importance_figure(records, search)),
    ):
        if picture is not None:
            storage.write(name, picture)
    best, front = chosen(records, search, least), pareto(records, least)
    scorecards: dict[str, Any] = {}
    pairs = []
    if search.suite is not None:
        wanted = list({r["trial"]: r for r in [*best.values(), *front]}.values())[: search.num_attacked]
        for record in wanted:
            card = attack(_bundle(plan, record), search.suite, record["trial"])
            kept = ("found", "verdict", "worst_attack", "found_by_drawing")
            scorecards[record["trial"]] = {key: card[key] for key in kept}
            strong = card["attacks"].get("inverse", {})
            if strong.get("status") == "done":
                scorecards[record["trial"]]["inverse_ssim"] = strong["scores"]["ssim_invariant"]["mean"]
                pairs.append((record["leakage"], strong["scores"]["ssim_invariant"]["mean"]))
        if scorecards:
            write_report([storage.folder(f"attacks/{trial}").uri for trial in scorecards], storage.folder("report"))
    for name, record in best.items():
        with Storage(_bundle(plan, record)).download("") as folder:
            storage.upload(folder, f"best/{name}", last=bundles.MANIFEST)
    found = {
        "trials": {word: sum(r["status"] == word for r in records) for word in sorted({r["status"] for r in records})},
        "least_accuracy": least,
        "front": [{key: r[key] for key in ("trial", "settings", "accuracy", "leakage", "found")} for r in front],
        "hypervolume": hypervolume(records, least),
        "best": {name: record["trial"] for name, record in best.items()},
        "scorecards": scorecards,
        "rank_correlation": rank_correlation(pairs),
        "num_compared": len(pairs),
    }
    storage.write(SUMMARY, (json.dumps(found, indent=2) + "\n").encode())
    return found


def _bundle(plan: Plan, record: Record) -> str:
    return plan.storage.folder(f"{TRIALS}/{record['trial']}/bundle").uri


def baseline_config(plan: Plan) -> Config:
    """A classifier of plain images, trained as the trials are."""
    tree = plan.config.model_dump(mode="json")
    tree |= {"protection": {"name": "plain"}, "adaptation": "auto"}
    tree["train"] |= {"mode": "plain"}
    tree["cluster"] |= {"storage": plan.storage.uri, "num_workers": None}
    return validate(tree)


def train_baseline(dumped: dict[str, Any], display: Shows) -> float:
    """Train the baseline as a run of its own, from where it was stopped; returns its validation accuracy."""
    from raypp.experiments.training_run import train_locally

    plan = restore(dumped)
    begun = plan.storage.exists(f"{BASELINE}/config.yaml")
    with open_run(baseline_config(plan), BASELINE, resume=begun) as run:
        found = summary(run) or train_locally(run, display)
    return float(found["best"]["val_accuracy"])


def least_accuracy(search: Search, plain: float | None) -> float | None:
    """The accuracy that trials have to reach, given that of plain images."""
    if search.margin is not None:
        if plain is None:
            raise RayppError("the baseline of search.min_accuracy has not been trained")
        return plain - search.margin
    return float(search.min_accuracy) if search.min_accuracy is not None else None
