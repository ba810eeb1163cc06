"""Schema of the configuration; :mod:`raypp.config.presets` merges and validates it.

Presets hold the paper's numbers. The validated tree is frozen; each run and bundle stores it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializeAsAny,
    ValidationInfo,
    model_validator,
)

from raypp.data import SOURCES
from raypp.models import ADAPTATIONS, BLOCK, CLASSIFIERS, FEATURES
from raypp.protections import PROTECTIONS
from raypp.utils.errors import ConfigError
from raypp.utils.paths import PathOrUri
from raypp.utils.registry import MethodConfig, Registry, suggest

REGISTRIES = {"source": SOURCES, "protection": PROTECTIONS, "classifier": CLASSIFIERS, "features": FEATURES}
"""Registry of each section that selects a method by ``name``."""
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Side = Annotated[int, Field(ge=1)]


def _select(registry: Registry) -> BeforeValidator:
    """Validate a section with the options model that its ``name`` selects in ``registry``."""

    def validate(value: Any) -> Any:
        if isinstance(value, MethodConfig):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or "name" not in value:
            raise ValueError(f"a {registry.kind} needs a name; allowed: {', '.join(registry)}")
        try:
            model = registry.options(str(value["name"]))
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return model.model_validate(value)

    return BeforeValidator(validate)


def _to_int(value: Any) -> Any:
    """Convert a flag's text to an integer, which Literal does not."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


def _split_size(value: Any) -> Any:
    """Split ``32,32`` or ``32x32`` into two numbers."""
    return re.split("[,x]", value.replace(" ", "")) if isinstance(value, str) and re.search("[,x]", value) else value


class ConfigModel(BaseModel):
    model_config = MethodConfig.model_config


class AugmentConfig(ConfigModel):
    crop_padding: int = Field(4, ge=0, le=1024)
    """Pixels of zero padding before a random crop of the original size; 0 switches the crop off."""
    flip: bool = True
    """Mirror half of the images left to right."""


class Data(ConfigModel):
    source: Annotated[SerializeAsAny[MethodConfig], _select(SOURCES)]
    """Data source; ``raypp list sources`` lists the sources and their options."""
    image_size: Annotated[tuple[Side, Side] | None, BeforeValidator(_split_size)] = None
    """Height and width of all images after resizing and center cropping; null keeps their size."""
    channels: Annotated[Literal[1, 3], BeforeValidator(_to_int)] = 3
    """3 for RGB, 1 for gray."""
    num_val: int = Field(5000, ge=1)
    """Images held out of the training split for validation, stratified by class."""
    num_train: int | None = Field(None, ge=1)
    """Use only this many training images (after the validation split), stratified by class; null uses all."""
    num_test: int | None = Field(None, ge=1)
    """Use only this many test images; null uses all."""
    augment: AugmentConfig = AugmentConfig()
    stream: bool = False
    """Stream training images through Ray Data instead of holding them in memory; needs Ray Train."""
    shuffle_buffer: int = Field(10_000, ge=1)
    """Streaming only: images in each worker's local shuffle buffer."""
    stream_mib_per_worker: int = Field(512, ge=32)
    """Streaming only: MiB of blocks that Ray Data may hold in its object store for each worker. More memory lets more
    tasks decode at the same time."""


class Optimizer(ConfigModel):
    name: Literal["sgd", "adamw", "muon"] = "sgd"
    """``muon`` (Jordan et al. 2024) orthogonalizes the updates of weights with two or more dimensions. Its learning
    rates have the size of ``adamw``'s. It learns more per image and computes more per step."""
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD's and Muon's momentum; AdamW's first beta."""
    weight_decay: float = Field(5e-4, ge=0)


class Constant(ConfigModel):
    name: Literal["constant"] = "constant"


def scaled_milestones(milestones: Sequence[float], old_epochs: int, new_epochs: int) -> list[float]:
    """Scale milestones from ``old_epochs`` to ``new_epochs``."""
    return [_whole(round(milestone * new_epochs / old_epochs, 6)) for milestone in milestones]


def _whole(value: float) -> float:
    """Convert a whole number to an integer, which prints without a decimal point."""
    return int(value) if value == int(value) else value


PAPER_EPOCHS = 200  # of the default milestones
Milestone = Annotated[float, Field(ge=0), AfterValidator(_whole), PlainSerializer(_whole, return_type=Any)]


