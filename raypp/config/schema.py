"""The configuration tree: a preset, then a YAML file, then command-line flags, validated once.

Every number of the paper that a run uses stands in a preset, none in code. The merged tree is frozen, unknown keys are
refused, and it is written into each run and bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
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
"""Methods by the section that names one."""
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Side = Annotated[int, Field(ge=1)]


def _select(registry: Registry) -> BeforeValidator:
    """Validate a section against the options model that its ``name`` selects in ``registry``."""

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


def _number(value: Any) -> Any:
    """A flag's text as the integer it is; a Literal does not convert by itself."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


class ConfigModel(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )


class AugmentConfig(ConfigModel):
    crop_padding: int = Field(4, ge=0, le=1024)
    """Pixels of zero padding before a random crop of the original size; 0 switches the crop off."""
    flip: bool = True
    """Mirror half of the images left to right."""


class Data(ConfigModel):
    source: Annotated[SerializeAsAny[MethodConfig], _select(SOURCES)]
    """Where images come from; ``raypp data ls`` lists the sources and their options."""
    image_size: tuple[Side, Side] | None = None
    """Height and width that every image is fitted to (resize, then centre crop); null takes them as they are."""
    channels: Annotated[Literal[1, 3], BeforeValidator(_number)] = 3
    """3 for RGB, 1 for grey."""
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


class Optimizer(ConfigModel):
    name: Literal["sgd", "adamw", "muon"] = "sgd"
    """``muon`` (Jordan et al. 2024) makes what it adds to a weight of two and more dimensions orthogonal, and takes
    learning rates of ``adamw``'s size: more gained per image, and more to compute per step."""
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD's and Muon's momentum; AdamW's first beta."""
    weight_decay: float = Field(5e-4, ge=0)


class Constant(ConfigModel):
    name: Literal["constant"] = "constant"


def scaled_milestones(milestones: Sequence[float], old_epochs: int, new_epochs: int) -> list[float]:
    """Milestones of a training of ``old_epochs`` at the same shares of one of ``new_epochs``."""
    return [_whole(round(milestone * new_epochs / old_epochs, 6)) for milestone in milestones]


def _whole(value: float) -> float:
    """A whole number as an integer, so that it is printed as one."""
    return int(value) if value == int(value) else value


PAPER_EPOCHS = 200  # of the default milestones
Milestone = Annotated[float, Field(ge=0), AfterValidator(_whole), PlainSerializer(_whole, return_type=Any)]


class MultiStep(ConfigModel):
    name: Literal["multistep"] = "multistep"
    milestones: tuple[Milestone, ...] = (60, 120, 160)
    """Epochs, counted from 0, after which the learning rate is multiplied by ``gamma``. They belong to the number of
    epochs that they are stated with: another number, and a phase of another length, keep their shares of the whole.
    The default is at 30, 60 and 80% of the epochs."""
    gamma: float = Field(0.2, gt=0, le=1)


class LinearWarmupDecay(ConfigModel):
    name: Literal["one_cycle"] = "one_cycle"
    warmup: float = Field(0.2, ge=0, lt=1)
    """Share of all steps in which the learning rate rises linearly to ``lr``; it then falls linearly to ``final``."""
    final: float = Field(0.0, ge=0, le=1)
    """Learning rate after the last step, as a share of ``lr``."""


def _default_milestones(schedule: Any, info: ValidationInfo) -> Any:
    """Move milestones that nobody stated from the paper's number of epochs to the configured one."""
    epochs = info.data.get("epochs")
    if epochs is None or not isinstance(schedule, MultiStep) or "milestones" in schedule.model_fields_set:
        return schedule
    milestones = scaled_milestones(schedule.milestones, PAPER_EPOCHS, epochs)
    return MultiStep(milestones=tuple(milestones), gamma=schedule.gamma)


class OptimizationConfig(ConfigModel):
    """How networks are trained: what every loop needs, the attacks' included."""

    epochs: int = Field(200, ge=1, le=1_000_000)
    """Epochs of the mode's own phase."""
    batch_size: int = Field(128, ge=2)
    """Images per step over all workers together."""
    eval_batch_size: int = Field(500, ge=1)
    """Images per evaluation step and worker."""
    optimizer: Optimizer = Optimizer()
    schedule: Annotated[
        MultiStep | LinearWarmupDecay | Constant,
        Field(discriminator="name", validate_default=True),
        AfterValidator(_default_milestones),
    ] = MultiStep()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``auto`` takes bf16 autocast where the hardware has bf16 instructions."""
    channels_last: bool = True
    compile: bool = False
    """torch.compile; measure before you switch it on."""
    sync_batchnorm: bool = False
    """Batch statistics over all workers, so that the number of workers does not change the result."""
    deterministic: bool = True
    """Ask torch for deterministic algorithms."""
    adapt_threads: bool = True
    """CPU only: compute with fewer threads while other processes use the cores. Rounding depends on the number of
    threads; false keeps it, so that two runs end with the same bits."""
    checkpoint_seconds: float | None = Field(300, gt=0)
    """Write a checkpoint within an epoch as well when the last is so old; null writes them at the ends of epochs."""


class Train(OptimizationConfig):
    mode: Literal["joint", "frozen", "plain"] = "joint"
    """``joint`` trains protection and classifier together. ``frozen`` trains the classifier on plain images first and
    then the protection alone, as the authors' released code does; the paper's Eq. 3, too, minimises over the
    protection's weights only. ``plain`` trains the classifier alone, the baseline."""
    alpha: float = Field(0.005, ge=0)
    """Weight of the feature distance in Eq. 4."""
    plain_epochs: int | None = Field(None, ge=1, le=1_000_000)
    """Epochs of the plain classifier where a phase needs one first; null means ``epochs``."""