class MultiStep(ConfigModel):
    name: Literal["multistep"] = "multistep"
    milestones: tuple[Milestone, ...] = (60, 120, 160)
    """Epochs, counted from 0, after which the learning rate is multiplied by ``gamma``. They are scaled with the
    number of epochs, also for a phase of another length. The default is 30, 60 and 80% of the epochs."""
    gamma: float = Field(0.2, gt=0, le=1)


class LinearWarmupDecay(ConfigModel):
    name: Literal["one_cycle"] = "one_cycle"
    warmup: float = Field(0.2, ge=0, lt=1)
    """Share of all steps in which the learning rate rises linearly to ``lr``, before it falls linearly to ``final``."""
    final: float = Field(0.0, ge=0, le=1)
    """Learning rate after the last step, as a share of ``lr``."""


def _default_milestones(schedule: Any, info: ValidationInfo) -> Any:
    """Scale default milestones from the paper's number of epochs to the configured one."""
    epochs = info.data.get("epochs")
    if epochs is None or not isinstance(schedule, MultiStep) or "milestones" in schedule.model_fields_set:
        return schedule
    milestones = scaled_milestones(schedule.milestones, PAPER_EPOCHS, epochs)
    return MultiStep(milestones=tuple(milestones), gamma=schedule.gamma)


class OptimizationConfig(ConfigModel):
    """Training settings that runs and attacks share."""

    epochs: int = Field(200, ge=1, le=1_000_000)
    """Epochs of the main phase."""
    batch_size: int = Field(128, ge=2)
    """Images per step, over all workers."""
    eval_batch_size: int = Field(500, ge=1)
    """Images per evaluation step and worker."""
    optimizer: Optimizer = Optimizer()
    schedule: Annotated[
        MultiStep | LinearWarmupDecay | Constant,
        Field(discriminator="name", validate_default=True),
        AfterValidator(_default_milestones),
    ] = MultiStep()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``auto`` selects bf16 autocast on hardware with bf16 instructions."""
    channels_last: bool = True
    compile: bool = False
    """Use torch.compile; measure first whether it is faster."""
    sync_batchnorm: bool = False
    """Batch statistics over all workers, so that the number of workers does not change the result."""
    deterministic: bool = True
    """Use torch's deterministic algorithms."""
    adapt_threads: bool = True
    """CPU only: use fewer threads while other processes use the cores. Rounding depends on the number of threads;
    false fixes it, which makes runs reproducible bit by bit."""
    checkpoint_seconds: float | None = Field(300, gt=0)
    """Age of the last checkpoint at which another is written within an epoch; null writes them after epochs only."""


class Train(OptimizationConfig):
    mode: Literal["joint", "frozen", "plain"] = "joint"
    """``joint`` trains protection and classifier together. ``frozen`` trains the classifier on plain images, then the
    protection alone, as in Eq. 3 of the paper and in its authors' released code. ``plain`` trains the classifier alone,
    as a baseline."""
    alpha: float = Field(0.005, ge=0)
    """Weight of the feature distance in Eq. 4."""
    plain_epochs: int | None = Field(None, ge=1, le=1_000_000)
    """Epochs of the plain classifier, if the mode trains one first; null means ``epochs``."""


class Cluster(ConfigModel):
    num_workers: int | None = Field(None, ge=1)
    """Training workers; null takes one per GPU, else one per CPU, at most 8, and a divisor of the batch size."""
    min_workers: int | None = Field(None, ge=1)
    """Minimum number of workers: the run continues with fewer when nodes leave and grows to ``num_workers`` when nodes
    join. null always waits for ``num_workers``. If the workers do not divide the batch, steps use the next smaller
    batch size that they divide."""
    resize_seconds: float = Field(30, ge=0)
    """Seconds between checks whether a run with ``min_workers`` can grow. To grow, it restarts its workers from the
    newest checkpoint."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs that Ray reserves per worker; also its number of torch threads."""
    gpu: bool | None = None
    """One GPU per worker; true waits for the GPUs, null uses them if each worker can have one at the start."""
    max_failures: int = Field(3, ge=-1)
    """Restarts of the worker group from the last checkpoint before the run fails; -1 sets no limit, for long runs on
    nodes that come and go."""
    notice_seconds: float = Field(60, gt=0)
    """Seconds between messages that name the resources which a run waits for; the first comes after half of them."""
    storage: PathOrUri = Field("runs", validate_default=True)
    """Folder or pyarrow filesystem URI (s3://...) that holds the run folders."""

    @model_validator(mode="after")
    def _check_min_workers(self) -> Cluster:
        if self.min_workers is not None and self.min_workers > (self.num_workers or 0):
            raise ValueError(
                f"min_workers is {self.min_workers}; allowed is at most num_workers, which is "
                f"{'not set' if self.num_workers is None else self.num_workers}"
            )
        return self


class Metrics(ConfigModel):
    backend: Literal["torch", "skimage"] = "torch"
    """Implementation of PSNR and SSIM: ``torch`` computes batches, also on a GPU; ``skimage`` is scikit-image, the slow
    reference. They agree to 0.00001."""


class Config(ConfigModel):
    """Configuration of one run, frozen."""

    seed: Seed = 0
    """Seed of the data split, initial weights, batch order and augmentation."""
    data: Data
    protection: Annotated[SerializeAsAny[MethodConfig], _select(PROTECTIONS)]
    classifier: Annotated[SerializeAsAny[MethodConfig], _select(CLASSIFIERS)]
    adaptation: str = "auto"
    """Network between protected images and the classifier; ``auto`` uses the protection's default."""
    features: Annotated[SerializeAsAny[MethodConfig], _select(FEATURES)]
    train: Train = Train()
    metrics: Metrics = Metrics()
    cluster: Cluster = Field(default_factory=Cluster)  # not shared: its storage is relative to the current folder

    @model_validator(mode="after")
    def _check_sections(self) -> Config:
        self._check_workers()
        self._check_protection()
        self._check_adaptation()
        return self

    def _check_workers(self) -> None:
        batch_size, num_workers = self.train.batch_size, self.cluster.num_workers
        if num_workers and batch_size % num_workers:
            raise ValueError(
                f"train.batch_size {batch_size} cannot be divided among cluster.num_workers {num_workers}; allowed is "
                "a multiple of it"
            )
        if num_workers and batch_size // num_workers < 2:
            raise ValueError(
                f"train.batch_size {batch_size} leaves each of cluster.num_workers {num_workers} one image; allowed "
                "are two and more, for batch normalization"
            )
        if self.data.stream and self.cluster.min_workers is not None and not self.cluster.gpu:
            raise ValueError(
                "cluster.min_workers with data.stream needs cluster.gpu true, since CPU workers leave no CPU for "
                "reading; allowed is a fixed cluster.num_workers"
            )

    def _check_protection(self) -> None:
        name, protection = self.protection.name, PROTECTIONS.get(self.protection.name)
        if self.train.mode == "plain" and name != "plain":
            raise ValueError(f"train.mode 'plain' trains no protection, but protection is {name!r}; allowed: 'plain'")
        if self.train.mode == "frozen" and not protection.trained:
            raise ValueError(f"train.mode 'frozen' trains the protection alone, and {name!r} has nothing to train")
        if (problem := protection.problem(self.protection, self.data.channels)) is not None:
            raise ValueError(problem)

    def _check_adaptation(self) -> None:
        name = self.adaptation_name
        reads_blocks = name in ADAPTATIONS and ADAPTATIONS.get(name).side == BLOCK
        block = getattr(self.protection, "block", BLOCK)
        if reads_blocks and block != BLOCK:
            raise ValueError(
                f"protection.block {block} is not {BLOCK}, the side of the blocks that adaptation {name!r} "
                f"reads; allowed is {BLOCK}, or adaptation 'none'"
            )
        allowed = ("auto", "none", *ADAPTATIONS)
        if self.adaptation not in allowed:
            raise ValueError(
                f"unknown adaptation {self.adaptation!r}{suggest(self.adaptation, allowed)}; "
                f"allowed: {', '.join(allowed)}"
            )
        if self.train.mode == "frozen" and self.adaptation not in ("auto", "none"):
            raise ValueError(
                f"train.mode 'frozen' uses the plain classifier unchanged, without adaptation {self.adaptation!r}"
            )

    @property
    def adaptation_name(self) -> str:
        """Name of the adaptation network; "auto" is resolved to the protection's default."""
        default: str = PROTECTIONS.get(self.protection.name).adaptation
        return default if self.adaptation == "auto" else self.adaptation

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return text