class Cluster(ConfigModel):
    num_workers: int | None = Field(None, ge=1)
    """Training workers; null takes one per GPU, else one per CPU, at most 8 and so that they divide the batch."""
    min_workers: int | None = Field(None, ge=1)
    """Go on with as few workers as this when nodes leave, and take up more, to ``num_workers``, when they come; null
    waits for all of them. Where their number does not divide the batch, a step takes the next smaller one that it
    does."""
    resize_seconds: float = Field(30, ge=0)
    """Seconds between looks whether a run with ``min_workers`` can grow. To grow, it starts its workers again from the
    newest checkpoint."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs that Ray reserves per worker; also its number of torch threads."""
    gpu: bool | None = None
    """One GPU per worker; null takes GPUs when the cluster has one for each worker at the start (true waits for
    them)."""
    max_failures: int = Field(3, ge=-1)
    """Times in all that a worker group is restarted from the last checkpoint before the run is given up; -1 sets no
    limit, which a long run on nodes that come and go wants."""
    storage: PathOrUri = Field("runs", validate_default=True)
    """Folder or pyarrow filesystem URI (s3://...) under which each run has its folder."""

    @model_validator(mode="after")
    def _range(self) -> Cluster:
        if self.min_workers is not None and self.min_workers > (self.num_workers or 0):
            raise ValueError(
                f"min_workers is {self.min_workers}; allowed is at most num_workers, which is "
                f"{'not set' if self.num_workers is None else self.num_workers}"
            )
        return self


class Config(ConfigModel):
    """One run. Sections are frozen; make another with ``load_config`` or ``model_copy``."""

    seed: Seed = 0
    """Sets everything random: split, initial weights, batch order, augmentation."""
    data: Data
    protection: Annotated[SerializeAsAny[MethodConfig], _select(PROTECTIONS)]
    classifier: Annotated[SerializeAsAny[MethodConfig], _select(CLASSIFIERS)]
    adaptation: str = "auto"
    """Network between protected images and the classifier; ``auto`` is the one that the protection names."""
    features: Annotated[SerializeAsAny[MethodConfig], _select(FEATURES)]
    train: Train = Train()
    cluster: Cluster = Field(default_factory=Cluster)  # at each use: its storage is relative to the current folder

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.cluster.num_workers and self.train.batch_size % self.cluster.num_workers:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} cannot be divided among cluster.num_workers "
                f"{self.cluster.num_workers}; allowed is a multiple of it"
            )
        if self.cluster.num_workers and self.train.batch_size // self.cluster.num_workers < 2:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} leaves each of cluster.num_workers "
                f"{self.cluster.num_workers} one image; allowed are two and more, for batch normalisation"
            )
        if self.data.stream and self.cluster.min_workers is not None and not self.cluster.gpu:
            raise ValueError(
                "cluster.min_workers with data.stream needs cluster.gpu true: workers that take every CPU as it comes "
                "leave none for reading; allowed is a fixed cluster.num_workers"
            )
        if self.train.mode == "plain" and self.protection.name != "plain":
            raise ValueError(
                f"train.mode 'plain' trains no protection, found {self.protection.name!r}; allowed: 'plain'"
            )
        kind = PROTECTIONS.get(self.protection.name)
        if self.train.mode == "frozen" and not kind.trained:
            raise ValueError(
                f"train.mode 'frozen' trains the protection alone, and {self.protection.name!r} has nothing to train"
            )
        if (problem := kind.problem(self.protection, self.data.channels)) is not None:
            raise ValueError(problem)
        chosen = kind.adaptation if self.adaptation == "auto" else self.adaptation
        together = ADAPTATIONS.get(chosen).side if chosen in ADAPTATIONS else None
        block = getattr(self.protection, "block", BLOCK)
        if together == BLOCK and block != BLOCK:
            raise ValueError(
                f"protection.block {block} is not {BLOCK}, the side of the blocks that adaptation {chosen!r} "
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
                f"train.mode 'frozen' takes the plain classifier as it is, without adaptation {self.adaptation!r}"
            )
        return self

    @property
    def adaptation_name(self) -> str:
        """The adaptation network in front of the classifier; "auto" is the one that the protection names."""
        automatic: str = PROTECTIONS.get(self.protection.name).adaptation
        return automatic if self.adaptation == "auto" else self.adaptation

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return text
